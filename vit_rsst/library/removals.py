"""Removals from a trained model: one or several, each from the weights it came with, all from one calibration."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from vit_rsst.assembly.pruning import build_selection
from vit_rsst.errors import InputError
from vit_rsst.library.batches import Batches, forward_of, pairs
from vit_rsst.library.target import Target
from vit_rsst.models.complexity import evaluating, size_of
from vit_rsst.pruning.criteria import OF_IMAGES
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.oneshot import OneShot, evidence_of, remove_
from vit_rsst.pruning.plan import Density
from vit_rsst.pruning.selector import Selector
from vit_rsst.recipe.calls import pruning_section
from vit_rsst.recipe.schema import Pruning


def removal_section(call: str, words: Mapping[str, Any], names: Mapping[str, str]) -> Pruning:
    """The checked section `pruning` of one removal; see `pruning_section` for the arguments.

    Raises:
        InputError: one sentence for each problem.
    """
    return pruning_section(call, {"method": "imp", "rounds": 1, **words}, {}, names)


@dataclass(frozen=True)
class Removals:
    """What is about to leave a model, checked before anything is computed.

    Attributes:
        target: the model and what is pruned of it.
        goals: by removal, what chooses and the density to leave.
        alive: what is there to remove.
        compensates: whether what stays is fitted.
    """

    target: Target
    goals: Sequence[tuple[Selector, Density]]
    alive: MaskSet
    compensates: bool

    @classmethod
    def of(
        cls, model: Any, sections: Sequence[Pruning], calibration: Batches | None, alive: MaskSet | None = None
    ) -> "Removals":
        """
        Args:
            sections: they differ in the schedule alone.
            alive: of weights by name; those it does not name are whole. None: all are.

        Raises:
            InputError: see `Target.of`; or the model is as sparse as it would become.
        """
        target = Target.of(model, sections[0], calibration)
        net, weights, groups = target.net, target.weights, target.groups
        mask = MaskSet.full(weights)
        if alive is not None:
            mask = MaskSet({n: alive[n].to(w.device) if n in alive.masks else mask[n] for n, w in weights.items()})
        goals = []
        for section in sections:
            selector, density = build_selection(section, net, weights, groups, size_of(net))
            _check_leaves(selector, weights, mask, density(1.0))
            goals.append((selector, density(1.0)))
        return cls(target, goals, mask, sections[0].compensate is not None)

    def each_(self, calibration: Batches | None, seed: int = 0) -> Iterator[OneShot]:
        """Removes in place; between one result and the next the model gets its weights back. Collective.

        Args:
            calibration: read once if only the criterion or only the fit of one removal needs it, else kept in memory.
            seed: of the criterion random.

        Raises:
            InputError: there are no calibration images, or inputs of a layer cannot be recorded.
        """
        net, start = self.target.net, perf_counter()
        forward, criterion = forward_of(net), self.goals[0][0].criterion
        batches = () if calibration is None else pairs(calibration, self.target.device)
        if self.compensates and (criterion.needs in OF_IMAGES or len(self.goals) > 1):
            batches = list(batches)
        before = [(p, p.detach().clone()) for p in net.parameters()] if len(self.goals) > 1 else []
        with evaluating(net):
            evidence = evidence_of(
                net, self.target.weights, self.goals[0][0], batches, alive=self.alive, forward=forward, seed=seed
            )
        calibrated = perf_counter()
        for number, (selector, density) in enumerate(self.goals):
            with torch.no_grad():
                for parameter, values in before if number else ():
                    parameter.copy_(values)
            began = perf_counter()
            with evaluating(net):
                found = remove_(
                    net, selector, density, evidence, batches, forward=forward, compensates=self.compensates
                )
            yield replace(found, seconds={"calibration": calibrated - start, "removal": perf_counter() - began})


def _check_leaves(selector: Selector, weights: Mapping[str, torch.Tensor], alive: MaskSet, density: Density) -> None:
    """
    Raises:
        InputError: nothing would be removed.
    """
    if alive.is_full:
        return
    parts = [("", alive.num_alive, alive.num_elements)]
    if selector.groups:
        kinds = dict.fromkeys(group.kind for group in selector.groups) if isinstance(density, Mapping) else ("",)
        parts = [(kind, *selector.alive_cost(weights, alive, kind)) for kind in kinds]
    asked = {kind: density[kind] if isinstance(density, Mapping) else density for kind, _, _ in parts}
    if all(round(there) <= round(asked[kind] * total) for kind, there, total in parts):
        there, total = (sum(part[place] for part in parts) for place in (1, 2))
        raise InputError(
            f"pruning.schedule.final_sparsity: {1 - selector.mean_density(weights, density):.4g} would remove nothing: "
            f"the model has a sparsity of {1 - there / total:.4g} already; ask for more than that."
        )
