"""The `Pruner`: prunes a model while a training loop of your own trains it, by hooks alone.

It drives the controller that also prunes in `vit-rsst train`. Gradients are masked as they are accumulated, so that
norms and clipping see what the optimizer will use; a hook before the optimizer's step adds the penalty, one after it
shrinks and removes, and moves on from round to round.
"""

import json
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vit_rsst import shards
from vit_rsst.assembly.pruning import check_gradual
from vit_rsst.errors import CheckFailed, InputError
from vit_rsst.library import optimizers
from vit_rsst.library.batches import Batches
from vit_rsst.library.files import save
from vit_rsst.library.steps import Steps, rounds_in_steps
from vit_rsst.library.target import CALIBRATION, Target
from vit_rsst.models.complexity import evaluating
from vit_rsst.pruning.controller import Controller, RoundResult
from vit_rsst.pruning.foreach import zero_
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.plan import Method
from vit_rsst.recipe.calls import OF_SCHEDULE, in_words_of, pruning_section
from vit_rsst.text import aligned

Evaluate = Callable[[], float | Mapping[str, float]]
"""Top-1 accuracy of the model in percent, or a mapping with `top1` and `loss`. Collective."""

NAMES = CALIBRATION | {
    "model": "model",
    "model.start_from": "dense_steps=0",
    "optim": "optimizer",
    "train.recovery_epochs": "recovery_steps",
    "pruning.schedule": "final_sparsity",
    **{f"pruning.schedule.{key}": key for key in ("rounds", "rate", "sparsities", "budget")},
    "pruning.schedule.name": "schedule",
}
"""Recipe field → keyword of `Pruner`, where they differ."""

