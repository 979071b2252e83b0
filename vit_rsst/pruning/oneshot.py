"""One removal from a trained network: evidence is taken, the selector chooses, the rest becomes zero. No training.

This is what a round of a run does at its removal, for callers that have weights and perhaps calibration images, but
neither recipe nor trainer.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vit_rsst.pruning.agreement import agreed, fingerprints
from vit_rsst.pruning.calibration import collect
from vit_rsst.pruning.compensation import Compensation, compensate_
from vit_rsst.pruning.criteria import OF_IMAGES, Evidence
from vit_rsst.pruning.granularity import units_left
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.plan import Density
from vit_rsst.pruning.selector import Selector


@dataclass(frozen=True)
class OneShot:
    """What a removal left.

    Attributes:
        mask: the elements that stay.
        density_asked: requested; `density` is that of the mask.
        units: per unit group: kind, units, alive units; empty without units.
        compensation: what was fitted, and how well; None: what stays kept its values.
        seconds: of `calibration`, which serves all densities, and of this `removal` with its fit.
    """

    mask: MaskSet
    density_asked: float
    units: dict[str, dict[str, str | int]]
    compensation: Compensation | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def density(self) -> float:
        return self.mask.density

    @property
    def layers(self) -> dict[str, dict[str, float]]:
        """Per weight: elements, alive elements, density."""
        return self.mask.layers()


@torch.no_grad()
def evidence_of(
    net: nn.Module,
    weights: Mapping[str, nn.Parameter],
    selector: Selector,
    batches: Iterable[tuple[Any, Tensor]] = (),
    *,
    alive: MaskSet | None = None,
    forward: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
) -> Evidence:
    """What the criterion looks at, of weights that are not pruned yet; it serves any number of densities. Collective.

    Args:
        net: unwrapped.
        weights: the prunable parameters by name.
        batches: calibration images and labels of this rank, if the criterion needs them.
        alive: what is there to remove; None: everything.
        forward: images → logits; None: the network itself.
        seed: of the criterion `random`.

    Raises:
        InputError: the criterion needs calibration images and there are none, or cannot record its inputs.
    """
    needs, statistics = selector.criterion.needs, None
    if needs in OF_IMAGES:
        statistics = collect(net, batches, weights, selector.groups, needs, forward)
    return Evidence(weights, MaskSet.full(weights) if alive is None else alive, seed * 1_000, statistics)


@torch.no_grad()
def remove_(
    net: nn.Module,
    selector: Selector,
    density: Density,
    evidence: Evidence,
    batches: Iterable[tuple[Any, Tensor]] = (),
    *,
    forward: Callable[[Any], Tensor] | None = None,
    compensates: bool = False,
) -> OneShot:
    """Zeroes what the selector does not keep, in place. Collective.

    Args:
        net: unwrapped, with the weights of `evidence`.
        density: fraction of the prunable weights to keep, overall or by kind of unit.
        batches: calibration images and labels of this rank, if it compensates.
        forward: images → logits; None: the network itself.
        compensates: whether what stays is fitted to what the dense layers compute on the calibration images.

    Raises:
        InputError: it compensates, and there are no calibration images.
    """
    weights, compensation = evidence.weights, None
    mask = agreed(lambda: selector.units(evidence, density), evidence.alive)
    fingerprints(mask)
    if compensates:
        compensation = compensate_(net, weights, mask, batches, of_units=bool(selector.groups), forward=forward)
    else:
        for name, weight in weights.items():
            weight.masked_fill_(~mask[name], 0.0)  # +0, not −0 nor NaN · 0
    asked, units = selector.mean_density(weights, density), units_left(selector.groups, mask)
    return OneShot(mask, asked, units, compensation)
