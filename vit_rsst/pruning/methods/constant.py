"""constant: fine-tunes a sparse model with its mask fixed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vit_rsst.pruning.plan import Method, PruningView, RoundPlan, Setting, register_method


@register_method("constant")
@dataclass(frozen=True)
class Constant(Method):
    """Trains `train.epochs` epochs with the mask of `model.start_from`."""

    one_round: ClassVar[bool] = True
    prunes: ClassVar[bool] = False
    keeps_start: ClassVar[bool] = True

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        return RoundPlan(mask=view.mask)

    def rules(self, setting: Setting) -> Iterator[tuple[str, str]]:
        if not setting("model.start_from"):
            yield (
                "pruning.method",
                ("constant keeps the zeros of an existing model; set model.start_from to a ticket or a run"),
            )

    @classmethod
    def question(cls, setting: Setting) -> str:
        start, data = setting("model.start_from"), setting("data.source")
        return f"How accurate does the ticket {start} get on {data} with further training at its sparsity?"
