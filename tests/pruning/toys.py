"""Toys: networks of a few hundred weights, images that a child could tell apart, and real runs over them.

`Toy(...).make(folder)` is a real `loop.Run`, built by hand so that no recipe, catalogue or download is between a test
and the arithmetic that it checks.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vit_rsst import loop
from vit_rsst.data.dealing import Dealing
from vit_rsst.data.loaders import InMemoryLoader, evaluation_batches
from vit_rsst.data.mixing import Mixing
from vit_rsst.data.tables import Split
from vit_rsst.data.transforms import Augmentation, Erasing
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.models.complexity import evaluating
from vit_rsst.progress import Progress
from vit_rsst.pruning.allocation import Allocation
from vit_rsst.pruning.calibration import collect
from vit_rsst.pruning.compensation import compensate_
from vit_rsst.pruning.controller import Controller
from vit_rsst.pruning.criteria import CRITERIA, OF_IMAGES, Statistics
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.plan import Method
from vit_rsst.pruning.selector import Floors, Selector
from vit_rsst.pruning.units import UnitGroup
from vit_rsst.run.checkpoint import Checkpointer
from vit_rsst.run.console import Console
from vit_rsst.run.folder import RunFolder
from vit_rsst.run.heartbeat import Heartbeat
from vit_rsst.run.ranks import Ranks
from vit_rsst.run.signals import StopFlag
from vit_rsst.run.state import Run
from vit_rsst.run.tracking import Tracker
from vit_rsst.training import optim
from vit_rsst.training.best import Best
from vit_rsst.training.counters import RunningLoss, score
from vit_rsst.training.distill import Distillation
from vit_rsst.training.ema import Ema
from vit_rsst.training.schedules import SPARSITY_CURVES, learning_rate

CPU = torch.device("cpu")
CLASSES, SIZE = 4, 8
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def mlp() -> nn.Module:
    """192 → 12 → 4; 2,352 prunable weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 12), nn.GELU(), nn.Linear(12, CLASSES))


