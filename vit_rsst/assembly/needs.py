"""Memory and disk that a run needs, computed from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vit_rsst.assembly.parts import Parts
from vit_rsst.assembly.sharding import Units
from vit_rsst.errors import at_field
from vit_rsst.models.complexity import activation_bytes
from vit_rsst.pruning.criteria import CRITERIA
from vit_rsst.pruning.preview import RoundPreview
from vit_rsst.tickets.trained import open_trained


@dataclass(frozen=True)
class Needs:
    """Bytes; a dataset held on the device comes on top.

    Attributes:
        device: memory of a process, by use.
        best: host memory for the best epoch (`train.keep_best`).
        shared: of a step, which gradients take after activations have left it; 0 where gradients stay from one
            micro-batch to the next, or in the buckets of several processes.
        resume_point: on disk.
    """

    device: dict[str, int]
    best: int
    resume_point: int
    shared: int = 0

    @property
    def peak(self) -> int:
        """The most that a process holds at once on its device."""
        return sum(self.device.values()) - self.shared


def needs(parts: Parts, rounds: Sequence[RoundPreview], images: int, shards: int = 1) -> Needs:
    """Bytes needed by one process.

    Args:
        parts: on any device, including `meta`.
        rounds: as the method plans them.
        images: per micro-batch.
        shards: processes that the weights are divided among.

    Raises:
        InputError, Damaged: the teacher cannot be opened.
    """
    recipe, train, prunable = parts.recipe, parts.recipe.train, parts.num_prunable
    total = 4 * parts.num_parameters
    moments = 2 if recipe.optim.name != "sgd" else 1 if recipe.optim.momentum else 0
    activations = activation_bytes(parts.net, parts.image_size, images)
    average = total if train.ema_decay else 0
    moved = 4 * prunable if CRITERIA[recipe.pruning.criterion].needs == "movement" else 0
    in_bf16 = train.precision == "bf16"
    device = {
        "weights, gradients and moments": total * (2 + moments),
        "masks": prunable * (2 if any(round.plan.target is not None for round in rounds) else 1),
        "dense weights": 4 * prunable if any(round.plan.forward == "straight_through" for round in rounds) else 0,
        "movement": moved,
        "gradients of the dead": 4 * prunable if recipe.pruning.method.reads_gradients else 0,
        "moving average": average,
    }
    device = {use: -(-num_bytes // shards) for use, num_bytes in device.items()}
    device |= {
        "teacher": _teacher_bytes(train.distill.teacher, total),
        "activations": activations // 2 if in_bf16 else activations,
        "weights in bf16": total // 2 if in_bf16 and shards == 1 else 0,
        "gathered weights and gradients": Units.of(parts.net).num_bytes(2 if in_bf16 else 4) if shards > 1 else 0,
    }
    has_one_backward = images == train.global_batch
    shared = min(total, device["activations"]) if has_one_backward and shards == 1 else 0
    rewind = total if recipe.pruning.rewind_epoch is not None else 0
    best = total + average if train.keep_best else 0
    on_disk = total * (1 + moments) + prunable // 4 + rewind + average + moved + best
    return Needs(device, -(-best // shards), on_disk, shared)


def _teacher_bytes(teacher: str | None, own: int) -> int:
    if teacher in (None, "dense"):
        return own if teacher else 0
    with at_field("train.distill.teacher"):
        found = open_trained(Path(teacher).expanduser())
    return sum(parameter.numel() * 4 for parameter in found.net.parameters())
