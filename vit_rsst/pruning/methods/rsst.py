"""rsst: regularized sparse training. Condemned weights are driven to zero before they are removed.

Selects on the trained weights, like imp; then a growing penalty shrinks the condemned to (nearly) zero over a window of
the round, so that removing them costs next to nothing, and the rest of the round recovers.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from vit_rsst.pruning.plan import Method, Penalty, PruningView, RoundPlan, register_method


@register_method("rsst")
@dataclass(frozen=True)
class Rsst(Method):
    """Condemns at the start of a round, removes at fraction `remove_at` of it.

    Attributes:
        penalty: shrinks the condemned.
        remove_at: fraction of the round; 0 removes at once, like imp; 1 at its end, best followed by
            `train.recovery_epochs`.
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