def batchnorm_mlp() -> nn.Module:
    """With buffers, one of them an integer."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, CLASSES)
    )


def vit() -> nn.Module:
    """A real ViT of two blocks, 16 wide, with two heads and four patches; 4,096 prunable weights."""
    model = VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=CLASSES
    )
    model.pretrained_cfg = {"first_conv": "patch_embed.proj", "classifier": "head"}
    return model


def images(num_samples: int, seed: int) -> Split:
    """One pattern a class, the same in the mirror, under noise; uint8, balanced."""
    coarse = torch.rand(CLASSES, 3, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(99))
    patterns = (coarse + coarse.flip(-1)).repeat_interleave(2, -1).repeat_interleave(2, -2) * 64 + 64
    labels = torch.arange(num_samples) % CLASSES
    noise = torch.randn(num_samples, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 40
    return Split((patterns[labels] + noise).clamp(0, 255).byte(), labels)


@dataclass(frozen=True)
class Toy:
    """What a test wants to vary of a run; `make` builds it."""

    method: Method
    network: Callable[[], nn.Module] = mlp
    optimizer: str = "adamw"
    lr: float = 1e-2
    weight_decay: float = 0.05
    clip: float | None = 1.0
    precision: str = "no"
    accumulation: int = 1
    round_epochs: tuple[int, ...] = (2, 2, 2, 2)
    steps_per_epoch: int = 4
    final_sparsity: float = 0.9
    curve: str = "geometric"
    criterion: str = "magnitude"
    granularity: str = "element"
    scope: str = "global"
    rewind_epoch: int | None = None
    max_skipped_steps: int = 0
    seed: int = 0
    ema_decay: float | None = None
    compensates: bool = False
    mixes: bool = False
    erases: bool = False
    patience: int | None = None
    keep_best: bool = False
    teacher: Callable[[], nn.Module] | None = None

    def make(self, folder: Path) -> Run:
        for name in ("checkpoints", "tickets", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        plugin = GradientAccumulationPlugin(num_steps=self.accumulation, sync_with_dataloader=False)
        accelerator = Accelerator(cpu=True, mixed_precision=self.precision, gradient_accumulation_plugin=plugin)
        torch.manual_seed(self.seed)
        net = self.network()
        optimizer = optim.create_optimizer(
            net, self.optimizer, lr=self.lr, weight_decay=self.weight_decay, momentum=0.9, betas=(0.9, 0.999)
        )
        weights, groups = prunable_parts(net, self.granularity)
        progress = Progress(self.steps_per_epoch, self.round_epochs)
        val, needs = images(100, seed=2), CRITERIA[self.criterion].needs

        shown = {"rank": 0, "num_processes": 1, "device": CPU, "mean": MEAN, "std": STD}

        def evaluate(split: str) -> dict[str, float]:
            return score(net, evaluation_batches(val, 50, **shown), CPU)

        def calibrate() -> Statistics:
            batches = evaluation_batches(images(40, seed=3), 16, **shown)
            return collect(net, batches, weights, groups, needs)

        def compensate(mask: MaskSet) -> None:
            batches = evaluation_batches(images(40, seed=3), 16, **shown)
            with evaluating(net):
                compensate_(net, weights, mask, batches, of_units=bool(groups))

        model, prepared = accelerator.prepare(net, optimizer)
        controller = Controller(
            model=net,
            weights=weights,
            optimizer=prepared,
            method=self.method,
            rounds=max(len(self.round_epochs) - 1, 1),
            density=lambda fraction: 1.0 - SPARSITY_CURVES[self.curve](fraction, self.final_sparsity),
            selector=self.selector(groups),
            calibrate=calibrate if needs in OF_IMAGES else None,
            compensate=compensate if self.compensates else None,
            rewind_epoch=self.rewind_epoch,
            seed=self.seed,
            evaluate=lambda: evaluate("val"),
            mask=MaskSet.full(weights),
            ema=Ema(net, self.ema_decay) if self.ema_decay else None,
        )
        erasing = Erasing(0.5, "pixel") if self.erases else None
        return Run(
            accelerator=accelerator,
            model=model,
            net=net,
            optimizer=prepared,
            loader=InMemoryLoader(
                Dealing.of(8, 8 // self.accumulation, 1), 0, CPU, self.seed, Augmentation(1, 0.5, erasing), MEAN, STD,
                split=images(8 * self.steps_per_epoch + 3, seed=1),
                mixing=Mixing(CLASSES, 0.8, 1.0, 1.0, 0.5) if self.mixes else None,
            ),
            loss=nn.CrossEntropyLoss(),
            distillation=Distillation(self.teacher, 0.5, 2.0, nullcontext) if self.teacher else None,
            best=Best(self.patience, self.keep_best),
            lr=self.rate,
            controller=controller,
            progress=progress,
            evaluate=evaluate,
            folder=RunFolder(folder),
            checkpointer=Checkpointer(folder / "checkpoints"),
            tracker=Tracker(folder / "metrics.jsonl", True, print),
            console=Console(False, progress, 8),
            stop=StopFlag(),
            meter=RunningLoss(CPU),
            ranks=Ranks(0, 1, Heartbeat(0, 1, 60.0, folder / "stacks.txt", None, print)),
            batch_shape=(8 // self.accumulation, 3, SIZE, SIZE),
            clip_grad_norm=self.clip,
            max_skipped_steps=self.max_skipped_steps,
            log_every_steps=10**9,
            save_every_steps=None,
            seed=self.seed,
            recipe_fingerprint="toy",
            header={},
            environment={},
        )  # fmt: skip

    def selector(self, groups: list[UnitGroup]) -> Selector:
        allocation = Allocation(self.scope, final_density=1.0 - self.final_sparsity)
        return Selector(CRITERIA[self.criterion], self.granularity, groups, allocation, Floors(min_neurons=2))

    def rate(self, progress: Progress) -> float:
        return learning_rate(
            progress.round_step, progress.round_steps, lr=self.lr, warmup=0.2, schedule="cosine", min_lr=0.1 * self.lr
        )


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    """Every bit of every tensor: −0 and +0 differ, as do two NaNs of different payload."""
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in state.items()}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def train_rounds(run: Run, rounds: int | None = None) -> None:
    """Trains as `loop.train` does, without its files; stops after `rounds` rounds and leaves `progress` there."""
    for round in run.progress.remaining_rounds():
        if round == rounds:
            return
        if run.controller.begin_round(round):
            optim.reset_state_(run.optimizer)
        for _ in run.progress.remaining_epochs():
            loop.train_epoch(run)
            run.controller.after_epoch(run.progress)
        run.controller.end_round()
