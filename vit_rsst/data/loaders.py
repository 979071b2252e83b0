"""Loaders: deal global batches to ranks and micro-batches. An epoch is a whole number of optimizer steps everywhere.

`InMemoryLoader` gathers decoded images, `DecodingLoader` decodes the rows of a table or a stream in worker processes
while the step before is computed; crop and flip of whole batches on the device are the same for both. Which sample
comes when follows from seed and progress alone, whatever the number of ranks and workers.
"""

import importlib
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

import psutil
import torch
from accelerate.utils import reduce
from torch import Tensor

from vit_rsst.data.decoding import Decoded, Decoder, Sample
from vit_rsst.data.mixing import Mixing
from vit_rsst.data.streams import Stream
from vit_rsst.data.tables import Rows, Split, shuffled
from vit_rsst.data.transforms import Augmentation, Drawn, normalize, travel
from vit_rsst.errors import InputError
from vit_rsst.progress import Progress
from vit_rsst.seeds import derived_seed

WORKERS_IMPORT = [
    "vit_rsst.data.deaf",
    "vit_rsst.data.decoding",
    "vit_rsst.data.tables",
    "torchvision.transforms",
    "datasets",
]
"""Imported once, by the process that all workers of the run are forked from; a worker then starts in 40 ms."""

Batch = tuple[Tensor, Tensor]
"""Images float32 (batch, 3, size, size), labels int64 (batch,), on the device."""


@dataclass(frozen=True)
class Dealing:
    """How a global batch is divided: `global_batch = batch_per_device × num_processes × accumulation`."""

    global_batch: int
    batch_per_device: int
    num_processes: int
    accumulation: int

    @classmethod
    def of(cls, global_batch: int, batch_per_device: int | None, num_processes: int) -> "Dealing":
        """Derives the accumulation; without `batch_per_device` there is none.

        Raises:
            InputError: the numbers do not divide, with the arithmetic.
        """
        per_device = batch_per_device or global_batch // num_processes
        accumulation, rest = divmod(global_batch, max(per_device, 1) * num_processes)
        if rest or not accumulation:
            raise InputError(
                f"train.global_batch: {global_batch} cannot be divided into {num_processes} processes × "
                f"{per_device} images a device; choose a multiple of {max(per_device, 1) * num_processes}, or another "
                "train.batch_per_device."
            )
        return cls(global_batch, per_device, num_processes, accumulation)

    def slices(self, rank: int) -> list[slice]:
        """The part of a global batch that each micro-batch of a rank is."""
        size = self.batch_per_device
        starts = ((micro * self.num_processes + rank) * size for micro in range(self.accumulation))
        return [slice(start, start + size) for start in starts]

    def __str__(self) -> str:
        return (
            f"{self.global_batch} = {self.batch_per_device} a device × {self.num_processes} processes "
            f"× {self.accumulation} accumulated"
        )


def steps_per_epoch(num_samples: int | None, global_batch: int, limit: int | None) -> int:
    """Whole global batches in an epoch; the tail that does not fill one is dropped.

    Args:
        num_samples: None for a stream of unknown length.

    Raises:
        InputError: there is not even one, or nobody knows.
    """
    if num_samples is None:
        if limit is None:
            raise InputError(
                "train.steps_per_epoch: the length of this stream is not known without reading all of it; set how many "
                "steps an epoch has."
            )
        return limit
    steps = num_samples // global_batch
    if steps == 0:
        fitting = 1 << max(num_samples.bit_length() - 1, 0)
        raise InputError(
            f"train.global_batch: {global_batch} is more than the {num_samples} training images; set "
            f"train.global_batch={fitting} train.batch_per_device=null, or bring more images."
        )
    return min(steps, limit or steps)


