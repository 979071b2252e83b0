"""Memory and disk that a run needs, computed from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vit_rsst.assembly.parts import Parts
from vit_rsst.errors import at_field
from vit_rsst.models.complexity import activation_bytes
from vit_rsst.pruning.preview import RoundPreview
from vit_rsst.tickets.trained import open_trained


@dataclass(frozen=True)
class Needs:
    """Bytes; a dataset held on the device comes on top.

    Attributes:
        device: memory of a process, by use.
        best: host memory for the best epoch (`train.keep_best`).
        resume_point: on disk.
    """

    device: dict[str, int]
    best: int
    resume_point: int


def needs(parts: Parts, rounds: Sequence[RoundPreview], images: int) -> Needs:
    """Bytes needed by one process.

    Args:
        parts: on any device, including `meta`.
        rounds: as the method plans them.
        images: per micro-batch.

    Raises:
        InputError, Damaged: the teacher cannot be opened.
    """
    recipe, train, prunable = parts.recipe, parts.recipe.train, parts.num_prunable
    total = 4 * parts.num_parameters
    moments = 2 if recipe.optim.name != "sgd" else 1 if recipe.optim.momentum else 0
    activations = activation_bytes(parts.net, parts.image_size, images)
    average = total if train.ema_decay else 0
    device = {
        "weights, gradients and moments": total * (2 + moments),
        "masks": prunable * (2 if any(round.plan.target is not None for round in rounds) else 1),
        "dense weights": 4 * prunable if any(round.plan.forward == "straight_through" for round in rounds) else 0,
        "moving average": average,
        "teacher": _teacher_bytes(train.distill.teacher, total),
        "activations": activations // 2 if train.precision == "bf16" else activations,
    }
    rewind = total if recipe.pruning.rewind_epoch is not None else 0
    best = total + average if train.keep_best else 0
    return Needs(device, best, total * (1 + moments) + prunable // 4 + rewind + average + best)


def _teacher_bytes(teacher: str | None, own: int) -> int:
    if teacher in (None, "dense"):
        return own if teacher else 0
    with at_field("train.distill.teacher"):
        found = open_trained(Path(teacher).expanduser())
    return sum(parameter.numel() * 4 for parameter in found.net.parameters())
