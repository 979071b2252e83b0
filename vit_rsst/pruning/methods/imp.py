"""imp: iterative magnitude pruning (Frankle & Carbin 2019; learning-rate rewinding: Renda et al. 2020)."""

from dataclasses import dataclass
from typing import ClassVar

from vit_rsst.pruning.plan import Method, PruningView, RoundPlan, register_method


@register_method("imp")
@dataclass(frozen=True)
class Imp(Method):
    """Removes the lowest-scoring weights at once at the start of a round, then rewinds as the recipe says."""

    one_round: ClassVar[bool] = False
    remove_at: ClassVar[float] = 0.0

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        if round == 0:
            return RoundPlan(mask=view.mask)
        return RoundPlan(mask=view.units(view.density(round / view.rounds)), start_from="rewind")