class Loader(Protocol):
    """What the loop reads its batches from."""

    def steps(self, progress: Progress) -> Iterator[list[Batch]]:
        """From the step at which `progress` stands to the end of its epoch: this rank's micro-batches of each step."""

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Metrics and warnings of what was read since the last report; collective."""


@dataclass
class TrainingBatches:
    """What every loader of training batches knows; order and augmentation are pure functions of seed and progress.

    Attributes:
        dealing: how a global batch is divided.
        rank: of this process.
        device: where the batches go.
        repeats: how often an image comes, one time after the other, varied anew each time (Hoffer et al. 2020).
    """

    dealing: Dealing
    rank: int
    device: torch.device
    seed: int
    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    repeats: int = 1
    mixing: Mixing | None = None

    def _mixtures(self, step: int) -> list[Tensor]:
        """The numbers by which each micro-batch of this rank is mixed."""
        parts = self.dealing.slices(self.rank)
        if self.mixing is None:
            return [torch.empty(0)] * len(parts)
        drawn = self.mixing.draw(self.dealing.global_batch, derived_seed(self.seed, "mixing", step))
        return [drawn[part] for part in parts]

    def _finished(self, images: Tensor, labels: Tensor, drawn: Drawn, mixture: Tensor) -> Batch:
        """Augmented on the device, and mixed where images are."""
        images = self.augmentation.apply(images, drawn, self.mean, self.std)
        return self.mixing(images, labels, mixture) if self.mixing is not None else (images, labels)


@dataclass(kw_only=True)
class InMemoryLoader(TrainingBatches):
    """Training batches from memory.

    Attributes:
        split: the training images, on the device that should gather and augment them.
        weights: how often each image is drawn, relative to the others; None: once an epoch.
    """

    split: Split
    weights: Tensor | None = None

    def steps(self, progress: Progress) -> Iterator[list[Batch]]:
        """From the step at which `progress` stands to the end of its epoch: this rank's micro-batches of each step."""
        size = self.dealing.global_batch
        seed = derived_seed(self.seed, "order", progress.global_epoch)
        order = shuffled(len(self.split), seed, self.weights).repeat_interleave(self.repeats)
        order = order.to(self.split.images.device)
        first = progress.global_step - progress.step
        for step in range(progress.step, progress.steps_per_epoch):
            rows = order[step * size : (step + 1) * size]
            drawn = self.augmentation.draw(size, derived_seed(self.seed, "augmentation", first + step))
            parts = zip(self.dealing.slices(self.rank), self._mixtures(first + step), strict=True)
            yield [self._batch(rows[part], drawn.of(part), mixture) for part, mixture in parts]

    def _batch(self, rows: Tensor, drawn: Drawn, mixture: Tensor) -> Batch:
        images, labels = (travel(t[rows], self.device) for t in (self.split.images, self.split.labels))
        return self._finished(images, labels, drawn, mixture)

    def report(self) -> tuple[dict[str, float], list[str]]:
        return {}, []


class Clock:
    """How long the loop waited for images: time inside the context against all time since the first."""

    LIMITING = 0.2
    """Above this share of waiting, the loader limits the speed."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._began: float | None = None
        self._entered = self._left = 0.0

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._left = time.monotonic()
        if self._began is None:  # the first batch comes late for every loader: workers start
            self._began = self._left
        else:
            self.waited += self._left - self._entered

    @property
    def waited_share(self) -> float:
        return self.waited / total if (total := self._left - (self._began or self._left)) > 0 else 0.0

    def advice(self, workers: int) -> str:
        """What to do when the loader limits the speed; empty when it does not."""
        share = self.waited_share
        if share <= self.LIMITING:
            return ""
        needed = max(round(max(workers, 1) / max(1.0 - share, 0.02)), workers + 1)
        return (
            f"the loader limits the speed: {share:.0%} of the time was spent waiting for images with {workers} "
            f"workers; about {needed} would keep up (data.workers), as far as there are cores for them, or images "
            "that are smaller on disk"
        )


@dataclass(kw_only=True)
class DecodingLoader(TrainingBatches):
    """Training batches that are decoded as they are needed, in worker processes or here.

    Attributes:
        rows: what to read.
        decoder: from encoded rows to pixels.
        workers: processes that decode; 0: this one does.
        max_corrupt: share of an epoch's images that may be corrupt; they are left out and counted.
    """

    rows: Rows | Stream
    decoder: Decoder
    workers: int = 0
    max_corrupt: float = 0.0
    _clock: Clock = field(default_factory=Clock, repr=False)
    _corrupt: list[str] = field(default_factory=list, repr=False)

    def steps(self, progress: Progress) -> Iterator[list[Batch]]:
        """From the step at which `progress` stands to the end of its epoch: this rank's micro-batches of each step.

        Raises:
            InputError: the stream has ended, or more images are corrupt than may be.
        """
        size, parts = self.dealing.global_batch, self.dealing.slices(self.rank)
        first = progress.global_step - progress.step
        tolerated = int(self.max_corrupt * progress.steps_per_epoch * size / self.dealing.num_processes)
        batches = decoded(self._samples(progress), self.decoder, self.workers, self.device.type == "cuda")
        for step in range(progress.step, progress.steps_per_epoch):
            drawn = self.augmentation.draw(size, derived_seed(self.seed, "augmentation", first + step))
            with self._clock:
                found = list(islice(batches, len(parts)))
            for batch in found:
                check_corrupt(self._corrupt, batch, tolerated)
                if not len(batch.labels):
                    raise InputError(f"{batch.problems[0]} So are all images of its batch; nothing is learnt from it.")
            micro = zip(found, parts, self._mixtures(first + step), strict=True)
            yield [self._batch(batch, drawn.of(part), mixture) for batch, part, mixture in micro]

    def _samples(self, progress: Progress) -> Iterator[list[Sample]]:
        """The samples of each micro-batch of this rank, each with the seed of its own crop."""
        size, first = self.dealing.global_batch, progress.global_step - progress.step
        walk = self._walk(derived_seed(self.seed, "order", progress.global_epoch), progress.step * size)
        for step in range(progress.step, progress.steps_per_epoch):
            batch = list(islice(walk, size))
            if len(batch) < size:
                raise InputError(
                    f"train.steps_per_epoch: the training images end within step {step + 1:,} of an epoch of "
                    f"{progress.steps_per_epoch:,} steps; set it to {step:,} at most."
                )
            for part in self.dealing.slices(self.rank):
                numbered = enumerate(batch[part], part.start)
                yield [s._replace(seed=derived_seed(self.seed, "crop", first + step, i)) for i, s in numbered]

    def _walk(self, seed: int, start: int) -> Iterator[Sample]:
        """The epoch from position `start` on, each sample as often as it comes."""
        whole, rest = divmod(start, self.repeats)
        each = (sample for sample in self.rows.walk(seed, whole) for _ in range(self.repeats))
        return islice(each, rest, None)

    def _batch(self, batch: Decoded, drawn: Drawn, mixture: Tensor) -> Batch:
        images, labels = (t.to(self.device, non_blocking=True) for t in (batch.images, batch.labels))
        return self._finished(images, labels, drawn.of(batch.kept), mixture)

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Share of the time spent waiting for images and what would shorten it; corrupt images left out."""
        metrics, warnings = {"time/loader_wait": self._clock.waited_share}, []
        if self.max_corrupt:
            total = int(reduce(torch.tensor(len(self._corrupt), device=self.device), "sum"))
            metrics["data/corrupt"] = float(total)
            if total:
                first = f"; the first: {self._corrupt[0]}" if self._corrupt else ""
                warnings.append(f"{total} corrupt images were left out of this epoch{first}")
        if advice := self._clock.advice(self.workers):
            warnings.append(advice)
        self._clock, self._corrupt = Clock(), []
        return metrics, warnings


