"""gmp: gradual magnitude pruning in a single round (Zhu & Gupta 2017); a control with equal total epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from vit_rsst.pruning.plan import Method, PruningView, RoundPlan, register_method

if TYPE_CHECKING:
    from vit_rsst.progress import Progress
    from vit_rsst.pruning.masks import MaskSet


@register_method("gmp")
@dataclass(frozen=True)
class Gmp(Method):
    """Increases the sparsity along the schedule every `interval` steps, over all epochs.

    Attributes:
        window: fractions of the run between which the sparsity grows; afterwards the mask is fixed.
        interval: optimizer steps between removals.
    """

    one_round: ClassVar[bool] = True

    window: tuple[float, float] = (0.1, 0.7)
    interval: Annotated[int, Ge(1)] = 10

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        return RoundPlan(mask=view.mask)

    def refresh(self, progress: Progress, view: PruningView) -> MaskSet | None:
        fraction = self.gradual.fraction_at(progress)
        return None if fraction is None else view.units(view.density(fraction))
