"""refill: whole units instead of scattered elements (Chen et al. 2022, "Coarsening the Granularity").

The elements that imp would keep form a budget: each group keeps as many of its best units as the budget allows, with
their removed elements restored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from vit_rsst.pruning.patterns import UNIT_KINDS
from vit_rsst.pruning.plan import Method, PruningView, RoundPlan, Setting, register_method


@register_method("refill")
@dataclass(frozen=True)
class Refill(Method):
    """Requires a granularity of units.

    Attributes:
        refill_ratio: share of the removed units that is restored on top; 0 keeps as many weights as imp.
        feedback: `loop`: each round starts from the refilled mask. `post`, as published: rounds prune elements like
            imp, and an extra round trains the refilled mask of the last one.
    """

    one_round: ClassVar[bool] = False
    default_criterion: ClassVar[str] = "survivors"
    remove_at: ClassVar[float] = 0.0

    refill_ratio: Annotated[float, Ge(0), Lt(1)] = 0.0
    feedback: Literal["loop", "post"] = "loop"

    @property
    def extra_rounds(self) -> int:
        """Rounds in addition to those of the schedule."""
        return 1 if self.feedback == "post" else 0

    def rules(self, setting: Setting) -> Iterator[tuple[str, str]]:
        granularity = setting("pruning.granularity")
        if granularity not in UNIT_KINDS:
            yield (
                "pruning.granularity",
                (f"refill restores whole units; {granularity!r} has none; use head, neuron, head+neuron or channel"),
            )
        if self.feedback == "post" and setting("pruning.rewind") == "none":
            yield "pruning.rewind", ("with none, the refilled units train at the final learning rate; use init or lr")

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        if round == 0:
            return RoundPlan(mask=view.mask)
        if round > view.rounds:
            filled = view.fill(view.mask, self.refill_ratio) if self.feedback == "post" else view.mask
            return RoundPlan(mask=filled, start_from="rewind")
        elements = view.elements(view.density(round / view.rounds))
        mask = elements if self.feedback == "post" else view.fill(elements, self.refill_ratio)
        return RoundPlan(mask=mask, start_from="rewind")
