"""The interface of pruning methods: `RoundPlan`, `Penalty`, `PruningView`, `Method`.

Plans are data: the controller carries them out, tests and `--dry-run` print them. This module does not import torch, so
that a method's options can be checked before anything heavy is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from annotated_types import Gt, Lt

from vit_rsst.progress import at_fraction
from vit_rsst.pruning.registry import Registry
from vit_rsst.training.schedules import ramp

if TYPE_CHECKING:
    from vit_rsst.progress import Progress
    from vit_rsst.pruning.masks import MaskSet

Density = float | Mapping[str, float]
"""Fraction to keep, 0 … 1: of all prunable weights, or by kind of unit."""

Growth = Literal["random", "gradient"]
"""Which dead elements grow: drawn at random, or those with the largest gradient."""

Ramp = Literal["linear", "quadratic", "cubic", "exponential", "cosine"]

RAMPS_OF_0_1: dict[str, dict[str, Any]] = {
    "x": {"ramp": "linear"},
    "x^2": {"ramp": "quadratic"},
    "x^3": {"ramp": "cubic"},
    "exp": {"ramp": "exponential", "exponent": 1.0},
    "exp_custom": {"ramp": "exponential", "exponent": 1.0},
    "exp_custom_exponents": {"ramp": "exponential"},
    "cos": {"ramp": "cosine"},
}
"""Ramp names in recipes and resume points of version 0.1 → today's options."""


