"""Preview: what a method plans for every round, obtained from the method itself with stand-in masks.

The controller carries out the same plans, so `--dry-run` and the memory estimate cannot disagree with the run.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from vit_rsst.progress import Progress, at_fraction
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.plan import Density, Method, Penalty, PruningView, RoundPlan, changes_within_rounds

ELEMENTS = 1000
"""Elements per weight of the stand-in mask."""


@dataclass(frozen=True)
class RoundPreview:
    """One round as the method plans it.

    Attributes:
        density: target at the end of the round.
        refreshes: steps of the round after which `refresh` returns a new mask.
        moves: whether the mask only moves then, at the density that the plan begins with.
    """

    plan: RoundPlan
    density: float
    round_steps: int
    refreshes: Sequence[int]
    moves: bool = False

    @property
    def penalty(self) -> Penalty | None:
        """The penalty on the weights to be removed; None if nothing is condemned."""
        return self.plan.penalty if self.plan.target is not None else None

    def removal(self) -> str:
        """When the round removes weights."""
        if self.refreshes:
            first, last = self.refreshes[0] + 1, self.refreshes[-1] + 1
            gaps = {after - before for before, after in pairwise(self.refreshes[:-1])}  # the last gap may be shorter
            often = f"every {gaps.pop()} steps" if len(gaps) == 1 else f"{len(self.refreshes)} times"
            begins = "before the first step; moves " if self.moves else ""
            return f"{begins}{often}, steps {first:,}–{last:,}"
        if self.plan.target is not None:
            return f"after step {max(at_fraction(self.plan.remove_at, self.round_steps), 1):,}"
        return "before the first step"


def preview(
    method: Method,
    progress: Progress,
    rounds: int,
    density: Callable[[float], Density],
    mean: Callable[[Density], float],
    weights: Iterable[str],
) -> list[RoundPreview]:
    """The plan of every round.

    Args:
        progress: rounds and steps of the run; not modified.
        rounds: sparse rounds of the schedule.
        density: fraction of the schedule → density.
        mean: overall density of a density by kind.
        weights: names of the prunable weights.
    """
    mask, asked, found = MaskSet(dict.fromkeys(weights, torch.ones(ELEMENTS, dtype=torch.bool))), 1.0, []
    full = mask

    def chosen(density: Density, among: MaskSet) -> MaskSet:
        nonlocal asked
        asked = mean(density)
        best = torch.arange(ELEMENTS) < round(asked * ELEMENTS)
        cut = {alive: best & alive for alive in set(among.tensors())}  # most weights share one stand-in
        return MaskSet({name: cut[alive] for name, alive in among.masks.items()})

    def view() -> PruningView:
        return PruningView(
            mask=mask,
            rounds=rounds,
            density=density,
            units=lambda density: chosen(density, mask),
            elements=lambda density: chosen(density, mask),
            anew=lambda density: chosen(density, full),
            fill=lambda elements, ratio: elements,
            swap=lambda share, growth: mask,
        )

    for number, epochs in enumerate(progress.round_epochs):
        place = replace(progress, round=number, epoch=0, step=0)
        plan, refreshes = method.plan(number, view()), []
        mask = plan.mask if plan.target is None else plan.target
        steps = epochs * progress.steps_per_epoch
        for step in _asked(method, steps):
            place.epoch, place.step = divmod(step, progress.steps_per_epoch)
            if (new := method.refresh(place, view())) is not None:
                mask = new
                refreshes.append(step)
        moves = bool(refreshes) and mask.num_alive == plan.mask.num_alive
        found.append(RoundPreview(plan, asked, steps, refreshes, moves))
    return found


def _asked(method: Method, round_steps: int) -> Iterable[int]:
    """The steps of a round after which `refresh` is asked: those that are due, or all if the method does not say."""
    if not changes_within_rounds(method):
        return ()
    return range(round_steps) if method.gradual is None else method.gradual.due(round_steps)
