"""Calibration: statistics of activations or gradients, for the criteria that need them."""

from accelerate import Accelerator

from vit_rsst import shards
from vit_rsst.assembly.data import channels, filler_images
from vit_rsst.assembly.parts import Parts
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import evaluation_batches, placed
from vit_rsst.pruning.calibration import collect
from vit_rsst.pruning.controller import Calibrate
from vit_rsst.pruning.criteria import CRITERIA, Statistics
from vit_rsst.seeds import derived_seed

CALIBRATION_BATCH = 128


def make_calibrate(parts: Parts, data: ImageData, accelerator: Accelerator) -> Calibrate | None:
    """Collects statistics on calibration images from train, the same ones in every round; None: not needed."""
    recipe = parts.recipe
    needs = CRITERIA[recipe.pruning.criterion].needs
    if needs not in ("activations", "gradients") or not recipe.pruning.method.prunes:
        return None
    images = data.balanced("train", recipe.pruning.calibration_images, derived_seed(recipe.seed, "calibration"))
    split = placed(images, accelerator.device)
    filler = filler_images(accelerator, data)
    mean, std = channels(recipe)

    def calibrate() -> Statistics:
        batches = evaluation_batches(
            split,
            CALIBRATION_BATCH,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            device=accelerator.device,
            mean=mean,
            std=std,
        )
        if filler is not None:
            batches = shards.in_step(batches, filler)
        try:
            return collect(parts.net, batches, parts.weights, parts.groups, needs == "gradients")
        finally:
            shards.reshard_(parts.net)

    return calibrate
