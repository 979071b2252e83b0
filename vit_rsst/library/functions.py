"""Functions for trained models: prune once, cut out what is gone, load, save, analyse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vit_rsst.analysis.counts import count
from vit_rsst.analysis.subject import Subject
from vit_rsst.analysis.tables import analysis_text
from vit_rsst.errors import OF_A_LIBRARY, InputError, first_line
from vit_rsst.library.batches import Batches
from vit_rsst.library.removals import Removals, removal_section
from vit_rsst.library.target import CALIBRATION, unwrapped
from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_weights, unit_groups
from vit_rsst.models.complexity import size_of
from vit_rsst.models.observation import check_units
from vit_rsst.models.slim import SlimForm, copy_of
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.oneshot import OneShot
from vit_rsst.pruning.patterns import pattern
from vit_rsst.recipe.calls import in_words_of

IN_PRUNE = CALIBRATION | {
    "pruning.schedule": "sparsity",
    "pruning.schedule.final_sparsity": "sparsity",
    "pruning.schedule.budget": "budget",
    "model": "model",
}
"""Recipe field → keyword of `prune`, where they differ."""


def prune(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    budget: Mapping[str, float] | None = None,
    granularity: str = "element",
    criterion: str = "magnitude",
    scope: str | None = None,
    depth_ramp: Sequence[float] | None = None,
    layer_sparsity: Mapping[str, float] | None = None,
    max_layer_sparsity: float | None = None,
    min_neurons: int | None = None,
    include: Sequence[str] = (),
    protect: Sequence[str] = (),
    compensate: str = "none",
    calibration: Batches | None = None,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> OneShot:
    """Prunes a trained model once, in place: what scores lowest becomes zero.

    Args:
        model: any model with Linear or Conv layers; wrappers of DDP and torch.compile are looked through.
        sparsity: fraction of the prunable weights to remove, 0 < s < 1; or per kind of unit,
            `{"head": 0.5, "neuron": 0.7}`. An N:M granularity implies it.
        budget: instead of a sparsity, the share of FLOPs or parameters left in the slim model, `{"flops": 0.5}`.
        granularity: element, head, neuron, head+neuron, channel or N:M such as 2:4.
        criterion: magnitude, activation_l1, activation_l2, saliency, obs, survivors, taylor or random.
        scope, depth_ramp, layer_sparsity, max_layer_sparsity, min_neurons: as in a recipe's section `pruning`.
        include: globs of weights to prune beside those of the default.
        protect: globs of weights never to prune.
        compensate: none, or least_squares: the weights that stay in a layer are fitted to what it computed before, on
            the calibration inputs. All of these are in memory at one layer at a time; a few hundred images suffice.
        calibration: a loader of (inputs, labels), or a callable that returns one; for compensation, and for criteria
            that need activations or gradients.
        masks: of a model that is sparse already, weight name → bool, True is alive; the dead stay dead.
        seed: of the criterion random.

    Returns:
        The mask and its density, overall and by layer, the units left, and how well each layer was compensated.

    Raises:
        InputError: a keyword is wrong, nothing can be pruned, or the sparsity cannot be reached.
    """
    if sparsity is None and budget is None and pattern(granularity) is None:
        raise InputError("prune(sparsity=…): missing; set it, such as 0.5, or a budget, such as {'flops': 0.5}.")
    words: dict[str, Any] = {
        "final_sparsity": sparsity,
        "budget": budget,
        "granularity": granularity,
        "criterion": criterion,
        "scope": scope,
        "depth_ramp": depth_ramp,
        "layer_sparsity": layer_sparsity,
        "max_layer_sparsity": max_layer_sparsity,
        "min_neurons": min_neurons,
        "compensate": compensate,
        "include": include,
        "protect": protect,
    }
    section = removal_section("prune", words, IN_PRUNE)
    with in_words_of("prune", IN_PRUNE):
        alive = None if masks is None else MaskSet(masks)
        [found] = Removals.of(model, [section], calibration, alive).each_(calibration, seed)
    return found


@dataclass(frozen=True)
class SlimReport:
    """What `slim` cut out.

    Attributes:
        units: group → (kind, units before, units left), of the groups that lost some.
        parameters: before and after.
    """

    units: dict[str, tuple[str, int, int]]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        before, after = self.parameters
        kinds = dict.fromkeys(kind for kind, _, _ in self.units.values())
        parts = []
        for kind in kinds:
            found = [(had, left) for one, had, left in self.units.values() if one == kind]
            parts.append(f"{sum(left for _, left in found):,} of {sum(had for had, _ in found):,} {kind}s left")
        return f"{before:,} → {after:,} parameters ({after / before:.1%}): {', '.join(parts) or 'no dead units'}"


def slim(model: nn.Module) -> tuple[nn.Module, SlimReport]:
    """A smaller module that computes the same: heads, neurons and channels whose weights are zero are cut out.

    Returns:
        A copy without them, and what is gone; `vit_rsst.save` stores it. `model` is not changed.

    Raises:
        InputError: units of this model cannot be removed exactly.
    """
    with in_words_of("slim", {"pruning.granularity": "model", "model": "model"}):
        net = unwrapped(model)
        mask = MaskSet({name: weight.detach() != 0 for name, weight in prunable_weights(net).items()})
        form = SlimForm(net, mask)
        groups = [group for group in unit_groups(net) if len(form.kept[group.name]) < group.units]
        check_units(net, groups, size_of(net))
        small = form.net if form.is_narrower else copy_of(net)
    units = {group.name: (group.kind, group.units, len(form.kept[group.name])) for group in groups}
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (net, small)]
    return small, SlimReport(units, (sizes[0], sizes[1]))


class Analysis(dict):
    """Counts as plain data; as text, a table."""

    def __str__(self) -> str:
        return analysis_text({"items": [self]})


def analyze(model: nn.Module, image_size: int | None = None) -> Analysis:
    """Parameters and zeros, overall and by layer; of an image model the FLOPs too: dense, effective and slim.

    Args:
        image_size: side of the images in px; default: the model's own. A model that does not take RGB images of that
            size is analysed without FLOPs.

    Returns:
        The counts of `vit-rsst analyze --json`; `str` of it is the table.

    Raises:
        InputError: nothing to prune, or a model that does not take images of the size that is given.
    """
    with in_words_of("analyze", {"model": "model"}):
        net = unwrapped(model)
        mask = MaskSet({name: weight.detach() != 0 for name, weight in prunable_weights(net).items()})
        size, kind = image_size or size_of(net), type(net).__name__
        subject = Subject(kind, "model", {"architecture": kind}, net, mask, size)
        try:
            return Analysis(count(subject))
        except OF_A_LIBRARY as error:
            if image_size is not None:
                raise InputError(
                    f"analyze(image_size=…): {kind} does not take images of {size} px ({first_line(error)}); omit it."
                ) from error
            return Analysis(count(subject, takes_images=False))


def register_models() -> None:
    """Registers the models of this package with `timm.create_model`; using any other public name does so too."""
    zoo.register_models()
