"""One removal from a trained network: scores are taken, the selector chooses, the rest becomes zero. No training.

This is what a round of a run does at its removal, for callers that have weights and perhaps calibration images, but
neither recipe nor trainer.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_rsst.pruning.agreement import agreed, fingerprints
from vit_rsst.pruning.calibration import collect
from vit_rsst.pruning.compensation import Compensation, compensate_
from vit_rsst.pruning.criteria import Evidence
from vit_rsst.pruning.granularity import units_left
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.plan import Density
from vit_rsst.pruning.selector import Selector

OF_IMAGES = ("activations", "gradients")
"""What a criterion may need that takes calibration images."""


@dataclass(frozen=True)
class OneShot:
    """What a removal left.

    Attributes:
        mask: the elements that stay.
        density_asked: requested; `density` is that of the mask.
        units: per unit group: kind, units, alive units; empty without units.
        compensation: what was fitted, and how well; None: what stays kept its values.
    """

    mask: MaskSet
    density_asked: float
    units: dict[str, dict[str, str | int]]
    compensation: Compensation | None = None

    @property
    def density(self) -> float:
        return self.mask.density

    @property
    def layers(self) -> dict[str, dict[str, float]]:
        """Per weight: elements, alive elements, density."""
        return self.mask.layers()


@torch.no_grad()
def prune_once_(
    net: nn.Module,
    weights: Mapping[str, nn.Parameter],
    selector: Selector,
    density: Density,
    batches: Iterable[tuple[Any, Tensor]] = (),
    *,
    forward: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    compensates: bool = False,
) -> OneShot:
    """Zeroes what the selector does not keep, in place. Collective.

    Args:
        net: unwrapped.
        weights: the prunable parameters by name.
        density: fraction of the prunable weights to keep, overall or by kind of unit.
        batches: calibration images and labels of this rank, if the criterion needs them.
        forward: images → logits; None: the network itself.
        seed: of the criterion `random`.
        compensates: whether what stays is fitted to what the dense layers compute on the calibration images.

    Raises:
        InputError: the criterion or the compensation needs calibration images and there are none, or cannot record its
            inputs.
    """
    needs, full = selector.criterion.needs, MaskSet.full(weights)
    statistics, compensation = None, None
    if compensates:
        batches = list(batches)  # read twice
    if needs in OF_IMAGES:
        statistics = collect(net, batches, weights, selector.groups, needs == "gradients", forward)
    evidence = Evidence(weights, full, seed * 1_000, statistics)
    mask = agreed(lambda: selector.units(evidence, density), full)
    fingerprints(mask)
    if compensates:
        compensation = compensate_(net, weights, mask, batches, of_units=bool(selector.groups), forward=forward)
    else:
        for name, weight in weights.items():
            weight.masked_fill_(~mask[name], 0.0)  # +0, not −0 nor NaN · 0
    asked, units = selector.mean_density(weights, density), units_left(selector.groups, mask)
    return OneShot(mask, asked, units, compensation)
