"""Criteria: importance scores of weights and units. Scores are float32; higher means keep.

A criterion sees trained weights, before any rewind. Criteria are registered by name; a new one is a function from
`Evidence` to a score per element, decorated with `@register_criterion`. A unit's score is the mean over its elements,
unless the criterion defines one; activations are recorded at the input of the layer that consumes them (Michel et al.
2019, Molchanov et al. 2019, Sun et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vit_rsst.errors import InputError
from vit_rsst.pruning.registry import Registry
from vit_rsst.seeds import derived_seed

if TYPE_CHECKING:
    from torch import Tensor

    from vit_rsst.pruning.masks import MaskSet
    from vit_rsst.pruning.units import UnitGroup

Needs = Literal["weights", "survivors", "activations", "gradients", "moments", "movement"]
OF_IMAGES = ("activations", "gradients", "moments")
"""What takes calibration images."""


@dataclass(frozen=True)
class SiteStatistics:
    """Means over all calibration images at the input of a consumer; A is its input, L the loss of one image.

    Attributes:
        absolute: E|A|, over images, tokens and the features of a unit; (units,).
        square: E A², likewise.
        saliency: E|A · ∂L/∂A|, likewise; None without gradients.
        gate: mean over images of |Σ A · ∂L/∂A|, summed over tokens and a unit's features, which is |∂L/∂gate|.
        gram: Aᵀ A of all the consumer's input features, as in `Statistics`; None unless moments are needed.
        consumer: its weight, (out, in); likewise.
        index: columns of that weight, flattened, which read a unit: (units, span); likewise.
    """

    absolute: Tensor
    square: Tensor
    saliency: Tensor | None = None
    gate: Tensor | None = None
    gram: Tensor | None = None
    consumer: Tensor | None = None
    index: Tensor | None = None


@dataclass(frozen=True)
class Statistics:
    """Statistics over the calibration images.

    Attributes:
        absolute: per weight E|X| of its layer's input features; (in,).
        square: per weight E X², likewise.
        gradient: per weight the mean gradient of the loss of one image; shaped like the weight.
        sites: by unit group.
        gram: per weight the Gram matrix of the rows that it multiplies, centred if the layer has a bias; (in, in).
    """

    absolute: Mapping[str, Tensor] = field(default_factory=dict)
    square: Mapping[str, Tensor] = field(default_factory=dict)
    gradient: Mapping[str, Tensor] = field(default_factory=dict)
    sites: Mapping[str, SiteStatistics] = field(default_factory=dict)
    gram: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """Everything a criterion may use.

    Attributes:
        weights: trained weights by name.
        alive: the current mask.
        seed: of this selection.
        statistics: of the calibration images, for criteria that need activations or gradients.
        survivors: the mask that unstructured pruning would leave, for criteria that need it.
        movement: per weight −Σ w · g over the training steps of the round so far; None outside of training.
    """

    weights: Mapping[str, Tensor]
    alive: MaskSet
    seed: int
    statistics: Statistics | None = None
    survivors: MaskSet | None = None
    movement: Mapping[str, Tensor] | None = None


ElementScores = Callable[[Evidence], "dict[str, Tensor]"]
UnitScores = Callable[[Evidence, "UnitGroup"], "Tensor"]


@dataclass(frozen=True)
class Criterion:
    """A scoring rule.

    Attributes:
        elements: scores by weight name, shaped like the weights; None: it does not score elements.
        units: scores of a group's units, (units,); None: the mean over their elements.
        needs: what the evidence must hold.
        relative: which scores are divided by their layer mean before layers compete, as layers differ in scale:
            `nothing`, `units`, or units and elements (`all`).
    """

    elements: ElementScores | None
    units: UnitScores | None = None
    needs: Needs = "weights"
    relative: Literal["nothing", "units", "all"] = "nothing"

    @property
    def __doc__(self) -> str:
        return (self.elements or self.units).__doc__

    def of_elements(self, evidence: Evidence) -> dict[str, Tensor]:
        """Scores by weight name; for criteria that score elements."""
        assert self.elements is not None, "this criterion scores units only"
        return self.elements(evidence)


CRITERIA: Registry[Criterion] = Registry("criterion")


def register_criterion(
    name: str,
    units: UnitScores | None = None,
    needs: Needs = "weights",
    relative: Literal["nothing", "units", "all"] = "units",
) -> Callable[[ElementScores], ElementScores]:
    """Decorator for an element-score function; see `Criterion` for the arguments."""

    def add(elements: ElementScores) -> ElementScores:
        CRITERIA.register(name)(Criterion(elements, units, needs, relative))
        return elements

    return add


@register_criterion("magnitude")
def magnitude(evidence: Evidence) -> dict[str, Tensor]:
    """|w|: large trained weights are important (Han et al. 2015)."""
    return {name: weight.detach().float().abs() for name, weight in evidence.weights.items()}


def _survivors(evidence: Evidence, group: UnitGroup) -> Tensor:
    """Fraction of a unit's elements that survives a global magnitude threshold (Chen et al. 2022)."""
    from vit_rsst.pruning.granularity import pool

    return pool(group, evidence.survivors.masks)


