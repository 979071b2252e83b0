"""Selection: contests between elements or units. Each keeps exactly what its budget allows; ties break by index."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vit_rsst import shards
from vit_rsst.pruning.device_contest import keep_best

SAMPLE = 1 << 17
"""Scores that are sorted to bracket a threshold."""
NOT_A_NUMBER = "pruning.criterion: a score is not a number; the weights or the statistics have diverged."


@dataclass(frozen=True)
class Entry:
    """Competitors in a contest: the elements of one weight, or the units of one group.

    Attributes:
        name: of the weight or group.
        kind: entries of the same kind compete under the scope `isomorphic`.
        scores: float32, any shape; higher means keep.
        alive: bool, shaped like the scores; dead elements stay dead whatever their score.
        cost: of one element or unit, in units of the budget.
        least: minimum number to keep.
    """

    name: str
    kind: str
    scores: Tensor
    alive: Tensor
    cost: float = 1.0
    least: int = 0

    @property
    def size(self) -> float:
        """Total cost, including dead elements."""
        return self.cost * self.scores.numel()


def contest(entries: Sequence[Entry], budget: float, never_above: bool = False) -> list[Tensor]:
    """Keeps the best over all entries, but at least its floor of each.

    Args:
        entries: ranked together.
        budget: cost to keep, rounded to nearest, or down with `never_above`.

    Returns:
        Per entry bool, shaped like its scores.

    Raises:
        ValueError: a score is NaN; not checked on the devices where the check would synchronize, unless it is sharded.
    """
    costs = {entry.cost for entry in entries}
    if len(costs) == 1:  # round to whole elements or units once, before floors are subtracted
        [cost] = costs
        number = max(budget, 0.0) / cost
        budget = cost * (int(number + 1e-9) if never_above else round(number))
        if entries[0].scores.device.type != "cpu" or shards.is_sharded(entries[0].scores):
            _check_shards([entry.scores for entry in entries])
            least = [entry.least for entry in entries]
            return keep_best([e.scores for e in entries], [e.alive for e in entries], least, round(budget / cost))
    kept: dict[int, Tensor] = {}
    while True:
        open = [i for i in range(len(entries)) if i not in kept]
        left = budget - sum(entries[i].cost * int(kept[i].count_nonzero()) for i in kept)
        found = dict(zip(open, _best([entries[i] for i in open], left, never_above), strict=True))
        living = {i: int(entries[i].alive.count_nonzero()) for i in open}
        short = [i for i in open if int(found[i].count_nonzero()) < min(entries[i].least, living[i])]
        if not short:
            return [kept[i] if i in kept else found[i] for i in range(len(entries))]
        for i in short:  # keep its best, and let the others share the rest
            kept[i] = _keep_k([entries[i]], entries[i].least)[0]


def _check_shards(scores: Sequence[Tensor]) -> None:
    """Refuses a NaN in a shard, on every rank; collective."""
    if shards.is_sharded(scores[0]):
        found = torch.stack([shards.local(score).isnan().sum() for score in scores]).sum()
        if shards.total(found, scores[0]):
            raise ValueError(NOT_A_NUMBER)


def spread(total: float, shares: Sequence[float], caps: Sequence[float]) -> list[float]:
    """Divides `total` in proportion to `shares` with no part above its cap; the excess of capped parts goes to the
    others. If `total` exceeds the sum of caps, all parts are at their caps."""
    parts = [0.0] * len(shares)
    open = [i for i, share in enumerate(shares) if share > 0]
    while open:
        scale = (total - sum(parts)) / sum(shares[i] for i in open)
        full = [i for i in open if scale * shares[i] >= caps[i]]
        for i in full or open:
            parts[i] = caps[i] if full else scale * shares[i]
        if not full:
            break
        open = [i for i in open if i not in full]
    return parts


def keep_n_of_m(scores: Tensor, alive: Tensor, n: int, m: int) -> Tensor:
    """The best `n` of every `m` consecutive inputs.

    Args:
        scores: (out, in, …) of a Linear or Conv weight; `m` divides `in`.
        alive: bool, same shape; sets with fewer than `n` alive keep all of those.
    """
    if shards.is_sharded(scores):  # rows are divided, inputs are not
        return shards.like(keep_n_of_m(shards.local(scores), shards.local(alive), n, m), scores)
    ranked = scores.float().masked_fill(~alive, -torch.inf).movedim(1, -1)  # (out, …, in)
    sets = ranked.reshape(-1, m)
    best = sets.argsort(dim=1, descending=True, stable=True)[:, :n]
    mask = torch.zeros_like(sets, dtype=torch.bool).scatter_(1, best, True)
    return (mask.view(ranked.shape).movedim(-1, 1) & alive).contiguous()


def _best(entries: Sequence[Entry], budget: float, never_above: bool) -> list[Tensor]:
    if not entries:
        return []
    costs = {entry.cost for entry in entries}
    if len(costs) > 1:
        return _keep_affordable(entries, budget, never_above)
    number = max(budget, 0.0) / costs.pop()
    return _keep_k(entries, int(number + 1e-9) if never_above else round(number))


def _keep_k(entries: Sequence[Entry], k: int) -> list[Tensor]:
    """Keeps the k largest scores; ties at the k-th largest are kept in index order."""
    k = min(k, sum(int(entry.alive.count_nonzero()) for entry in entries))
    if k <= 0:
        return [torch.zeros_like(entry.alive) for entry in entries]
    threshold = _kth_largest(entries, k)
    kept = [((entry.scores > threshold) & entry.alive).contiguous() for entry in entries]
    missing = k - sum(int(mask.count_nonzero()) for mask in kept)
    for entry, mask in zip(entries, kept, strict=True):
        if missing == 0:
            break
        ties = ((entry.scores == threshold) & entry.alive).flatten().nonzero().flatten()[:missing]
        mask.view(-1)[ties] = True
        missing -= len(ties)
    return kept


def _kth_largest(entries: Sequence[Entry], k: int) -> float:
    """The k-th largest score among alive elements.

    A sample brackets it, so that one pass over the entries leaves a few per cent of the scores to be partitioned.
    """
    scores = [entry.scores.detach().cpu().numpy().reshape(-1) for entry in entries]
    alive = [entry.alive.cpu().numpy().reshape(-1) for entry in entries]
    low, high = _bracket(scores, alive, k)
    while True:
        above, between = 0, []
        for values, living in zip(scores, alive, strict=True):
            if np.isnan(values).any() and np.isnan(values[living]).any():
                raise ValueError(NOT_A_NUMBER)
            is_above = values > high
            above += np.count_nonzero(is_above & living)
            between.append(values[(values >= low) & ~is_above & living])
        left = np.concatenate(between)
        if above < k <= above + left.size:
            place = left.size - (k - above)
            left.partition(place)
            return float(left[place])
        low, high = -np.inf, np.inf  # the sample was not like the rest


def _bracket(scores: Sequence[np.ndarray], alive: Sequence[np.ndarray], k: int) -> tuple[float, float]:
    """Scores that very likely lie on both sides of the k-th largest, from a sample of all entries."""
    step = sum(map(len, scores)) // SAMPLE | 1  # odd: rows are of even length
    sample = np.sort(np.concatenate([v[::step][living[::step]] for v, living in zip(scores, alive, strict=True)]))
    place = len(sample) * (1 - k / sum(map(np.count_nonzero, alive)))
    below, above = place - 4 * len(sample) ** 0.5, place + 4 * len(sample) ** 0.5  # 8 standard deviations at least
    low = sample[int(below)] if below > 0 else -np.inf
    return low, sample[int(above)] if above < len(sample) else np.inf


def _keep_affordable(entries: Sequence[Entry], budget: float, never_above: bool) -> list[Tensor]:
    """For units of different costs: the longest prefix of the ranking that the budget allows."""
    flat = _flat(entries)
    costs = np.repeat([entry.cost for entry in entries], [entry.scores.numel() for entry in entries])
    order = np.argsort(-flat, kind="stable")
    order = order[flat[order] > -np.inf]
    spent = np.cumsum(costs[order])
    slack = 1e-9 * max(budget, 1.0) if never_above else costs[order] / 2
    kept = np.zeros(flat.size, dtype=bool)
    kept[order[spent <= budget + slack]] = True
    parts = np.split(kept, np.cumsum([entry.scores.numel() for entry in entries])[:-1])
    return [
        torch.from_numpy(part).view(entry.alive.shape).to(entry.alive.device)
        for part, entry in zip(parts, entries, strict=True)
    ]


def _flat(entries: Sequence[Entry]) -> np.ndarray:
    """All scores in one array, −∞ for dead elements."""
    flat = np.empty(sum(entry.scores.numel() for entry in entries), dtype=np.float32)
    start = 0
    for entry in entries:
        end = start + entry.scores.numel()
        np.copyto(flat[start:end], entry.scores.detach().cpu().numpy().reshape(-1))
        flat[start:end][~entry.alive.cpu().numpy().reshape(-1)] = -np.inf
        if np.isnan(flat[start:end]).any():
            raise ValueError(NOT_A_NUMBER)
        start = end
    return flat
