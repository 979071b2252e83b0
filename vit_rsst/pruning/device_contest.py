"""A contest on the scores' device: two histogram passes, without copying all scores and without synchronizing.

Scores may be sharded: histograms are summed over ranks, and of tied scores the earlier rows, on whichever rank, win.

It keeps exactly what `contest` keeps. `contest` settles floors in successive contests; here the best of each entry up
to its floor are set aside at once, and the others compete for the rest. The result is the same: an entry keeps
max(floor, its elements above one common threshold).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vit_rsst import shards

BINS = 1 << 16


def keep_best(scores: Sequence[Tensor], alive: Sequence[Tensor], least: Sequence[int], k: int) -> list[Tensor]:
    """The best `k` alive elements over all entries, but at least its floor of each; ties break by index. Collective if
    scores are sharded.

    Args:
        scores: per entry float32 of any shape, without NaN.
        alive: bool, likewise.
        least: per entry the minimum to keep, capped at its alive elements.

    Returns:
        Per entry bool, shaped and sharded like its scores.
    """
    own, own_alive = shards.locals_of(scores), shards.locals_of(alive)

    def keys() -> Iterator[Tensor]:  # recomputed in each pass, so that one entry's are in memory at a time
        return (_keys(*entry) for entry in zip(own, own_alive, strict=True))

    def summed(counts: list[Tensor]) -> Tensor:
        return shards.total(torch.stack(counts), scores[0])

    upper = summed([_counts(_upper(key)) for key in keys()])  # (entries, bins)
    upper[:, 0] = 0  # the dead
    living = upper.sum(1)
    floors = torch.stack([living[i].clamp(max=number) for i, number in enumerate(least)])
    k_left = (living.sum().clamp(max=k) - floors.sum()).clamp(min=0)

    # Where the floor of each entry ends: the bin of upper halves, the bin of lower halves, and the ties taken from it.
    floor_upper, above = _reach(upper, floors)
    lower = summed([_counts(_lower(key), _upper(key) == floor_upper[i]) for i, key in enumerate(keys())])
    floor_lower, above_lower = _reach(lower, floors - above)
    floor_ties = floors - above - above_lower

    # The rest: elements below the floors.
    others = _below(upper, floor_upper, floors - above)
    common_upper, above = _reach(others.sum(0, keepdim=True), k_left[None])
    lower = summed([_counts(_lower(key), _upper(key) == common_upper) for key in keys()])
    in_floor_bin = (common_upper == floor_upper)[:, None]
    others = torch.where(in_floor_bin, _below(lower, floor_lower, floor_ties), lower)
    others = torch.where((common_upper > floor_upper)[:, None], 0, others)
    common_lower, above_lower = _reach(others.sum(0, keepdim=True), k_left[None] - above)
    ties_left = k_left - above - above_lower
    ties = others.gather(1, common_lower.expand(len(scores))[:, None])[:, 0]
    taken = (ties_left - (ties.cumsum(0) - ties)).clamp(min=0).minimum(ties)

    floor, common = _joined(floor_upper, floor_lower), _joined(common_upper, common_lower)
    threshold = torch.minimum(floor, common)
    number = torch.where(floor <= common, floor_ties, 0) + torch.where(common <= floor, taken, 0)
    if shards.is_sharded(scores[0]):  # earlier rows on other ranks take theirs first
        number -= shards.before(torch.stack([(key == threshold[i]).sum() for i, key in enumerate(keys())]), scores[0])
    found = []
    for i, (key, shaped) in enumerate(zip(keys(), scores, strict=True)):
        is_tie = key == threshold[i]
        kept = (key > threshold[i]) | (is_tie & (is_tie.cumsum(0, dtype=torch.int32) <= number[i]))
        found.append(shards.like(kept.view(own[i].shape), shaped))
    return found


def _keys(scores: Tensor, alive: Tensor) -> Tensor:
    """int32 in the order of the scores, −0 equal to +0; dead elements rank lowest."""
    bits = (scores.detach().float().flatten() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.masked_fill_(~alive.flatten(), -(2**31))


def _upper(keys: Tensor) -> Tensor:
    return (keys >> 16) + BINS // 2


def _lower(keys: Tensor) -> Tensor:
    return keys & (BINS - 1)


def _joined(upper: Tensor, lower: Tensor) -> Tensor:
    return ((upper - BINS // 2) << 16) | lower


def _counts(bins: Tensor, counted: Tensor | None = None) -> Tensor:
    """Count per bin, int64 (bins,); `bincount` would synchronize with a GPU."""
    ones = torch.ones((), dtype=torch.int64, device=bins.device).expand(bins.shape)
    return torch.zeros(BINS, dtype=torch.int64, device=bins.device).scatter_add_(
        0, bins.long(), ones if counted is None else counted.long()
    )


def _reach(counts: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the bin of the `number`-th largest, and the count above that bin."""
    from_top = counts.flip(1).cumsum(1).flip(1)
    place = (from_top >= number[:, None]).sum(1) - 1
    here = place[:, None]
    return place, (from_top.gather(1, here) - counts.gather(1, here))[:, 0]


def _below(counts: Tensor, place: Tensor, taken: Tensor) -> Tensor:
    """A histogram without everything above bin `place` and without `taken` elements of that bin."""
    bins = torch.arange(BINS, device=counts.device)
    there = torch.where(bins == place[:, None], counts - taken[:, None], 0)
    return torch.where(bins < place[:, None], counts, there)
