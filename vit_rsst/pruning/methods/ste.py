"""ste: straight-through magnitude pruning, the strongest simple baseline in print (Lee et al. 2024, JaxPruner).

The weights stay dense: the forward pass uses only the largest of them, but the gradient reaches all, so that a removed
weight may grow and come back until the window ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from vit_rsst.pruning.plan import Method, PruningView, RoundPlan, Setting, register_method

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vit_rsst.progress import Progress
    from vit_rsst.pruning.masks import MaskSet


@register_method("ste")
@dataclass(frozen=True)
class StraightThrough(Method):
    """Selects again among all weights every `interval` steps, sparser along the schedule.

    Attributes:
        window: fractions of the run between which the sparsity grows; afterwards the mask is fixed.
        interval: optimizer steps between selections.
    """

    one_round: ClassVar[bool] = True
    removes_for_good: ClassVar[bool] = False

    window: tuple[float, float] = (0.1, 0.7)
    interval: Annotated[int, Ge(1)] = 10

    def plan(self, round: int, view: PruningView) -> RoundPlan:
        return RoundPlan(mask=view.mask, forward="straight_through")

    def refresh(self, progress: Progress, view: PruningView) -> MaskSet | None:
        fraction = self.gradual.fraction_at(progress)
        return None if fraction is None else view.anew(view.density(fraction))

    def rules(self, setting: Setting) -> Iterator[tuple[str, str]]:
        if (criterion := setting("pruning.criterion")) != "magnitude":
            yield (
                "pruning.criterion",
                (f"ste is straight-through magnitude pruning and does not work with {criterion!r}; use magnitude"),
            )
