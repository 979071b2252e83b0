"""Allocation: which entries compete for which budget, and the minimum that every layer keeps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from vit_rsst.errors import InputError
from vit_rsst.pruning.contest import Entry, contest, spread
from vit_rsst.pruning.plan import Density


@dataclass(frozen=True)
class Allocation:
    """How a density is divided among weights or unit groups.

    Attributes:
        scope: `global` ranks everything together; `isomorphic` ranks each kind separately, at the same density as far
            as the floors allow (Fang et al. 2024); `layer` gives every layer the same density; `erk` makes the density
            of a weight proportional to the sum of its dimensions over their product (Evci et al. 2020).
        depth_ramp: scope `layer`: sparsity of the first and last block relative to the mean; linear in between.
        layer_sparsity: glob of weight or group names → their own final sparsity; the other layers compensate.
        final_density: density at the end of the schedule, to which `layer_sparsity` refers.
        never_above: round down to the budget instead of to nearest.
    """

    scope: str = "global"
    depth_ramp: tuple[float, float] | None = None
    layer_sparsity: Mapping[str, float] = field(default_factory=dict)
    final_density: Density = 0.1
    never_above: bool = False

    def keep(self, entries: Sequence[Entry], depths: Sequence[int], density: Density) -> dict[str, Tensor]:
        """What to keep, by entry name.

        Args:
            entries: all weights or all unit groups.
            depths: block index of each entry.
            density: fraction of the total cost to keep, overall or by kind.
        """
        kept: dict[str, Tensor] = {}
        for part, budget in self._contests(entries, depths, density):
            kept |= dict(zip((e.name for e in part), contest(part, budget, self.never_above), strict=True))
        return {entry.name: kept[entry.name] for entry in entries}

    def check(self, entries: Sequence[Entry]) -> None:
        """Checks that the final density is reachable above the floors.

        Raises:
            InputError: it is not, with the highest reachable sparsity; or a glob matches nothing.
        """
        for glob in self.layer_sparsity:
            if not any(fnmatchcase(entry.name, glob) for entry in entries):
                names = ", ".join(entry.name for entry in entries[:4])
                raise InputError(f"pruning.layer_sparsity: {glob!r} matches no layer; this model has {names} ….")
        for part, density in by_kind(entries, self.final_density):
            total = sum(entry.size for entry in part)
            own = {entry.name: self._own_sparsity(entry, density) for entry in part}
            highest = (
                1.0
                - sum(e.least * e.cost if own[e.name] is None else (1.0 - own[e.name]) * e.size for e in part) / total
            )
            if 1.0 - density > highest + 1e-9:
                what = f" of the units of kind {part[0].kind!r}" if isinstance(self.final_density, Mapping) else ""
                raise InputError(
                    f"pruning.schedule: a sparsity of {1.0 - density:.4g}{what} cannot be reached, at most "
                    f"{math.floor(highest * 1e4) / 1e4:.4g}: every block keeps a head and pruning.min_neurons neurons, "
                    "and every layer its own minimum. Lower the sparsity or these limits."
                )

    def _contests(
        self, entries: Sequence[Entry], depths: Sequence[int], density: Density
    ) -> Iterator[tuple[list[Entry], float]]:
        depth_of = {entry.name: depth for entry, depth in zip(entries, depths, strict=True)}
        for part, share in by_kind(entries, density):
            left, open = share * sum(entry.size for entry in part), []
            for entry in part:
                own = self._own_sparsity(entry, share)
                if own is None:
                    open.append(entry)
                else:
                    left -= (1.0 - own) * entry.size
                    yield [entry], (1.0 - own) * entry.size
            if not open:
                continue
            if self.scope in ("layer", "erk"):
                for entry, budget in zip(open, self._budgets(open, depth_of, left), strict=True):
                    yield [entry], budget
            elif self.scope == "isomorphic":
                likes = [[e for e in open if e.kind == kind] for kind in dict.fromkeys(e.kind for e in open)]
                sizes = [sum(entry.size for entry in like) for like in likes]
                caps = [sum(entry.size - entry.least * entry.cost for entry in like) for like in likes]
                removed = spread(sum(sizes) - left, sizes, caps)
                yield from zip(likes, (size - gone for size, gone in zip(sizes, removed, strict=True)), strict=True)
            else:
                yield open, left

    def _own_sparsity(self, entry: Entry, density: float) -> float | None:
        """Sparsity of a layer matched by a glob, scaled to the progress of the schedule."""
        for glob, sparsity in self.layer_sparsity.items():
            if fnmatchcase(entry.name, glob):
                final = 1.0 - mean_density(self.final_density, [entry])
                return sparsity * min((1.0 - density) / final, 1.0) if final else 0.0
        return None

    def _budgets(self, entries: list[Entry], depth_of: Mapping[str, int], kept: float) -> list[float]:
        """Budget of each layer."""
        sizes = [entry.size for entry in entries]
        if self.scope == "erk":
            return spread(kept, [sum(entry.scores.shape) for entry in entries], sizes)
        removed = sum(sizes) - kept
        first, last = self.depth_ramp or (1.0, 1.0)
        deepest = max(depth_of.values()) or 1
        factors = [first + (last - first) * depth_of[entry.name] / deepest for entry in entries]
        caps = [size - entry.least * entry.cost for size, entry in zip(sizes, entries, strict=True)]
        shares = [factor * size for factor, size in zip(factors, sizes, strict=True)]
        return [size - gone for size, gone in zip(sizes, spread(removed, shares, caps), strict=True)]


def by_kind(entries: Sequence[Entry], density: Density) -> list[tuple[list[Entry], float]]:
    """Entries grouped by density."""
    if not isinstance(density, Mapping):
        return [(list(entries), density)]
    return [([entry for entry in entries if entry.kind == kind], share) for kind, share in density.items()]


def mean_density(density: Density, entries: Sequence[Entry]) -> float:
    """Overall density of densities by kind, weighted by cost."""
    if not isinstance(density, Mapping):
        return density
    return sum(density[entry.kind] * entry.size for entry in entries) / sum(entry.size for entry in entries)
