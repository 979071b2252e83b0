"""A training step on the device `meta` as a stand-in for a GPU: counts kernels and synchronizations without one.

CPU and `meta` tensors do not mix, just as CPU and GPU tensors do not. Whatever would make the host wait for a GPU
returns a dummy value and is counted.
"""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vit_rsst.assembly.data import Rows, augmentation, channels
from vit_rsst.assembly.optim import build_optimizer
from vit_rsst.assembly.parts import Parts, Sizes, prepare
from vit_rsst.data.loaders import Batch, InMemoryLoader
from vit_rsst.data.mixing import Mixing
from vit_rsst.data.tables import Split
from vit_rsst.pruning.controller import Controller, RoundState
from vit_rsst.pruning.fading import Fading
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.movement import Movement
from vit_rsst.recipe.schema import Recipe
from vit_rsst.run.heartbeat import Heartbeat
from vit_rsst.run.ranks import Ranks
from vit_rsst.run.state import Run
from vit_rsst.training.counters import RunningLoss
from vit_rsst.training.distill import Distillation
from vit_rsst.training.ema import Ema
from vit_rsst.training.losses import make_loss

META, CPU = torch.device("meta"), torch.device("cpu")
ROWS = {"cifar10": 10, "cifar100": 100, "imagenet1k": 1000}
FUSED = {"aten::_fused_adam_", "aten::_fused_adamw_", "aten::_fused_sgd_"}
WITHOUT_A_KERNEL = ("aten::empty", "aten::new_empty", "aten::detach", "aten::lift_fresh", "aten::_reshape_alias")