@dataclass(frozen=True)
class Penalty:
    """The growing penalty that shrinks the condemned to zero.

    Attributes:
        ramp: φ, how the strength grows over the window.
        exponent: p of the ramp `exponential`.
        strength: g; decoupled: scales the logarithm of the shrink, 1 reaches `residual`; gradient: the largest λ.
        residual: fraction of their size that the condemned have left at the end of a decoupled window of strength 1.
        window: fractions of the round between which the penalty acts.
        coupling: `decoupled` multiplies the weights after the step; `gradient` adds λ·w to the gradient before it.
        span: `round` ramps up once over the window; `epoch` restarts the ramp in each of its epochs.
        condemned_gradient: whether the condemned still receive the gradient of the loss.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    ramp: Ramp = "linear"
    exponent: Annotated[float, Gt(0)] = 4.0
    strength: Annotated[float, Gt(0)] = 1.0
    residual: Annotated[float, Gt(0), Lt(1)] = 1e-3
    window: tuple[float, float] = (0.0, 0.3)
    coupling: Literal["decoupled", "gradient"] = "decoupled"
    span: Literal["round", "epoch"] = "round"
    condemned_gradient: bool = False

    def steps(self, round_steps: int) -> range:
        """The steps of a round on which the penalty acts."""
        return range(at_fraction(self.window[0], round_steps), at_fraction(self.window[1], round_steps))

    def ramp_at(self, round_step: int, round_steps: int, steps_per_epoch: int) -> float:
        """φ at one step: 0 before the window, rising to 1 at the last step of its span, 1 after the window."""
        window = self.steps(round_steps)
        if round_step < window.start or not window:
            return 0.0
        if round_step >= window.stop:
            return 1.0
        start, length = window.start, len(window)
        if self.span == "epoch":
            start = max(window.start, round_step // steps_per_epoch * steps_per_epoch)
            length = min(length, steps_per_epoch)
        return ramp(self.ramp, (round_step - start + 1) / length, self.exponent)

    def shrink_at(self, round_step: int, round_steps: int, steps_per_epoch: int) -> float:
        """σ of one decoupled step, w ← w · exp(−σ). Sums to g · ln(1/residual) over the window; 0 outside."""
        if round_step not in self.steps(round_steps):
            return 0.0
        phi = self.ramp_at(round_step, round_steps, steps_per_epoch)
        return self.strength * -math.log(self.residual) * phi / _ramp_sum(self, round_steps, steps_per_epoch)


@lru_cache(maxsize=8)
def _ramp_sum(penalty: Penalty, round_steps: int, steps_per_epoch: int) -> float:
    """Σ φ over the window, so that `residual` is reached whatever the number of steps."""
    return math.fsum(penalty.ramp_at(t, round_steps, steps_per_epoch) for t in penalty.steps(round_steps))


@dataclass(frozen=True)
class RoundPlan:
    """A method's plan for one round.

    Attributes:
        mask: enforced from the first step of the round.
        target: enforced once the condemned (`mask − target`) are removed; None: nothing is condemned.
        penalty: how the condemned are shrunk to zero.
        remove_at: fraction of the round after which the target becomes the mask.
        start_from: `trained` keeps the weights; `rewind` restores the recipe's rewind point.
        forward: `masked`: dead weights are zero; `straight_through`: weights stay dense and are masked in the forward
            pass only, so that dead weights keep learning (Bengio et al. 2013).
    """

    mask: MaskSet
    target: MaskSet | None = None
    penalty: Penalty | None = None
    remove_at: float = 1.0
    start_from: Literal["trained", "rewind"] = "trained"
    forward: Literal["masked", "straight_through"] = "masked"


@dataclass(frozen=True)
class PruningView:
    """What a method can query when it plans. Every mask is the same on every rank.

    Attributes:
        mask: the current mask.
        rounds: number of sparse rounds in the schedule, not counting the dense round 0.
        density: fraction of the schedule (0 … 1) → target density.
        units: density → mask of the best alive units, at the recipe's granularity.
        elements: density → mask of the best alive elements, whatever the granularity.
        anew: density → like `units`, but dead units compete again.
        fill: element mask, ratio → mask of as many whole units as the elements pay for, plus `ratio` of the others.
        swap: share, growth → mask with that share of each weight's alive elements replaced; see `swapping.swap`.
    """

    mask: MaskSet
    rounds: int
    density: Callable[[float], Density] = field(repr=False)
    units: Callable[[Density], MaskSet] = field(repr=False)
    elements: Callable[[Density], MaskSet] = field(repr=False)
    anew: Callable[[Density], MaskSet] = field(repr=False)
    fill: Callable[[MaskSet, float], MaskSet] = field(repr=False)
    swap: Callable[[float, Growth], MaskSet] = field(repr=False)


@dataclass(frozen=True)
class Gradual:
    """Sparsity that grows within a round, every `interval` steps of `window` (fractions of the round)."""

    window: tuple[float, float]
    interval: int

    def steps(self, round_steps: int) -> range:
        """The steps of a round over which sparsity grows; an empty window removes everything in one step."""
        start, end = (at_fraction(x, round_steps) for x in self.window)
        return range(start, max(end, start + 1))

    def due(self, round_steps: int) -> list[int]:
        """The steps of a round after which the mask changes: every `interval` of `steps`, and the last."""
        steps = self.steps(round_steps)
        return sorted({step for step in (*steps[self.interval - 1 :: self.interval], steps[-1]) if step < round_steps})

    def fraction_at(self, progress: Progress) -> float | None:
        """Fraction of the schedule to reach after the current step; None: nothing is due."""
        steps = self.steps(progress.round_steps)
        done = progress.round_step + 1 - steps.start  # including the current step
        if not 0 < done <= len(steps) or (done % self.interval and done != len(steps)):
            return None
        return done / len(steps)


Setting = Callable[[str], Any]
"""Dotted name of a recipe field → its value."""


class Method(Protocol):
    """A pruning method: a frozen dataclass of its options, in its own file, decorated with `@register_method`.

    Its plans carry most of what other modules need: `preview` reads them for `--dry-run` and the memory estimate. What
    recipe checks need is declared here, with defaults that a method overrides. Options named `penalty`, `remove_at`,
    `window` and `interval` have the meaning given below and are checked for every method.

    Attributes:
        one_round: trains all epochs in a single round, in which `refresh` may change the mask; other methods prune from
            round to round.
        prunes: False: never removes anything, so schedule, criterion and calibration are unused.
        keeps_start: fine-tunes the sparse model of `model.start_from` for `train.epochs`.
        removes_for_good: False: a removed weight may come back, so that no other can make up for it.
        reads_gradients: `refresh` calls `view.swap` with growth by gradient; without `gradual`, at any step.
        default_criterion, default_rewind, default_scope: used if the recipe sets none; the scope for element only.
        extra_rounds: rounds in addition to those of the schedule.
        penalty: shrinks the condemned before they are removed; None: no penalty.
        remove_at: fraction of the round at which the condemned are removed; None: depends on the plan.
    """

    one_round: ClassVar[bool]
    prunes: ClassVar[bool] = True
    keeps_start: ClassVar[bool] = False
    removes_for_good: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = False
    default_criterion: ClassVar[str] = "magnitude"
    default_rewind: ClassVar[str] = "lr"
    default_scope: ClassVar[str | None] = None
    extra_rounds: int = 0
    penalty: Penalty | None = None
    remove_at: float | None = None
    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "allow_inf_nan": False}

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        """The plan for round `round`, made at its start."""
        ...

    def refresh(self, progress: Progress, view: PruningView) -> MaskSet | None:
        """A new mask after the current step, or None to keep the mask."""
        return None

    @property
    def gradual(self) -> Gradual | None:
        """When `refresh` changes the mask, from the options `window` and `interval`; None: unknown."""
        window = getattr(self, "window", None)
        return None if window is None else Gradual(window, getattr(self, "interval", 1))

    def rules(self, setting: Setting) -> Iterator[tuple[str, str]]:
        """(field, message) for each recipe field incompatible with this method; `method` denotes its own options.

        Args:
            setting: looks up recipe fields, such as `pruning.rewind`.
        """
        yield from ()

    @classmethod
    def question(cls, setting: Setting) -> str:
        """The question that a run answers, for its report; `setting` returns "?" for unknown fields."""
        asked = setting("pruning.schedule.final_sparsity")
        goal = f"{asked:.0%} of its prunable weights are removed" if isinstance(asked, float) else "it is pruned"
        chosen = f"{setting('pruning.granularity')} granularity, {setting('pruning.criterion')} criterion"
        model, data, method = (setting(name) for name in ("model.name", "data.source", "pruning.method.name"))
        return f"How accurate is {model} on {data} when {goal} with {method} ({chosen})?"


def changes_within_rounds(method: Method) -> bool:
    """Whether the method overrides `refresh`."""
    return type(method).refresh is not Method.refresh


METHODS: Registry[type[Method]] = Registry("method")


def register_method(name: str) -> Callable[[type], type]:
    """Class decorator: registers a frozen dataclass as a method under a recipe name.

    A class that does not inherit from `Method` gets its defaults for whatever it does not define.
    """

    def add(method: type) -> type:
        method.__pydantic_config__ = Method.__pydantic_config__
        for attribute, default in vars(Method).items():
            if not attribute.startswith("_") and attribute != "plan" and not hasattr(method, attribute):
                setattr(method, attribute, default)
        return METHODS.register(name)(method)

    return add
