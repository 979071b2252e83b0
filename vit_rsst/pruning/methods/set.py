"""set: sparse evolutionary training; sparse from the first step, dropped weights are replaced at random (Mocanu 2018).

The criterion chooses the first mask, by default at random with ERK densities. At each update every weight drops a share
of its smallest elements and grows as many elsewhere, which start at zero. The share decays along a cosine (Dettmers &
Zettlemoyer 2019, Evci et al. 2020); the density never changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from vit_rsst.pruning.patterns import UNIT_KINDS
from vit_rsst.pruning.plan import Gradual, Growth, Method, PruningView, RoundPlan, Setting, register_method

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vit_rsst.progress import Progress
    from vit_rsst.pruning.masks import MaskSet


class Moves(Gradual):
    """Updates at every interval of the window but its end, where the cosine has reached zero."""

    def due(self, round_steps: int) -> list[int]:
        return [step for step in super().due(round_steps) if step != self.steps(round_steps)[-1]]

    def fraction_at(self, progress: Progress) -> float | None:
        fraction = super().fraction_at(progress)
        return None if fraction == 1.0 else fraction


@register_method("set")
@dataclass(frozen=True)
class SparseEvolutionary(Method):
    """Trains at the final sparsity from the first step, over all epochs.

    Attributes:
        window: fractions of the run between which the mask moves; afterwards it is fixed.
        interval: optimizer steps between updates.
        drop_fraction: share of the alive elements of each weight that the first update would replace.
    """

    one_round: ClassVar[bool] = True
    removes_for_good: ClassVar[bool] = False
    default_criterion: ClassVar[str] = "random"
    default_scope: ClassVar[str] = "erk"
    growth: ClassVar[Growth] = "random"

    window: tuple[float, float] = (0.0, 0.75)
    interval: Annotated[int, Ge(1)] = 100
    drop_fraction: Annotated[float, Gt(0), Lt(1)] = 0.3

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        return RoundPlan(mask=view.units(view.density(1.0)))

    @property
    def gradual(self) -> Gradual:
        """When the mask moves."""
        return Moves(self.window, self.interval)

    def refresh(self, progress: Progress, view: PruningView) -> MaskSet | None:
        fraction = self.gradual.fraction_at(progress)
        if fraction is None:
            return None
        return view.swap(self.drop_fraction / 2 * (1 + math.cos(math.pi * fraction)), self.growth)  # Evci 2020, sec. 3

    def rules(self, setting: Setting) -> Iterator[tuple[str, str]]:
        if (criterion := setting("pruning.criterion")) == "movement":
            yield (
                "pruning.criterion",
                f"{criterion} needs training steps, and the first mask is chosen before any; use random or saliency",
            )
        granularity = setting("pruning.granularity")
        if granularity in UNIT_KINDS:
            name = setting("pruning.method.name")
            yield (
                "pruning.granularity",
                f"{name} moves single weights, and {granularity!r} prunes whole units; use element or N:M, such as 2:4",
            )
