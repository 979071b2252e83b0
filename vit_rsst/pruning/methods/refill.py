"""refill: whole units instead of scattered elements (Chen et al. 2022, "Coarsening the Granularity").

The elements that imp would keep form a budget: each group keeps as many of its best units as the budget allows, with
their removed elements restored.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from vit_rsst.pruning.plan import PruningView, RoundPlan, register_method


@register_method("refill")
@dataclass(frozen=True)
class Refill:
    """Requires a granularity of units.

    Attributes:
        refill_ratio: share of the removed units that is restored on top; 0 keeps as many weights as imp.
        feedback: `loop`: each round starts from the refilled mask. `post`, as published: rounds prune elements like
            imp, and an extra round trains the refilled mask of the last one.
    """

    one_round: ClassVar[bool] = False
    default_criterion: ClassVar[str] = "survivors"

    refill_ratio: Annotated[float, Ge(0), Lt(1)] = 0.0
    feedback: Literal["loop", "post"] = "loop"

    @property
    def extra_rounds(self) -> int:
        """Rounds in addition to those of the schedule."""
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
