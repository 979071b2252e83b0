"""gmp: gradual magnitude pruning within one round (Zhu & Gupta 2017), the control of equal total epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from vit_rsst.progress import at_fraction
from vit_rsst.pruning.plan import PruningView, RoundPlan, register_method

if TYPE_CHECKING:
    from vit_rsst.progress import Progress
    from vit_rsst.pruning.masks import MaskSet


@register_method("gmp")
@dataclass(frozen=True)
class Gmp:
    """Raises the sparsity every `interval` steps along the schedule, continuously over all epochs.

    Attributes:
        window: fractions of the run between which the sparsity grows; after it the mask is fixed.
        interval: optimizer steps between two removals.
    """

    one_round: ClassVar[bool] = True

    window: tuple[float, float] = (0.1, 0.7)
    interval: Annotated[int, Ge(1)] = 10

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        return RoundPlan(mask=view.mask)

    def refresh(self, progress: Progress, view: PruningView) -> MaskSet | None:
        start, end = (at_fraction(x, progress.round_steps) for x in self.window)
        end = max(end, start + 1)  # a window that holds no step still removes, at once
        step = progress.round_step + 1  # counting the one under way
        if not start < step <= end or ((step - start) % self.interval and step != end):
            return None
        return view.elements(view.density((step - start) / (end - start)))
