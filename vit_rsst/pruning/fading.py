"""Fading: how a penalty takes the condemned of a round to zero, step by step, until they are removed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vit_rsst import shards
from vit_rsst.progress import Progress
from vit_rsst.pruning.foreach import factors, subtract_
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.plan import Penalty
from vit_rsst.training import optim


@dataclass
class Fading:
    """A penalty at work on weights, from the start of its window until the removal.

    Meanwhile dead weights stay at zero by themselves: their gradients are masked, their moments and the penalty are 0.

    Attributes:
        leaving: elements that are zero after the removal, if not before.
        penalty: None: the condemned train like all others until they are removed.
        before: w · leaving as it was before the step; None: this step does not need it.
    """

    weights: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    leaving: MaskSet
    penalty: Penalty | None
    before: list[Tensor] | None = field(default=None, repr=False)
    _made: list[Tensor] | None = field(default=None, repr=False)

    def is_active(self, progress: Progress) -> bool:
        """Whether the penalty acts in this step: its window has begun, if it has one."""
        window = range(0) if self.penalty is None else self.penalty.steps(progress.round_steps)
        return bool(window) and progress.round_step >= window.start

    def blocks_gradient(self, progress: Progress) -> bool:
        """Whether the loss's gradient does not reach the condemned in this step."""
        return self.is_active(progress) and not self.penalty.condemned_gradient

    def strength_at(self, progress: Progress) -> float:
        """The penalty's strength by the shape of its ramp; λ if it is coupled."""
        penalty = self.penalty
        return penalty.strength * penalty.ramp_at(progress.round_step, progress.round_steps, progress.steps_per_epoch)

    @property
    def factors(self) -> list[Tensor]:
        """1 where an element leaves, else 0; see `foreach.factors`. Cached until `end_step`."""
        if self._made is None:
            self._made = factors(shards.locals_of(self.leaving.tensors()), self._own())
        return self._made

    def begin_step(self, progress: Progress) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """Prepares a step after its backward pass; returns the factors of `before`, if the step needs it."""
        self.before = None
        if not self.is_active(progress):
            return []
        if self.blocks_gradient(progress) and progress.round_step == self.penalty.steps(progress.round_steps).start:
            optim.clear_moments_(self.optimizer, self.weights, self.leaving.masks)
        if self._host_knows_at_once or all(decay == 1.0 for decay in self._undone()):
            return []
        return [(self._own(), self.factors)]

    def add_to_gradients_(self, progress: Progress) -> None:
        """Adds the coupled penalty to the clipped gradient; else cancels the weight decay of the condemned."""
        if not self.is_active(progress):
            return
        if self.penalty.coupling == "gradient":
            strength = dict.fromkeys(self.weights, self.strength_at(progress))
        elif not self.penalty.condemned_gradient:
            # SGD adds wd · w to the gradient: subtracted here, so that only the penalty moves the condemned.
            rates = optim.decay_rates(self.optimizer, self.weights)
            strength = {name: -l2 for name, (_, l2) in rates.items()}
        else:
            return
        if any(strength.values()):
            parts = zip(self.weights.values(), self._own(), self.factors, strength.values(), strict=True)
            found = [(shards.local(w.grad), own, leaves, by) for w, own, leaves, by in parts if w.grad is not None]
            # Removed weights are zero, so only the condemned contribute.
            if found:
                torch._foreach_addcmul_(*map(list, zip(*found, strict=True)))

    def shrink_(self, progress: Progress, skipped: Tensor | None) -> None:
        """Applies a decoupled penalty after the optimizer's step: w ← w · exp(−σ).

        Args:
            skipped: 1.0 on the weights' device if the optimizer skipped the step, else 0.0; None: not skipped.
        """
        if not self.is_active(progress) or self.penalty.coupling != "decoupled":
            return
        sigma = self.penalty.shrink_at(progress.round_step, progress.round_steps, progress.steps_per_epoch)
        kept, undone = math.exp(-sigma), self._undone()
        if all(kept == decay for decay in undone):
            return
        weights = self._own()
        for decay in dict.fromkeys(undone):
            places = [i for i, rate in enumerate(undone) if rate == decay]
            shrunk = [weights[i] for i in places]
            if self.before is not None and skipped is not None:
                share = torch.rsub(skipped, decay - kept, alpha=decay - 1.0)  # 1 − kept if it was skipped
                subtract_(shrunk, [self.before[i] for i in places], share)
            else:
                was_skipped = skipped is not None and decay != 1.0 and bool(skipped)
                taken = 1.0 - (kept if was_skipped else kept / decay)  # a skipped step has no decay
                torch._foreach_addcmul_(shrunk, shrunk, [self.factors[i] for i in places], value=-taken)

    def end_step(self) -> None:
        """Frees what was made for the step."""
        self.before = self._made = None

    def _own(self) -> list[Tensor]:
        """What this rank holds of the weights."""
        return shards.locals_of(self.weights.values())

    def _undone(self) -> list[float]:
        """What AdamW's decay multiplies each weight by, and a shrink divides out, so that `residual` is exact."""
        is_exact = self.penalty.coupling == "decoupled" and not self.penalty.condemned_gradient
        rates = optim.decay_rates(self.optimizer, self.weights).values()
        return [decay if is_exact else 1.0 for decay, _ in rates]

    @property
    def _host_knows_at_once(self) -> bool:
        """Whether the host can ask if a step was skipped without waiting for a device."""
        return next(iter(self.weights.values())).device.type == "cpu"
