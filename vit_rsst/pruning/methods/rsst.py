"""rsst: regularized sparse training. The weights that a criterion condemns glide to zero before they are removed.

Selection on the trained weights, as in imp; then a growing penalty over a window of the round takes the condemned to
(nearly) zero, so that removing them costs nothing, and the rest of the round recovers.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from vit_rsst.pruning.plan import Penalty, PruningView, RoundPlan, register_method


@register_method("rsst")
@dataclass(frozen=True)
class Rsst:
    """Condemns at the start of a round, removes at fraction `remove_at` of it.

    Attributes:
        penalty: how the condemned are taken to zero.
        remove_at: fraction of the round; 0 removes at once (as imp does), 1 at its end, which
            `train.recovery_epochs` should follow.
    """

    one_round: ClassVar[bool] = False

    penalty: Penalty = field(default_factory=Penalty)
    remove_at: Annotated[float, Ge(0), Le(1)] = 0.3

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        if round == 0 or round > view.rounds:  # dense; recovery after the last removal
            return RoundPlan(mask=view.mask)
        target = view.units(view.density(round / view.rounds))
        if self.remove_at == 0:
            return RoundPlan(mask=target, start_from="rewind")
        return RoundPlan(view.mask, target, self.penalty, self.remove_at, start_from="rewind")