def check_corrupt(found: list[str], batch: Decoded, tolerated: float) -> None:
    """Notes the corrupt images of a batch.

    Raises:
        InputError: there are more than may be.
    """
    found += batch.problems
    if len(found) > tolerated:
        more = f" It is the {len(found)}th of this epoch and {tolerated} are tolerated." if tolerated else ""
        raise InputError(
            f"{batch.problems[0]}{more} Mend it, or raise data.max_corrupt, the share that may be left out."
        )


def decoded(batches: Iterable[list[Sample]], decoder: Decoder, workers: int, pin_memory: bool) -> Iterator[Decoded]:
    """Decodes batch after batch, in order, ahead of their use where there are workers."""
    from torch.multiprocessing import get_context
    from torch.utils.data import DataLoader

    context = None
    if workers:  # a fork of this process would take its threads' locks along, and a GPU's state
        context = get_context("forkserver")
        context.set_forkserver_preload(WORKERS_IMPORT)
    # The batches of samples travel to the workers as if they were batches of indices.
    loader = DataLoader(
        decoder,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        worker_init_fn=partial(end_with, os.getpid()) if workers else None,
    )
    return iter(loader)


def end_with(run: int, worker: int) -> None:
    """Lets a worker end once the process of the run is gone, be it killed.

    torch watches a worker's parent, which here is the fork server; and that one stays as long as it has a worker.
    """

    def watch() -> None:
        while psutil.pid_exists(run):
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    importlib.import_module("vit_rsst.data.deaf").outlive_terms()  # its import makes this process deaf


def _as_it_is(batch: Decoded) -> Decoded:
    return batch


def evaluation_batches(
    samples: Split | Rows | Stream,
    batch: int,
    rank: int,
    num_processes: int,
    device: torch.device,
    mean: tuple,
    std: tuple,
    decoder: Decoder | None = None,
    workers: int = 0,
    max_corrupt: float = 0.0,
) -> Iterator[Batch]:
    """Every sample exactly once over all ranks, in order, without augmentation.

    Args:
        decoder: for samples that are not in memory.

    Raises:
        InputError: an image is corrupt, and that is not tolerated.
    """
    if isinstance(samples, Split):
        for start in range(rank * batch, len(samples), batch * num_processes):
            images, labels = samples.images[start : start + batch], samples.labels[start : start + batch]
            yield normalize(images.to(device), mean, std), labels.to(device)
        return
    corrupt, seen, tolerated = [], 0, math.inf if max_corrupt else 0
    own = _every(samples.walk(None), batch, rank, num_processes)
    for found in decoded(own, decoder, workers, device.type == "cuda"):
        seen += len(found.labels) + len(found.problems)
        check_corrupt(corrupt, found, tolerated)
        yield normalize(found.images.to(device, non_blocking=True), mean, std), found.labels.to(device)
    if len(corrupt) > max_corrupt * seen:
        raise InputError(f"{corrupt[0]} {len(corrupt)} of {seen} are, more than data.max_corrupt={max_corrupt}.")


def _every(walk: Iterator[Sample], batch: int, rank: int, num_processes: int) -> Iterator[list[Sample]]:
    """The batches of one rank."""
    while samples := list(islice(walk, batch * num_processes)):
        if own := samples[rank * batch : (rank + 1) * batch]:
            yield own


def placed(split: Split, device: torch.device, limit_bytes: int = 4 * 2**30) -> Split:
    """The split on the device when it is small enough to lie there, else pinned in host memory."""
    if device.type == "cpu":
        return split
    if split.images.numel() <= limit_bytes:
        return Split(split.images.to(device), split.labels.to(device))
    return Split(split.images.pin_memory(), split.labels.pin_memory())
