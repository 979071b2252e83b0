"""Calibration images: statistics for the criteria that need them, and inputs of layers for compensation."""

from collections.abc import Iterator

from accelerate import Accelerator

from vit_rsst import shards
from vit_rsst.assembly.data import channels, filler_images
from vit_rsst.assembly.parts import Parts
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import Batch, evaluation_batches, placed
from vit_rsst.models.complexity import evaluating
from vit_rsst.pruning.calibration import collect
from vit_rsst.pruning.compensation import compensate_
from vit_rsst.pruning.controller import Calibrate, Compensate
from vit_rsst.pruning.criteria import CRITERIA, OF_IMAGES, Statistics
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.seeds import derived_seed

CALIBRATION_BATCH = 128


def make_calibration(
    parts: Parts, data: ImageData, accelerator: Accelerator
) -> tuple[Calibrate | None, Compensate | None]:
    """What the controller does with calibration images from train, the same ones in every round; None: not needed."""
    recipe = parts.recipe
    needs = CRITERIA[recipe.pruning.criterion].needs
    calibrates = needs in OF_IMAGES and recipe.pruning.method.prunes
    compensates = recipe.pruning.compensate is not None
    if not calibrates and not compensates:
        return None, None
    images = data.balanced("train", recipe.pruning.calibration_images, derived_seed(recipe.seed, "calibration"))
    split = placed(images, accelerator.device)
    filler = filler_images(accelerator, data)
    mean, std = channels(recipe)

    def batches() -> Iterator[Batch]:
        found = evaluation_batches(
            split,
            CALIBRATION_BATCH,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            device=accelerator.device,
            mean=mean,
            std=std,
        )
        return found if filler is None else shards.in_step(found, filler)

    def calibrate() -> Statistics:
        try:
            return collect(parts.net, batches(), parts.weights, parts.groups, needs)
        finally:
            shards.reshard_(parts.net)

    def compensate(mask: MaskSet) -> None:
        with evaluating(parts.net):
            compensate_(parts.net, parts.weights, mask, batches(), of_units=bool(parts.groups))

    return calibrate if calibrates else None, compensate if compensates else None