CRITERIA.register("survivors")(Criterion(None, _survivors, needs="survivors"))


def _absolute(evidence: Evidence, group: UnitGroup) -> Tensor:
    return evidence.statistics.sites[group.name].absolute


@register_criterion("activation_l1", _absolute, "activations", "all")
def activation_l1(evidence: Evidence) -> dict[str, Tensor]:
    """Units: mean |activation| at the consumer's input. Elements: |w| times its mean |input|."""
    return _times_input(evidence, evidence.statistics.absolute)


def _root_mean_square(evidence: Evidence, group: UnitGroup) -> Tensor:
    return evidence.statistics.sites[group.name].square.sqrt()


@register_criterion("activation_l2", _root_mean_square, "activations", "all")
def activation_l2(evidence: Evidence) -> dict[str, Tensor]:
    """Units: root of the mean activation². Elements: |w| · ‖input‖ as in Wanda (Sun et al. 2024)."""
    return _times_input(evidence, {name: mean.sqrt() for name, mean in evidence.statistics.square.items()})


def _saliency(evidence: Evidence, group: UnitGroup) -> Tensor:
    site = evidence.statistics.sites[group.name]
    return site.gate if group.kind == "head" else site.saliency  # a head is one gate: Michel et al. 2019, eq. 2


@register_criterion("saliency", _saliency, "gradients", "nothing")
def saliency(evidence: Evidence) -> dict[str, Tensor]:
    """Units: mean |activation · gradient|; heads: |∂L/∂gate|. Elements: |w · mean gradient|."""
    gradient = evidence.statistics.gradient
    return {name: (weight.detach().float() * gradient[name]).abs() for name, weight in evidence.weights.items()}


def _taylor(evidence: Evidence, group: UnitGroup) -> Tensor:
    """First-order change in each image's loss if the unit is removed (Molchanov et al. 2019)."""
    return evidence.statistics.sites[group.name].gate


CRITERIA.register("taylor")(Criterion(None, _taylor, needs="gradients"))


def _obs_units(evidence: Evidence, group: UnitGroup) -> Tensor:
    from vit_rsst.pruning.second_order import inverse, unit_losses

    site = evidence.statistics.sites[group.name]
    return unit_losses(site.consumer, inverse(site.gram), site.index)


@register_criterion("obs", _obs_units, needs="moments", relative="all")
def obs(evidence: Evidence) -> dict[str, Tensor]:
    """What the layer's outputs lose, to second order, when the rest is fitted again (Frantar et al. 2022)."""
    from vit_rsst.pruning.second_order import element_losses, inverse

    grams = evidence.statistics.gram
    losses = {n: element_losses(w.detach().flatten(1), inverse(grams[n])) for n, w in evidence.weights.items()}
    return {name: losses[name].view_as(weight) for name, weight in evidence.weights.items()}


@register_criterion("movement", needs="movement", relative="nothing")
def movement(evidence: Evidence) -> dict[str, Tensor]:
    """−Σ w · gradient over the steps of the round: weights that move away from zero stay (Sanh et al. 2020)."""
    from vit_rsst.pruning.masks import MaskSet

    found = evidence.movement
    if found is None or not MaskSet({name: found[name] != 0 for name in evidence.weights}).num_alive:
        raise InputError(
            "pruning.criterion: movement adds up over training steps, and none precedes this selection; use saliency, "
            "which needs calibration images alone, or magnitude."
        )
    return {name: found[name].float() for name in evidence.weights}


def _drawn(evidence: Evidence, group: UnitGroup) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(derived_seed(evidence.seed, group.name))
    return torch.rand(group.units, generator=generator)


@register_criterion("random", _drawn, relative="nothing")
def random(evidence: Evidence) -> dict[str, Tensor]:
    """Uniform noise: the baseline that any criterion has to beat. The same on every device."""
    import torch

    from vit_rsst import shards

    generator = torch.Generator().manual_seed(evidence.seed)
    return {name: shards.placed(torch.rand(w.shape, generator=generator), w) for name, w in evidence.weights.items()}


def _times_input(evidence: Evidence, size: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from vit_rsst import shards

    scores = {}
    for name, weight in evidence.weights.items():
        seen = size[name].float().to(weight.device)
        # An output row of a grouped convolution reads the inputs of its own group; of a plain layer, all inputs.
        groups = len(seen) // weight.shape[1]
        rows = seen.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)  # (out, in / groups)
        rows = shards.part(rows.view(*rows.shape, *[1] * (weight.dim() - 2)), weight)
        scores[name] = shards.like(shards.local(weight).detach().float().abs() * rows, weight)
    return scores