STATE = ("tensors", "controller", "progress", "results", "settings")
"""Keys of `Pruner.state_dict`."""

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models with a `Pruner`."""


@dataclass(frozen=True)
class Event:
    """Something to log.

    Attributes:
        name: `round began`, `round ended` or `training ended`.
        round: index; 0 is the dense round.
        step: optimizer steps made.
        density: fraction of the prunable weights that are alive.
        result: of the round that ended; otherwise None.
    """

    name: str
    round: int
    step: int
    density: float
    result: RoundResult | None = None


class Pruner:
    """Prunes `model` over the next `total_steps` steps of `optimizer`.

    Keywords are the words of a recipe's section `pruning`, with those of its schedule beside them.

    Attributes:
        results: of the rounds that have ended.
        progress: rounds and steps; an epoch of it is one step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        dense_steps: Steps | None = None,
        recovery_steps: Steps | None = None,
        method: str | Mapping[str, Any] | Method = "rsst",
        final_sparsity: float | Mapping[str, float] | None = None,
        rounds: int | None = None,
        rate: float | Mapping[str, float] | None = None,
        sparsities: Sequence[float] | None = None,
        budget: Mapping[str, float] | None = None,
        schedule: str | None = None,
        granularity: str = "element",
        criterion: str | None = None,
        scope: str | None = None,
        depth_ramp: Sequence[float] | None = None,
        layer_sparsity: Mapping[str, float] | None = None,
        max_layer_sparsity: float | None = None,
        min_neurons: int | None = None,
        compensate: str | None = None,
        rewind: str | None = None,
        include: Sequence[str] = (),
        protect: Sequence[str] = (),
        calibration: Batches | None = None,
        evaluate: Evaluate | None = None,
        on_event: Callable[[Event], object] | None = None,
        seed: int = 0,
    ):
        """Checks everything, prunes at once what the plan removes before the first step, and attaches the hooks.

        Args:
            model: the model that the loop calls; wrappers of DDP and torch.compile are looked through.
            optimizer: holds the model's parameters; Accelerate's wrapper is looked through.
            total_steps: optimizer steps of the whole training; accumulated micro-batches are one step.
            dense_steps: steps of the dense round 0, or a fraction of all; default: as many as of a later round.
            recovery_steps: steps of a last round that removes nothing, or a fraction of all; default: none.
            method: name, mapping with `name` and options, or a method itself; see the page on methods.
            final_sparsity, rounds, rate, sparsities, budget, schedule: as in `pruning.schedule`, whose name `schedule`
                is.
            granularity, criterion, scope, depth_ramp, layer_sparsity, max_layer_sparsity, min_neurons, compensate,
                include, protect: as in `pruning`.
            rewind: `init` starts every round from the weights that the model has now; otherwise rounds go on with the
                trained weights. The learning rate and the optimizer's state are left to the loop.
            calibration: a loader of (inputs, labels), or a callable that returns one, for criteria that need
                activations or gradients, and for compensation; every process of a distributed run may pass its part.
            evaluate: scores the model just before and after a removal, for the what-if gap; None: not measured.
            on_event: called with every `Event`.
            seed: of the criterion random.

        Raises:
            InputError: one sentence for each wrong keyword; a model without prunable weights, or with a `Pruner`; an
                optimizer that does not hold them; steps that do not hold the rounds.
        """
        words = {
            "method": method, "final_sparsity": final_sparsity, "rounds": rounds, "rate": rate,
            "sparsities": sparsities, "budget": budget, "schedule": schedule, "granularity": granularity,
            "criterion": criterion, "scope": scope, "depth_ramp": depth_ramp, "layer_sparsity": layer_sparsity,
            "max_layer_sparsity": max_layer_sparsity, "min_neurons": min_neurons, "compensate": compensate,
            "rewind": rewind,
            "include": list(include), "protect": list(protect),
        }  # fmt: skip
        self.optimizer = optimizers.unwrapped(optimizer)
        rest = optimizers.as_section(self.optimizer) | {"train": {"recovery_epochs": 1 if recovery_steps else 0}}
        rest |= {"model": {"start_from": "model"}} if dense_steps == 0 else {}
        pruning = pruning_section("Pruner", words, rest, NAMES)
        optimizers.check_penalty(self.optimizer, pruning.method.penalty)
        if pruning.rewind.startswith("epoch:"):
            raise InputError("Pruner(rewind=…): steps are not counted in epochs here; use init, or omit it.")
        if not pruning.method.prunes and (idle := [key for key in OF_SCHEDULE if words[key] is not None]):
            raise InputError(
                f"Pruner({idle[0]}=…): has no effect with {pruning.method_name}, which removes nothing; omit it."
            )
        self.progress = rounds_in_steps(pruning, total_steps, dense_steps, recovery_steps, rounds)
        with in_words_of("Pruner", NAMES):
            check_gradual(pruning.method, self.progress)
            target = Target.of(model, pruning, calibration)
            if target.net in _attached:
                raise InputError("model.name: it has a Pruner already; call finish() or detach() of that one first.")
            optimizers.check_holds(self.optimizer, target.weights)
            mask = target.starting_mask(pruning.method)
            calibrate, make_up = target.with_images(calibration, pruning.compensate is not None)
        self.net = target.net
        self.results: list[RoundResult] = []
        self._pruning, self._on_event, self._seed = pruning, on_event, seed
        self._has_warned = self._is_masked_here = False
        self._controller = Controller(
            model=self.net,
            weights=target.weights,
            optimizer=self.optimizer,
            method=pruning.method,
            rounds=pruning.schedule.num_rounds,
            density=target.density,
            selector=target.selector,
            rewind_epoch=pruning.rewind_epoch,
            seed=seed,
            evaluate=None if evaluate is None else lambda: self._scores(evaluate),
            mask=mask,
            calibrate=calibrate,
            compensate=make_up,
        )
        self._kept_out: tuple[dict[str, Tensor], bool] | None = None  # factors of gradients, and which are zeroed
        self._called = model  # with its wrappers
        self._handles: list[RemovableHandle] = []
        self._watches_forward = False
        try:
            self._begin_round()
            self._attach()
        except BaseException:
            self.detach()
            raise
        _attached.add(self.net)

    # -- what a loop may ask

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that are alive."""
        return self._controller.mask.density

    @property
    def masks(self) -> dict[str, Tensor]:
        """Weight name → bool tensor of its shape; True means alive."""
        return dict(self._controller.mask.masks)

    @property
    def is_over(self) -> bool:
        """Whether all steps have been made; from then on the masks are held and nothing else happens."""
        return self.progress.global_step >= self.progress.total_steps

    def metrics(self) -> dict[str, float]:
        """Numbers to log now: density, and, while a penalty acts, its strength and what is left of the condemned."""
        return self._controller.metrics(self.progress)

    def report(self) -> str:
        """A line for each round that has ended: density, steps, size of the condemned at their removal, what-if gap."""
        lines = [("round", "asked", "density", "steps", "condemned/kept", "what-if gap")]
        for result in self.results:
            ratio, gap = result.condemned_ratio, result.what_if_gap
            lines.append(
                (
                    str(result.round),
                    f"{result.density_asked:.4f}",
                    f"{result.density:.4f}",
                    f"{self.progress.round_epochs[result.round]:,}",
                    "–" if ratio is None else f"{ratio:.2e}",
                    "–" if gap is None else f"{gap:+.2f}",
                )
            )
        return aligned(lines)

    @torch.no_grad()
    def apply_(self, module: nn.Module) -> None:
        """Zeroes the masked weights of another module of the same names, such as a moving average of the model.

        Wrappers are looked through, such as torch's `AveragedModel` and timm's `ModelEmaV3`.

        Raises:
            InputError: it has no weights of these names and shapes.
        """
        masks, weights = self._controller.mask.masks, dict(module.named_parameters())
        while not masks.keys() <= weights.keys() and isinstance(inner := getattr(module, "module", None), nn.Module):
            module, weights = inner, dict(inner.named_parameters())
        for name, alive in masks.items():
            if name not in weights or weights[name].shape != alive.shape:
                raise InputError(
                    f"Pruner.apply_: {type(module).__name__} has no parameter {name} of shape {tuple(alive.shape)}; "
                    "pass a copy of the model, or a moving average of it."
                )
        for name, alive in masks.items():
            weights[name].masked_fill_(~alive.to(weights[name].device), 0.0)

    def mask_forward_(self) -> None:
        """Straight-through: the model holds w · M until the next step or `unmask_forward_`; others: nothing.

        A hook does it whenever the model is called; a loop that calls parts of the model needs it.
        """
        if self._controller.dense is None:
            self._controller.before_forward()

    def unmask_forward_(self) -> None:
        """Undoes `mask_forward_`."""
        self._controller.restore_dense_()

    def save_ticket(self, path: str | Path, **description: Any) -> Path:
        """Writes the model with its masks as a ticket; see `vit_rsst.save` for the keywords."""
        return save(self.net, path, masks=self.masks, **description)

    def finish(self) -> None:
        """Checks the zeros and detaches the hooks; call it after the last step.

        Raises:
            InputError: a removal is still ahead.
            CheckFailed: a masked weight is not zero, or is not in the model any more.
        """
        progress, controller = self.progress, self._controller
        self._check_weights()
        is_last = progress.round + 1 == len(progress.round_epochs)
        if not self.is_over and not (is_last and self._has_begun and controller.is_settled(progress)):
            raise InputError(
                f"Pruner.finish: after step {progress.global_step} of total_steps={progress.total_steps}, before the "
                f"last removal, with a density of {self.density:.4f}; train the remaining steps, or call detach()."
            )
        self._check_values()
        if not self.is_over:
            progress.end_round()
            self._end_round()
        self.detach()

    def detach(self) -> None:
        """Removes the hooks; masks are not held any more."""
        self.unmask_forward_()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _attached.discard(self.net)

    # -- resume

    def state_dict(self) -> dict[str, Any]:
        """Masks under `tensors`, and plain JSON. Save it between two steps, with the states of model and optimizer."""
        tensors, numbers = self._controller.state_dict()
        return {
            "tensors": tensors,
            "controller": numbers,
            "progress": self.progress.state_dict(),
            "results": [asdict(result) for result in self.results],
            "settings": self._settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken; load the states of model and optimizer first.

        Raises:
            InputError: the state is of other keywords, another model, or other weights than the model has; or this
                pruner is finished or detached.
        """
        if not self._handles:
            raise InputError("Pruner.load_state_dict: this one is finished or detached; make a new Pruner first.")
        if missing := [key for key in STATE if key not in state]:
            raise InputError(
                f"Pruner.load_state_dict: {missing[0]} is missing; expected what Pruner.state_dict() returned."
            )
        ours = self._settings()
        for key in ours:
            if state["settings"].get(key) != ours[key]:
                raise InputError(
                    f"Pruner.load_state_dict: {key} was {state['settings'].get(key)} and is {ours[key]}; pass the same "
                    "keywords, or start over without this state."
                )
        self._controller.dense = None  # of a step that was interrupted: the model has been loaded since
        self._controller.load_state_dict(state["tensors"], state["controller"])
        self.progress.load_state_dict(state["progress"])
        self.results = [RoundResult(**result) for result in state["results"]]
        self._watch_forward()
        mask = self._controller.mask
        is_masked = self._controller.state.forward == "masked"
        for name, weight in self._controller.weights.items() if is_masked else ():
            if bool((weight.detach() * ~mask[name]).any()):
                raise InputError(
                    f"Pruner.load_state_dict: {name} is not zero where this state has removed it; load the states of "
                    "model and optimizer first."
                )
        self._turn()

    def _settings(self) -> dict[str, Any]:
        """What must be the same after a resume, as plain JSON."""
        pruning = asdict(self._pruning) | {
            "method": {"name": self._pruning.method_name, **asdict(self._pruning.method)}
        }
        weights = {name: list(weight.shape) for name, weight in self._controller.weights.items()}
        rounds = list(self.progress.round_epochs)
        return json.loads(json.dumps({"pruning": pruning, "rounds": rounds, "seed": self._seed, "weights": weights}))

    # -- hooks

    def _attach(self) -> None:
        self._handles.append(self.optimizer.register_step_pre_hook(self._before_optimizer))
        self._handles.append(self.optimizer.register_step_post_hook(self._after_optimizer))
        for name, weight in self._controller.weights.items():
            self._handles.append(weight.register_post_accumulate_grad_hook(self._masking(name)))

    def _watch_forward(self) -> None:
        """Straight-through: masks the weights whenever the model is called."""
        if self._controller.state.forward == "straight_through" and not self._watches_forward:
            self._watches_forward = True
            self._handles.append(self._called.register_forward_pre_hook(self._before_forward))
            self._handles.append(self._called.register_forward_hook(self._after_forward, always_call=True))

    def _masking(self, name: str) -> Callable[[Tensor], None]:
        """Masks a gradient as it is accumulated; factors of 0 and 1 commute with sums, scaling and averaging."""

        def hook(weight: Tensor) -> None:
            if self._kept_out is not None and weight.grad is not None:
                self._check_device()
                made, where = self._kept_out
                zero_([shards.local(weight.grad)], [shards.local(made[name])], where)

        return hook

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple | None:
        if not self._has_begun:  # an exception in the loop's own code came between
            self._begin_round()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._before_step()
            return None

        def closed() -> Any:  # Lightning trains inside of it
            loss = closure()
            self._before_step()
            return loss

        return ((optimizer, closed, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": closed})

    @torch.no_grad()
    def _before_step(self) -> None:
        controller = self._controller
        self._check_device()
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is not None:  # a fused optimizer under GradScaler: the penalty needs gradients in their own size
            parameters = (p for group in self.optimizer.param_groups for p in group["params"])
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / float(scale))
            self.optimizer.grad_scale = None
        if self.is_over:
            return
        controller.after_backward(self.progress)
        controller.before_step(self.progress)

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        controller, progress = self._controller, self.progress
        if self.is_over:
            controller.enforce_()
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"Pruner: a step after total_steps={progress.total_steps}; the masks are held, and nothing more is "
                    "pruned.",
                    stacklevel=2,
                )
            return
        with in_words_of("Pruner", NAMES):
            controller.after_step(progress, getattr(optimizer, "found_inf", None))
        progress.advance()
        if progress.round_step == progress.round_steps:
            self._end_round()
        else:
            self._turn()

    def __reduce__(self) -> Any:
        raise InputError(
            "Pruner: it cannot be pickled, nor can the model while method ste masks it; save the state_dict() of both, "
            "or call finish() first."
        )

    def __deepcopy__(self, memo: dict) -> "Pruner":
        """Not copied with the model: a moving average copies its hooks, which then know that it is not the model."""
        if id(self._called) not in memo:
            raise InputError(
                "Pruner: it cannot be copied; make one for a copy of model and optimizer, and load the state_dict() of "
                "this one into it."
            )
        return self

    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        self._is_masked_here = module is self._called and self._controller.dense is None
        if self._is_masked_here:
            self.mask_forward_()

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A pass without gradients, an evaluation, leaves the dense weights in place at once."""
        if self._is_masked_here and not torch.is_grad_enabled():
            self.unmask_forward_()

    def _check_device(self) -> None:
        """
        Raises:
            InputError: the model has moved.
        """
        name, weight = next(iter(self._controller.weights.items()))
        if (device := self._controller.mask[name].device) != weight.device:
            raise InputError(
                f"Pruner(model=…): it was on {device} and is on {weight.device}; make the Pruner after the model is on "
                "its device, with Accelerate after accelerator.prepare."
            )

    def _check_values(self) -> None:
        """
        Raises:
            CheckFailed: a weight is not finite, or a masked one is not zero.
        """
        controller = self._controller
        for name, weight in controller.weights.items():
            if not weight.detach().isfinite().all():
                raise CheckFailed(
                    f"Pruner: {name} is not finite: training has diverged; lower the learning rate, or clip gradients."
                )
            dead = weight.detach().masked_fill(controller.mask[name], 0.0)
            if controller.state.forward == "masked" and (wrong := int(dead.count_nonzero())):
                raise CheckFailed(
                    f"Pruner: {wrong} masked elements of {name} are not zero; something has changed the weights after "
                    "the optimizer's step, such as a second optimizer."
                )

    def _check_weights(self) -> None:
        """
        Raises:
            CheckFailed: a prunable weight is not in the model any more.
        """
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}
        if gone := [name for name, weight in self._controller.weights.items() if id(weight) not in names]:
            raise CheckFailed(
                f"Pruner.finish: {gone[0]} is another tensor than when the Pruner was made, and is not pruned; "
                "replace layers, and load states with assign=True, before you make optimizer and Pruner."
            )

    # -- rounds

    @property
    def _has_begun(self) -> bool:
        return self._controller.state.round == self.progress.round

    def _begin_round(self) -> None:
        """Plans the round that `progress` points at, and ends it at once if it has no steps."""
        with in_words_of("Pruner", NAMES):
            self._controller.begin_round(self.progress.round)
        self._watch_forward()
        try:
            self._tell("round began")
        finally:
            if self.progress.round_steps:
                self._turn()
            else:
                self._end_round()

    def _end_round(self) -> None:
        self._check_values()
        self.results.append(self._controller.end_round())
        try:
            self._tell("round ended", self.results[-1])
        finally:  # an exception of `on_event` does not stop the rounds
            if self.progress.round + 1 < len(self.progress.round_epochs):
                self.progress.round, self.progress.epoch = self.progress.round + 1, 0
                self._begin_round()
            else:
                self._turn()
                self._tell("training ended")

    def _turn(self) -> None:
        """Notes which gradients the next step takes."""
        reads = not self.is_over and self._controller.reads_gradients(self.progress)
        masking = None if reads else self._controller.masks_gradients(self.progress)
        self._kept_out = None if masking is None else (_multipliers(masking[0]), masking[1])

    def _tell(self, name: str, result: RoundResult | None = None) -> None:
        if self._on_event is not None:
            self._on_event(Event(name, self.progress.round, self.progress.global_step, self.density, result))

    def _scores(self, evaluate: Evaluate) -> Mapping[str, float]:
        with evaluating(self.net):
            found = evaluate()
        return found if isinstance(found, Mapping) else {"top1": float(found)}


def _multipliers(mask: MaskSet) -> dict[str, Tensor]:
    """Factors for gradients; on the CPU int8 multiplies faster than bool."""
    return {name: m.view(torch.int8) if m.device.type == "cpu" else m for name, m in mask.masks.items()}
