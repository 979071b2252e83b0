"""The one preparation: a run, its plan, its checks and an analysis are built from the same parts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vit_rsst.assembly.data import Rows
from vit_rsst.assembly.model import build_model, check_images
from vit_rsst.assembly.optim import lr_scales
from vit_rsst.assembly.pruning import build_selection, check_gradual, check_start, starting_density, starting_mask
from vit_rsst.data.dealing import Dealing, steps_per_epoch
from vit_rsst.errors import InputError
from vit_rsst.models import observation
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.progress import Progress
from vit_rsst.pruning.criteria import CRITERIA, OF_IMAGES
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.plan import Density
from vit_rsst.pruning.preview import RoundPreview, preview
from vit_rsst.pruning.selector import Selector
from vit_rsst.pruning.units import UnitGroup
from vit_rsst.recipe.schema import Recipe
from vit_rsst.training import switches


@dataclass(frozen=True)
class Sizes:
    """What follows from the data and the number of processes: batches, steps, rounds."""

    rows: Rows
    image_size: int
    dealing: Dealing
    progress: Progress

    @classmethod
    def of(cls, recipe: Recipe, rows: Rows, num_processes: int) -> "Sizes":
        """
        Raises:
            InputError: the global batch cannot be divided, or an epoch has no step.
        """
        train = recipe.train
        dealing = Dealing.of(train.global_batch, train.batch_per_device, num_processes)
        group = 2 * recipe.data.augment.aug_repeats
        if recipe.data.augment.mixes and dealing.batch_per_device % group:
            raise InputError(
                f"data.augment: MixUp and CutMix mix images within a device's batch, in groups of {group}, which a "
                f"global batch of {dealing} splits; make the batch per device a multiple of {group}."
            )
        steps = steps_per_epoch(rows.train, train.global_batch, train.steps_per_epoch)
        return cls(rows, recipe.data.size, dealing, Progress(steps, recipe.round_epochs))


@dataclass(frozen=True)
class Parts:
    """A model and how it is pruned.

    Attributes:
        image_size: in px.
        weights: the prunable parameters by name.
        groups: unit groups of a structured granularity.
        selector: chooses what stays.
        density: fraction of the schedule → target density.
        mask: alive at the start.
        start_density: of that mask; known on `meta` too.
    """

    recipe: Recipe
    image_size: int
    net: nn.Module
    weights: dict[str, nn.Parameter]
    groups: list[UnitGroup]
    selector: Selector
    density: Callable[[float], Density]
    mask: MaskSet
    start_density: float

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.net.parameters())

    @property
    def notes(self) -> list[str]:
        """What is left out of training and pruning, a line each."""
        started = [self.net.note] if hasattr(self.net, "note") else []
        return [*started, *observation.notes(self.net)]

    @property
    def num_prunable(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def final_density(self) -> Density:
        """Target at the end of the run; the density of the start if the method removes nothing."""
        return self.density(1.0) if self.recipe.pruning.method.prunes else self.start_density

    def mean_density(self, density: Density) -> float:
        """One number for a density by kind of unit."""
        return self.selector.mean_density(self.weights, density)

    def preview(self, progress: Progress) -> list[RoundPreview]:
        """What the method plans for every round."""
        pruning = self.recipe.pruning
        rounds = pruning.schedule.num_rounds
        return preview(pruning.method, progress, rounds, self.density, self.mean_density, self.weights)


def parts_of(recipe: Recipe, net: nn.Module, start_mask: MaskSet | None, image_size: int) -> Parts:
    """The parts of a network that `build_model` gave.

    Raises:
        InputError: nothing to prune, a schedule that cannot be met, a start that does not fit, or rates by layer for a
            model without layers.
    """
    pruning = recipe.pruning
    lr_scales(net, recipe.optim)
    weights, groups = prunable_parts(net, pruning.granularity, pruning.include, pruning.protect)
    if pruning.method.prunes:
        observation.check_units(net, groups, image_size)
        if CRITERIA[pruning.criterion].needs in OF_IMAGES:
            observation.check_inputs(net.observed, weights, groups)
    selector, density = build_selection(pruning, net, weights, groups, image_size)
    mask, start = starting_mask(weights, start_mask, pruning.method), starting_density(weights, start_mask)
    parts = Parts(recipe, image_size, net, weights, groups, selector, density, mask, start)
    check_start(pruning.method, parts.num_prunable, start, parts.mean_density(density(1.0)))
    return parts


def prepare(recipe: Recipe, sizes: Sizes, device: torch.device) -> Parts:
    """Builds the model on a device and its parts; on `meta`, shapes alone.

    Raises:
        RunError: whatever would stop a run of the recipe before its first step, apart from its data.
    """
    check_images(recipe, sizes.image_size, sizes.rows.num_classes)
    check_gradual(recipe.pruning.method, sizes.progress)
    is_real = device.type != "meta"
    net, start_mask = build_model(recipe, sizes.rows.num_classes, sizes.rows.classes, is_real)
    if is_real:
        net.to(device, memory_format=switches.memory_format(net, device))
    return parts_of(recipe, net, start_mask, sizes.image_size)
