"""The state of a run: everything that the loop works with."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vit_rsst import shards
from vit_rsst.data.loaders import Loader
from vit_rsst.progress import Progress
from vit_rsst.pruning.controller import Controller
from vit_rsst.run.checkpoint import Checkpointer
from vit_rsst.run.console import Console
from vit_rsst.run.folder import RunFolder
from vit_rsst.run.ranks import Ranks
from vit_rsst.run.signals import StopFlag
from vit_rsst.run.tracking import Tracker
from vit_rsst.training.best import Best
from vit_rsst.training.counters import RunningLoss
from vit_rsst.training.distill import Distillation
from vit_rsst.training.readings import Readings


@dataclass
class Run:
    """All parts of a run.

    Attributes:
        model: as Accelerate prepared it; `net` is the same network without wrappers.
        loss: (logits, labels) → mean loss.
        auxiliary_loss: the model's own loss term after a training forward pass; None if it has none.
        distillation: adds a teacher to the loss; None without one.
        best: best epoch of the current round.
        lr: the learning rate at a progress.
        evaluate: split name → top1, top5, loss; collective.
        clip_grad_norm: maximum gradient norm; None for no clipping.
        max_skipped_steps: non-finite steps that are skipped before the run stops.
        header: entries of every ticket's header.
        ranks: the processes of the run and their signs of life.
        batch_shape: of a micro-batch of images: (batch, 3, size, size).
        environment: versions, data and machine, as recorded in the run folder.
        watch: called with (moment, progress, controller) at `round began`, `epoch ended` and `round ended`.
        epoch_is_open: an epoch has been trained but not yet evaluated.
        scores: of the last epoch on the validation split; None: none in this round since the start or a resume.
        seconds: time spent in the current round, over all sittings.
    """

    accelerator: Accelerator
    model: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: Callable[[Progress], float]
    controller: Controller
    progress: Progress
    evaluate: Callable[[str], dict[str, float]]
    folder: RunFolder
    checkpointer: Checkpointer
    tracker: Tracker
    console: Console
    stop: StopFlag
    meter: RunningLoss
    clip_grad_norm: float | None
    max_skipped_steps: int
    log_every_steps: int
    save_every_steps: int | None
    seed: int
    recipe_fingerprint: str
    header: dict[str, str]
    environment: dict[str, object]
    ranks: Ranks
    batch_shape: tuple[int, int, int, int]
    auxiliary_loss: Callable[[], Tensor] | None = None
    distillation: Distillation | None = None
    best: Best = field(default_factory=Best)
    watch: Callable[[str, Progress, Controller], None] = lambda *_: None
    readings: Readings = field(default_factory=Readings)
    skipped_steps: int = 0
    epoch_is_open: bool = False
    scores: dict[str, float] | None = None
    seconds: float = 0.0
    clock: float = field(default_factory=time.monotonic)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds some rows of the weights."""
        return any(map(shards.is_sharded, self.controller.weights.values()))
