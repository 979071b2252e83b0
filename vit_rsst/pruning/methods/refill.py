"""refill: whole units in place of scattered elements (Chen et al. 2022, "Coarsening the Granularity").

The elements that plain imp would keep are a budget: each group keeps as many whole units as they pay for, the best
ones, and their removed elements are put back.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from vit_rsst.pruning.plan import PruningView, RoundPlan, register_method


@register_method("refill")
@dataclass(frozen=True)
class Refill:
    """Needs a granularity of units.

    Attributes:
        refill_ratio: share of the otherwise removed units that is put back; 0 keeps imp's number of weights.
        feedback: `loop`: the next round prunes what was refilled. `post`, as published: the rounds prune elements as
            imp does, and one round more trains the refilled mask of the last.
    """

    one_round: ClassVar[bool] = False
    default_criterion: ClassVar[str] = "survivors"

    refill_ratio: Annotated[float, Ge(0), Lt(1)] = 0.0
    feedback: Literal["loop", "post"] = "loop"

    @property
    def extra_rounds(self) -> int:
        """Rounds after those of the schedule."""
        return 1 if self.feedback == "post" else 0

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        if round == 0:
            return RoundPlan(mask=view.mask)
        if round > view.rounds:
            filled = view.fill(view.mask, self.refill_ratio) if self.feedback == "post" else view.mask
            return RoundPlan(mask=filled, start_from="rewind")
        elements = view.elements(view.density(round / view.rounds))
        mask = elements if self.feedback == "post" else view.fill(elements, self.refill_ratio)
        return RoundPlan(mask=mask, start_from="rewind")