class Counting(TorchDispatchMode):
    """Counts the device operations of a step.

    Attributes:
        waits: reads from the device by the host, by operation.
        copies: blocking copies from host memory.
        kernels: calls that would launch a kernel, by name; views and allocations do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.copies, self.kernels = Counter(), Counter(), Counter()
        # torch does not offer fused optimizers on `meta`.
        name = "torch.optim.optimizer._get_fused_kernels_supported_devices"
        self._fused = mock.patch(name, return_value=["cuda", "cpu", "meta"])

    def __enter__(self) -> "Counting":
        self._fused.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._fused.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(t.device == META for t in tensors) and kwargs.get("device") != META:
            return func(*args, **kwargs)
        if name == "aten::_local_scalar_dense":
            self.waits[name] += 1
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if name == "aten::_to_copy" and kwargs.get("device") == CPU:
            self.waits["aten::_to_copy to the host"] += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name in ("aten::nonzero", "aten::masked_select"):
            self.waits[name] += 1
            return func(*args, **kwargs)
        comes_from_host = tensors and tensors[0].device == CPU
        if name == "aten::_to_copy" and comes_from_host and tensors[0].numel() and not kwargs.get("non_blocking"):
            self.copies[name] += 1
        if not self._is_free(func, name):
            self.kernels[name] += 1
        return None if name in FUSED else func(*args, **kwargs)

    @staticmethod
    def _is_free(func: object, name: str) -> bool:
        returns = func._schema.returns
        is_view = bool(returns) and any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        return is_view or name.startswith(WITHOUT_A_KERNEL)


def stand_in(recipe: Recipe, folder: Path, teacher: bool = False) -> tuple[Run, Parts]:
    """A partial run with what `loop.train_step` needs."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    sizes = Sizes.of(recipe, Rows(50_000, 5_000, 10_000, ROWS.get(recipe.data.source, 10), False), 1)
    parts = prepare(recipe, sizes, META)
    plugin = GradientAccumulationPlugin(num_steps=sizes.dealing.accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    with Counting():
        optimizer = build_optimizer(parts.net, recipe.optim)
    model, optimizer = accelerator.prepare(parts.net, optimizer, device_placement=[False, False])
    counts = torch.ones(sizes.rows.num_classes, device=META)
    controller = Controller(
        model=parts.net,
        weights=parts.weights,
        optimizer=optimizer,
        method=recipe.pruning.method,
        rounds=max(recipe.pruning.schedule.num_rounds, 1),
        density=parts.density,
        selector=parts.selector,
        rewind_epoch=None,
        seed=0,
        evaluate=lambda: {"top1": 0.0, "loss": 0.0},
        mask=MaskSet.full(parts.weights),
        ema=Ema(parts.net, recipe.train.ema_decay) if recipe.train.ema_decay else None,
    )
    augment = recipe.data.augment
    mixing = None
    if augment.mixes:
        alphas = (augment.mixup, augment.cutmix, augment.mixup_prob, augment.mixup_switch_prob)
        mixing = Mixing(sizes.rows.num_classes, *alphas, augment.aug_repeats)
    loader = InMemoryLoader(
        sizes.dealing, 0, META, recipe.seed, augmentation(recipe), *channels(recipe), augment.aug_repeats, mixing,
        split=Split(torch.empty(0), torch.empty(0)),
    )  # fmt: skip
    missing = dict.fromkeys(("lr", "evaluate", "folder", "checkpointer", "tracker", "console", "stop", "environment"))
    run = Run(
        accelerator=accelerator,
        model=model,
        net=parts.net,
        optimizer=optimizer,
        loader=loader,
        loss=make_loss(recipe.train.loss, recipe.train.label_smoothing, counts),
        auxiliary_loss=getattr(parts.net, "auxiliary_loss", None),
        distillation=Distillation(lambda: other, 0.5, 2.0, nullcontext) if teacher else None,
        controller=controller,
        progress=sizes.progress,
        meter=RunningLoss(META),
        ranks=Ranks(0, 1, Heartbeat(0, 1, 3600.0, folder / "stacks.txt", None, print)),
        batch_shape=(sizes.dealing.batch_per_device, 3, sizes.image_size, sizes.image_size),
        clip_grad_norm=recipe.optim.clip_grad_norm,
        max_skipped_steps=0,
        log_every_steps=recipe.train.log_every_steps,
        save_every_steps=None,
        seed=0,
        recipe_fingerprint="",
        header={},
        **missing,
    )
    other: nn.Module = prepare(recipe, sizes, META).net.eval() if teacher else nn.Identity()
    return run, parts


def begin_phase(run: Run, phase: str) -> None:
    """Puts the controller in a phase of a round, as after a selection.

    Args:
        phase: `dense`, `window` of the first round that prunes, `later window`, `masked` or `ste`.
    """
    controller, method = run.controller, run.controller.method
    sparse = MaskSet({n: torch.empty_like(w, dtype=torch.bool) for n, w in controller.weights.items()})
    controller.mask.__dict__["is_full"], sparse.__dict__["is_full"] = True, False
    controller.state = RoundState(round=1)
    run.progress.round = min(1, len(run.progress.round_epochs) - 1)
    if controller.selector.criterion.needs == "movement":
        controller.movement = Movement.zeros(controller.weights)
    if phase in ("later window", "masked", "ste"):
        controller.mask = sparse
    if phase in ("window", "later window"):
        controller.fading = Fading(controller.weights, controller.optimizer, sparse, method.penalty)
        controller.state = RoundState(round=1, penalty=method.penalty, remove_at=1.0)
    elif phase == "ste":
        controller.state = RoundState(round=1, forward="straight_through")


def batches(run: Run) -> list[Batch]:
    """The micro-batches of a step, cropped, erased and mixed like the loader's."""
    dealing, loader = run.loader.dealing, run.loader
    drawn = loader.augmentation.draw(dealing.global_batch, 0)
    found = []
    for part, mixture in zip(dealing.slices(0), loader._mixtures(0), strict=True):
        images = torch.empty(run.batch_shape, dtype=torch.uint8, device=META)
        labels = torch.empty(len(images), dtype=torch.int64, device=META)
        found.append(loader._finished(images, labels, drawn.of(part), mixture))
    return found
