"""Memory and disk that a run needs, computed from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vit_rsst.assembly.data import evaluation_batch
from vit_rsst.assembly.parts import Parts
from vit_rsst.assembly.sharding import Units
from vit_rsst.data.dealing import Dealing
from vit_rsst.errors import at_field
from vit_rsst.models.footprint import evaluation_bytes, training_bytes
from vit_rsst.pruning.calibration import moments_bytes
from vit_rsst.pruning.criteria import CRITERIA
from vit_rsst.pruning.preview import RoundPreview
from vit_rsst.tickets.trained import open_trained

WORKSPACES = 2 * 32 * 2**20
"""cuBLAS's on Hopper, less elsewhere: one each for the threads of the forward and the backward pass."""


@dataclass(frozen=True)
class Needs:
    """Bytes that torch allocates in one process; a dataset held in memory comes on top.

    Attributes:
        device: on its device, by use; the last is the most of what comes and goes.
        host: in host memory, by use.
        resume_point: on disk.
    """

    device: dict[str, int]
    host: dict[str, int]
    resume_point: int

    @property
    def peak(self) -> int:
        """The most that a process holds at once on its device."""
        return sum(self.device.values())


def needs(
    parts: Parts,
    rounds: Sequence[RoundPreview],
    dealing: Dealing,
    evaluated: Sequence[int | None],
    shards: int = 1,
    on_gpu: bool = True,
) -> Needs:
    """Bytes needed by one process.

    Args:
        parts: on any device, including `meta`.
        rounds: as the method plans them.
        evaluated: images of the splits for evaluation; None: not counted.
        shards: processes that the weights are divided among.

    Raises:
        InputError, Damaged: the teacher cannot be opened.
    """
    recipe, train, prunable = parts.recipe, parts.recipe.train, parts.num_prunable
    total = 4 * parts.num_parameters
    moments = 2 if recipe.optim.name != "sgd" else 1 if recipe.optim.momentum else 0
    average = total if train.ema_decay else 0
    moved = 4 * prunable if CRITERIA[recipe.pruning.criterion].needs == "movement" else 0
    teacher = _teacher(parts)
    # Fresh in each step, unless they wait for the next micro-batch or lie in DDP's buckets.
    are_fresh = dealing.accumulation == dealing.num_processes == shards == 1
    device = {
        "weights and moments": total * (1 + moments),
        "gradients": 0 if are_fresh else total,
        "masks": prunable * (2 if any(round.plan.target is not None for round in rounds) else 1),
        "dense weights": 4 * prunable if any(round.plan.forward == "straight_through" for round in rounds) else 0,
        "movement": moved,
        "moving average": average,
    }
    device = {use: -(-num_bytes // shards) for use, num_bytes in device.items()}
    in_bf16, image_size = train.precision == "bf16", parts.image_size
    gathered, width = 0, 2 if in_bf16 else 4
    if shards > 1:
        gathered += Units.of(parts.net).num_bytes(width)
        gathered += 0 if teacher is None else Units.of(teacher).num_bytes(width, learns=False)
    batch, keeps_copies = dealing.batch_per_device, shards == 1
    passes = training_bytes(parts.net, image_size, batch, in_bf16, teacher, are_fresh, keeps_copies)
    update = _update_bytes(parts, rounds, total if are_fresh else 0, on_gpu)
    most = evaluation_batch(torch.device("cuda" if on_gpu else "cpu"), train)
    largest = most if None in evaluated else min(most, max(evaluated))
    scoring = evaluation_bytes(parts.net, image_size, largest, in_bf16, keeps_copies)
    device |= {
        "teacher": 0 if teacher is None else -(-sum(4 * p.numel() for p in teacher.parameters()) // shards),
        "cuBLAS": WORKSPACES if on_gpu else 0,
        "gathered weights and gradients": gathered,
        "activations and gradients" if are_fresh else "activations": max(passes, -(-update // shards), scoring),
    }
    best = total + average if train.keep_best else 0
    rewind = total if recipe.pruning.rewind_epoch is not None else 0
    saved = total * (1 + moments) + prunable // 4 + rewind + average + moved + best
    host = {
        "best epoch": -(-best // shards),
        "rewind point": -(-rewind // shards),
        "resume point while it is written": saved,
    }
    return Needs(device, host, saved)


def _update_bytes(parts: Parts, rounds: Sequence[RoundPreview], gradients: int, on_gpu: bool) -> int:
    """Most that an optimizer step takes with what pruning does before and after it."""
    method, prunable = parts.recipe.pruning.method, parts.num_prunable
    if not method.prunes:
        return gradients
    factors = 4 * prunable if on_gpu else 0  # on the CPU they are the masks themselves
    read = 4 * prunable if method.reads_gradients else 0
    noted = 4 * prunable if CRITERIA[parts.recipe.pruning.criterion].needs == "movement" else 0
    shrinks = any(round.penalty is not None for round in rounds)
    scores = 8 * prunable  # two copies; `scripts/benchmarks/selection.py`
    if CRITERIA[parts.recipe.pruning.criterion].needs == "moments":
        scores += moments_bytes(parts.net, parts.weights, parts.groups)
    return max(gradients + factors * (2 if shrinks else 1) + read + noted, scores)


def _teacher(parts: Parts) -> nn.Module | None:
    found = parts.recipe.train.distill.teacher
    if found in (None, "dense"):
        return parts.net if found else None
    with at_field("train.distill.teacher"):
        return open_trained(Path(found).expanduser()).net
