"""dense: no pruning; the baseline with the same total number of epochs as the method beside it."""

from dataclasses import dataclass
from typing import ClassVar

from vit_rsst.pruning.plan import PruningView, RoundPlan, register_method


@register_method("dense")
@dataclass(frozen=True)
class Dense:
    """Trains without pruning."""

    one_round: ClassVar[bool] = True

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        return RoundPlan(mask=view.mask)
