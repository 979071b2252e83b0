"""The training objective of a recipe: loss, MixUp and CutMix, distillation."""

import functools
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from vit_rsst import files
from vit_rsst.assembly import sharding
from vit_rsst.data.images import ImageData
from vit_rsst.data.mixing import Mixing
from vit_rsst.errors import InputError, at_field
from vit_rsst.progress import Progress
from vit_rsst.recipe.schema import Recipe
from vit_rsst.tickets import rounds, slim_folder
from vit_rsst.tickets.opening import open_ticket
from vit_rsst.tickets.trained import Trained, open_trained
from vit_rsst.training import switches
from vit_rsst.training.distill import Distillation
from vit_rsst.training.losses import Loss, make_loss


def build_loss(recipe: Recipe, data: ImageData, device: torch.device) -> Loss:
    """The loss on the labels."""
    counts = None
    if recipe.train.loss != "cross_entropy":
        counts = torch.bincount(data.rows["train"].labels, minlength=len(data.classes)).to(device)
    return make_loss(recipe.train.loss, recipe.train.label_smoothing, counts)


def build_mixing(recipe: Recipe, data: ImageData) -> Mixing | None:
    """MixUp and CutMix of the recipe; None without them."""
    augment = recipe.data.augment
    if not augment.mixes:
        return None
    alphas, probs = (augment.mixup, augment.cutmix), (augment.mixup_prob, augment.mixup_switch_prob)
    return Mixing(len(data.classes), *alphas, *probs, augment.aug_repeats)


def build_distillation(
    recipe: Recipe, data: ImageData, progress: Progress, accelerator: Accelerator
) -> Distillation | None:
    """The teacher of the recipe: one from another run is opened now, this run's own once round 0 is done.

    Raises:
        InputError: it was trained on other classes or another image size.
        Damaged: it cannot be read.
    """
    options = recipe.train.distill
    if options.teacher is None:
        return None
    own, source = rounds.ticket_path(recipe.run_folder, 0), None

    @functools.cache
    def opened(path: Path) -> nn.Module:
        # It may be built within a step and must not disturb the step's random draws.
        with torch.random.fork_rng(devices=[]), at_field("train.distill.teacher"):
            found = open_trained(path)
        check_teacher(path, found, recipe, data)
        net, device = found.net.eval().requires_grad_(False), accelerator.device
        switches.compile_(net, recipe.train.compile)
        if sharding.is_on(accelerator):
            return sharding.shard_(accelerator, net)
        return net.to(device, memory_format=switches.memory_format(net, device))

    def teacher() -> nn.Module | None:
        if options.teacher != "dense":
            return opened(Path(options.teacher).expanduser())
        return opened(own) if progress.round > 0 else None

    if options.teacher != "dense":
        teacher()
        file, _ = open_ticket(Path(options.teacher).expanduser())
        source = files.sha256(file if file.is_file() else file / slim_folder.WEIGHTS)
    return Distillation(teacher, options.weight, options.temperature, accelerator.autocast, source)


def check_teacher(path: Path, teacher: Trained, recipe: Recipe, data: ImageData) -> None:
    """Rejects a teacher trained on other data.

    Raises:
        InputError: its classes, image size or normalisation differ.
    """
    info = recipe.data.info
    pairs = {
        "classes": (len(teacher.classes), len(data.classes)),
        "class names": (list(teacher.classes), list(data.classes)),
        "image size": (teacher.data.size, data.options.size),
        "mean and standard deviation": ((teacher.mean, teacher.std), (info.mean, info.std)),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            difference = f"{what} {theirs} there, {ours} here" if isinstance(theirs, int) else f"other {what}"
            raise InputError(
                f"train.distill.teacher: {path} was trained on different data ({difference}); use a teacher trained on "
                "the same data."
            )
