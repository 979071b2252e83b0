"""Selector: from evidence to a mask, at the recipe's granularity. Pure: tensors in, MaskSet out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vit_rsst import shards
from vit_rsst.pruning.allocation import Allocation, mean_density
from vit_rsst.pruning.contest import Entry, contest, keep_n_of_m
from vit_rsst.pruning.criteria import CRITERIA, Criterion, Evidence
from vit_rsst.pruning.granularity import alive_units, expand, pool, unit_size
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.patterns import pattern
from vit_rsst.pruning.plan import Density
from vit_rsst.pruning.units import UnitGroup, depths


@dataclass(frozen=True)
class Floors:
    """What every group keeps: at least one unit, or `min_neurons` neurons, and the fraction that `max_layer_sparsity`
    leaves."""

    min_neurons: int = 8
    max_layer_sparsity: float = 1.0

    def least(self, kind: str, number: int) -> int:
        """Minimum of `number` elements or units to keep."""
        share = -int(-(1.0 - self.max_layer_sparsity) * number // 1)  # rounded up
        floor = {"head": 1, "channel": 1, "neuron": self.min_neurons}.get(kind, 0)
        return min(max(share, floor), number)


@dataclass(frozen=True)
class Selector:
    """Selects what to keep.

    Attributes:
        granularity: element, N:M, or the kinds of `groups`.
        groups: unit groups of a structured granularity; empty for element and N:M.
        costs: per group the cost of one unit, in units of the budget; empty: its number of elements.
    """

    criterion: Criterion
    granularity: str = "element"
    groups: Sequence[UnitGroup] = ()
    allocation: Allocation = field(default_factory=Allocation)
    floors: Floors = field(default_factory=Floors)
    costs: Mapping[str, float] = field(default_factory=dict)

    def units(self, evidence: Evidence, density: Density) -> MaskSet:
        """The best alive units.

        Args:
            density: fraction of the prunable weights to keep, 0 … 1, overall or by kind.
        """
        n_of_m = pattern(self.granularity)
        if n_of_m is not None:
            return self._n_of_m(evidence, density, *n_of_m)
        if not self.groups:
            return self._elements(evidence, density, self.criterion, self.allocation)
        entries = self._unit_entries(evidence, density)
        kept = self.allocation.keep(entries, [group.depth for group in self.groups], density)
        return expand(self.groups, list(kept.values()), evidence.alive.masks) & evidence.alive

    def elements(self, evidence: Evidence, density: Density) -> MaskSet:
        """The best alive elements; for structured granularities those of largest magnitude, as plain imp would
        keep."""
        if not self.groups:
            return self.units(evidence, density)
        overall = self.mean_density(evidence.weights, density)
        return self._elements(evidence, overall, CRITERIA["magnitude"], Allocation())

    def fill(self, evidence: Evidence, elements: MaskSet, ratio: float) -> MaskSet:
        """The best whole units of each group, as many as its alive elements pay for; their dead elements are refilled.

        Args:
            elements: an element mask, whose alive weights are the budget.
            ratio: fraction of the units beyond the budget to keep as well.
        """
        evidence = replace(evidence, survivors=elements)
        kept = []
        for group in self.groups:
            size = unit_size(group, evidence.weights)
            paid = float(pool(group, elements.masks).sum())  # Σ of alive fractions over units: n_full in the paper
            number = int(paid + ratio * (group.units - paid) + 1e-6)
            least = self.floors.least(group.kind, group.units)
            alive = alive_units(group, evidence.alive).cpu()
            entry = Entry(group.name, group.kind, self._scores(evidence, group), alive, size, least)
            kept += contest([entry], number * size)
        return expand(self.groups, kept, evidence.alive.masks)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Rejects unreachable densities; see `Allocation.check`."""
        if pattern(self.granularity) is None:
            self.allocation.check(self._all_alive(weights))

    def mean_density(self, weights: Mapping[str, Tensor], density: Density) -> float:
        """Overall density of a density by kind."""
        if not isinstance(density, Mapping):
            return density
        return mean_density(density, self._all_alive(weights))

    def alive_cost(self, weights: Mapping[str, Tensor], alive: MaskSet, kind: str = "") -> tuple[float, float]:
        """Cost of the units that are alive, and of all; of one kind if it is named."""
        groups = [group for group in self.groups if kind in ("", group.kind)]
        costs = [self.costs.get(group.name, unit_size(group, weights)) for group in groups]
        there = sum(c * int(alive_units(g, alive).sum()) for c, g in zip(costs, groups, strict=True))
        return there, sum(c * g.units for c, g in zip(costs, groups, strict=True))

    # -- entries of contests

    def _unit_entries(self, evidence: Evidence, density: Density) -> list[Entry]:
        if self.criterion.needs == "survivors" and evidence.survivors is None:
            evidence = replace(evidence, survivors=self.elements(evidence, density))
        return [
            self._entry(
                group, evidence.weights, self._scores(evidence, group), alive_units(group, evidence.alive).cpu()
            )
            for group in self.groups
        ]

    def _entry(self, group: UnitGroup, weights: Mapping[str, Tensor], scores: Tensor, alive: Tensor) -> Entry:
        cost = self.costs.get(group.name, unit_size(group, weights))
        return Entry(group.name, group.kind, scores, alive, cost, self.floors.least(group.kind, group.units))

    def _all_alive(self, weights: Mapping[str, Tensor]) -> list[Entry]:
        """Entries before any removal, without scores; `weights` may be on `meta`."""
        if not self.groups:
            return self._weight_entries(weights, weights, MaskSet.full(weights))
        ones = {group.name: torch.ones(group.units, dtype=torch.bool) for group in self.groups}
        return [self._entry(group, weights, ones[group.name], ones[group.name]) for group in self.groups]

    def _scores(self, evidence: Evidence, group: UnitGroup) -> Tensor:
        criterion = self.criterion
        if criterion.units is not None:
            scores = criterion.units(evidence, group)
        else:
            owned = {member.name: evidence.weights[member.name] for member in group.members}
            scores = pool(group, criterion.of_elements(replace(evidence, weights=owned)))
        scores = shards.same(scores.float().cpu(), evidence.weights[group.members[0].name])
        return _relative(scores) if criterion.relative != "nothing" else scores

    def _weight_entries(
        self, weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], alive: MaskSet
    ) -> list[Entry]:
        """One entry per weight, whose elements compete; the kind is the layer's name, such as qkv or fc1."""
        return [
            Entry(
                name,
                name.removesuffix(".weight").rsplit(".", 1)[-1],
                scores[name].float(),
                alive[name],
                least=self.floors.least("element", weight.numel()),
            )
            for name, weight in weights.items()
        ]

    def _elements(self, evidence: Evidence, density: float, criterion: Criterion, allocation: Allocation) -> MaskSet:
        scores = criterion.of_elements(evidence)
        if criterion.relative == "all":
            scores = {name: _relative(score) for name, score in scores.items()}
        entries = self._weight_entries(evidence.weights, scores, evidence.alive)
        return MaskSet(allocation.keep(entries, depths(evidence.weights), density))

    def _n_of_m(self, evidence: Evidence, density: float, n: int, m: int) -> MaskSet:
        """N:M: keeps the same number of every M inputs; the schedule lowers it step by step to N."""
        kept = max(n, round(density * m))
        scores = self.criterion.of_elements(evidence)
        return MaskSet({name: keep_n_of_m(scores[name], evidence.alive[name], kept, m) for name in evidence.weights})


def check_numbers(scores: Mapping[str, Tensor]) -> None:
    """Checks that scores can be ranked.

    Raises:
        ValueError: a score is NaN.
    """
    for name, values in scores.items():
        if bool(values.isnan().any()):
            raise ValueError(f"pruning.criterion: a score of {name} is not a number; the statistics have diverged.")


def _relative(scores: Tensor) -> Tensor:
    """Scores divided by their mean, so that layers of different scale can compete."""
    return scores / shards.whole(scores).mean().clamp_min(torch.finfo(torch.float32).tiny)
