"""dense: no pruning; the baseline.

Trains `train.epochs`. With a schedule in the recipe, as many epochs as its rounds take together: the control of equal
budget for the pruning method that the schedule is meant for.
"""

from dataclasses import dataclass
from typing import ClassVar

from vit_rsst.pruning.plan import Method, PruningView, RoundPlan, Setting, register_method


@register_method("dense")
@dataclass(frozen=True)
class Dense(Method):
    """Trains without pruning."""

    one_round: ClassVar[bool] = True
    prunes: ClassVar[bool] = False

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        return RoundPlan(mask=view.mask)

    @classmethod
    def question(cls, setting: Setting) -> str:
        return f"How accurate does {setting('model.name')} get on {setting('data.source')} without pruning?"
