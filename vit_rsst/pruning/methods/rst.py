"""rst: random sparse training (Bai et al. 2022, "Dual Lottery Ticket Hypothesis").

Condemns a random set of the initial weights; a growing penalty moves its information into the others before it is
removed and the sparse network trains. With several rounds the set grows, drawn at random from the weights left.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Method, Penalty, PruningView, RoundPlan, Setting, register_method


@register_method("rst")
@dataclass(frozen=True)
class Rst(Method):
    """rsst from the initial weights, with random selection.

    Attributes:
        penalty: shrinks the condemned.
        remove_at: fraction of the round after which they are removed and the sparse training begins.
    """

    one_round: ClassVar[bool] = False
    default_criterion: ClassVar[str] = "random"
    default_rewind: ClassVar[str] = "init"

    penalty: Penalty = field(default_factory=Penalty)
    remove_at: Annotated[float, Ge(0), Le(1)] = 0.3

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        return Rsst(self.penalty, self.remove_at).plan(round, view)

    def rules(self, setting: Setting) -> Iterator[tuple[str, str]]:
        if (rewind := setting("pruning.rewind")) != "init":
            yield "pruning.rewind", f"rst starts every round from the initial weights, not from {rewind!r}; omit it"
