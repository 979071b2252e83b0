"""constant: fine-tunes a sparse model with its mask fixed."""

from dataclasses import dataclass
from typing import ClassVar

from vit_rsst.pruning.plan import PruningView, RoundPlan, register_method


@register_method("constant")
@dataclass(frozen=True)
class Constant:
    """Trains `train.epochs` epochs with the mask of `model.start_from`."""

    one_round: ClassVar[bool] = True

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        return RoundPlan(mask=view.mask)
