"""Functions for trained models: prune once, cut out what is gone, load, save, analyse."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vit_rsst.errors import InputError
from vit_rsst.library.batches import Batches, forward_of, pairs
from vit_rsst.library.target import Target
from vit_rsst.models.complexity import evaluating
from vit_rsst.pruning.oneshot import OneShot, prune_once_
from vit_rsst.pruning.patterns import pattern
from vit_rsst.recipe.calls import in_words_of, pruning_section

CALIBRATION = {"pruning.calibration_images": "calibration"}
IN_PRUNE = {"pruning.schedule": "sparsity", "pruning.schedule.budget": "budget", "model": "model"} | CALIBRATION
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
    calibration: Batches | None = None,
    seed: int = 0,
) -> OneShot:
    """Prunes a trained model once, in place: what scores lowest becomes zero.

    Args:
        model: any model with Linear or Conv layers; wrappers of DDP and torch.compile are looked through.
        sparsity: fraction of the prunable weights to remove, 0 < s < 1; or per kind of unit,
            `{"head": 0.5, "neuron": 0.7}`. An N:M granularity implies it.
        budget: instead of a sparsity, the share of FLOPs or parameters left in the slim model, `{"flops": 0.5}`.
        granularity: element, head, neuron, head+neuron, channel or N:M such as 2:4.
        criterion: magnitude, activation_l1, activation_l2, saliency, survivors, taylor or random.
        scope, depth_ramp, layer_sparsity, max_layer_sparsity, min_neurons: as in a recipe's section `pruning`.
        include: globs of weights to prune beside those of the default.
        protect: globs of weights never to prune.
        calibration: a loader of (inputs, labels), or a callable that returns one; for criteria that need activations
            or gradients.
        seed: of the criterion random.

    Returns:
        The mask and its density, overall and by layer, and the units left.

    Raises:
        InputError: a keyword is wrong, nothing can be pruned, or the sparsity cannot be reached.
    """
    if sparsity is None and budget is None and pattern(granularity) is None:
        raise InputError("prune(sparsity=…): missing; set it, such as 0.5, or a budget, such as {'flops': 0.5}.")
    words: dict[str, Any] = {
        "method": "imp",
        "rounds": 1,
        "final_sparsity": sparsity,
        "budget": budget,
        "granularity": granularity,
        "criterion": criterion,
        "scope": scope,
        "depth_ramp": depth_ramp,
        "layer_sparsity": layer_sparsity,
        "max_layer_sparsity": max_layer_sparsity,
        "min_neurons": min_neurons,
        "include": include,
        "protect": protect,
    }
    pruning = pruning_section("prune", words, {}, IN_PRUNE)
    with in_words_of("prune", IN_PRUNE):
        target = Target.of(model, pruning, calibration)
        batches = () if calibration is None else pairs(calibration, target.device)
        with evaluating(target.net):
            return prune_once_(
                target.net, target.weights, target.selector, target.density(1.0), batches,
                forward=forward_of(target.net), seed=seed,
            )  # fmt: skip
