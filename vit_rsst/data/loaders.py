"""Loaders: deal global batches to ranks and micro-batches. An epoch is a whole number of optimizer steps everywhere.

`InMemoryLoader` gathers decoded images, `DecodingLoader` decodes the rows of a table or a stream while the step before
is computed (`workers.py`); crop and flip of whole batches on the device are the same for both. Which sample comes when
follows from seed and progress alone, whatever the number of ranks and workers.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import torch
from accelerate.utils import reduce
from torch import Tensor

from vit_rsst.data.dealing import Dealing, dealt
from vit_rsst.data.decoding import Decoded, Decoder
from vit_rsst.data.feeds import Course, Scan
from vit_rsst.data.lanes import Lanes
from vit_rsst.data.mixing import Mixing
from vit_rsst.data.streams import Stream
from vit_rsst.data.tables import Rows, Split, shuffled
from vit_rsst.data.transforms import Augmentation, Drawn, normalize, travel
from vit_rsst.data.workers import Here, Pool
from vit_rsst.errors import InputError
from vit_rsst.progress import Progress
from vit_rsst.seeds import derived_seed

AHEAD_IMAGES = 256
"""Images that workers decode before they are needed, at the least."""

Batch = tuple[Tensor, Tensor]
"""Images float32 (batch, 3, size, size), labels int64 (batch,), on the device."""


class Loader(Protocol):
    """What the loop reads its batches from."""

    def steps(self, progress: Progress) -> Iterator[Sequence[Batch]]:
        """From the step at which `progress` stands to the end of its epoch: this rank's micro-batches of each step.

        A micro-batch is made when it is asked for, and some loaders give it once.
        """

    def order(self) -> dict[str, int] | None:
        """What the order of the images follows from besides seed and data; None: from nothing else."""

    def close(self) -> None:
        """Ends what runs in the background."""

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Metrics and warnings of what was read since the last report; collective."""


class MicroBatches(Sequence[Batch]):
    """The micro-batches of a step, each made when it is asked for: one at a time lies in memory."""

    def __init__(self, number: int, make: Callable[[int], Batch]):
        self._number, self._make = number, make

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, micro: int) -> Batch:
        if not 0 <= micro < self._number:
            raise IndexError(micro)
        return self._make(micro)


class Arriving:
    """Micro-batches that come one after the other; each is given once."""

    def __init__(self, batches: Iterator[Batch]):
        self._batches, self._made, self._number = batches, {}, 0

    def __call__(self, micro: int) -> Batch:
        self.make(micro)
        return self._made.pop(micro)

    def make(self, last: int) -> None:
        """Takes those up to `last` that have not come yet."""
        for number in range(self._number, last + 1):
            self._made[number] = next(self._batches)
            self._number = number + 1


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

    def order(self) -> dict[str, int] | None:
        return None

    def close(self) -> None:
        """Nothing is left to end."""

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

    def steps(self, progress: Progress) -> Iterator[Sequence[Batch]]:
        """From the step at which `progress` stands to the end of its epoch: this rank's micro-batches of each step."""
        size = self.dealing.global_batch
        seed = derived_seed(self.seed, "order", progress.global_epoch)
        order = shuffled(len(self.split), seed, self.weights).repeat_interleave(self.repeats)
        order = order.to(self.split.images.device)
        first = progress.global_step - progress.step
        for step in range(progress.step, progress.steps_per_epoch):
            rows = order[step * size : (step + 1) * size]
            drawn = self.augmentation.draw(size, derived_seed(self.seed, "augmentation", first + step))
            slices = zip(self.dealing.slices(self.rank), self._mixtures(first + step), strict=True)
            parts = [(rows[part], drawn.of(part), mixture) for part, mixture in slices]
            yield MicroBatches(len(parts), partial(self._batch, parts))

    def _batch(self, parts: list[tuple[Tensor, Drawn, Tensor]], micro: int) -> Batch:
        rows, drawn, mixture = parts[micro]
        images, labels = (travel(t[rows], self.device) for t in (self.split.images, self.split.labels))
        return self._finished(images, labels, drawn, mixture)

    def report(self) -> tuple[dict[str, float], list[str]]:
        return {}, []


class Clock:
    """How long the loop waited for images: time inside the context against all time since the first."""

    LIMITING = 0.2
    """Above this share of waiting, data loading is the bottleneck."""

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
        """What to do when data loading is the bottleneck; empty when it is not."""
        share = self.waited_share
        if share <= self.LIMITING:
            return ""
        needed = max(round(max(workers, 1) / max(1.0 - share, 0.02)), workers + 1)
        return (
            f"data loading is the bottleneck: {share:.0%} of the time was spent waiting for images with {workers} "
            f"workers; about {needed} would keep up (data.workers), given enough cores, or smaller images on disk"
        )


@dataclass(kw_only=True)
class DecodingLoader(TrainingBatches):
    """Training batches that are decoded as they are needed, in worker processes or here.

    Attributes:
        rows: what to read.
        decoder: from encoded rows to pixels.
        workers: processes that decode, from the first epoch to the last; 0: this one does.
        max_corrupt: share of an epoch's images that may be corrupt; they are left out and counted.
        lanes: equal parts of a stream's epoch; None: as many as suit the data and the global batch.
    """

    rows: Rows | Stream
    decoder: Decoder
    workers: int = 0
    max_corrupt: float = 0.0
    lanes: int | None = None
    _clock: Clock = field(default_factory=Clock, repr=False)
    _corrupt: list[str] = field(default_factory=list, repr=False)
    _decoding: Pool | Here | None = field(default=None, repr=False)

    @cached_property
    def cut(self) -> Lanes | None:
        """How the epochs of a stream are cut; None: of a table they are not."""
        return self.rows.cut(self.dealing.global_batch, self.lanes) if isinstance(self.rows, Stream) else None

    def order(self) -> dict[str, int] | None:
        """Lanes, tracks and window of a stream."""
        return self.cut and self.cut.record()

    def steps(self, progress: Progress) -> Iterator[Sequence[Batch]]:
        """From the step at which `progress` stands to the end of its epoch: this rank's micro-batches of each step.

        Raises:
            InputError: the data end before the epoch does, or more images are corrupt than may be.
        """
        size, parts = self.dealing.global_batch, self.dealing.slices(self.rank)
        self._check_length(progress.steps_per_epoch)
        first = progress.global_step - progress.step
        tolerated = int(self.max_corrupt * progress.steps_per_epoch * size / self.dealing.num_processes)
        course = Course(
            self.dealing, self.rank, self.seed, progress.global_epoch, first, progress.step, progress.steps_per_epoch,
            self.repeats, self.cut,
        )  # fmt: skip
        with closing(one_ahead(self._opened().run(course), self.device)) as batches:

            def arriving(step: int) -> Iterator[Batch]:
                drawn = self.augmentation.draw(size, derived_seed(self.seed, "augmentation", first + step))
                for part, mixture in zip(parts, self._mixtures(first + step), strict=True):
                    with self._clock:
                        batch = next(batches)
                    check_corrupt(self._corrupt, batch, tolerated)
                    if not len(batch.labels):
                        raise InputError(f"{batch.problems[0]} So is every other image of its batch.")
                    yield self._finished(batch.images, batch.labels, drawn.of(part).of(batch.kept), mixture)

            for step in range(progress.step, progress.steps_per_epoch):
                made = Arriving(arriving(step))
                yield MicroBatches(len(parts), made)
                made.make(len(parts) - 1)  # those that were not asked for
            next(batches, None)  # the epoch has ended, and the workers wait for the next

    def _check_length(self, steps: int) -> None:
        count, size = self.rows.count, self.dealing.global_batch
        if steps * size > count:
            raise InputError(
                f"train.steps_per_epoch: {steps:,} steps take {steps * size:,} images, and there are {count:,}; set it "
                f"to {count // size:,} at most."
            )

    def _opened(self) -> Pool | Here:
        if self._decoding is None or not self._decoding.is_open:
            self._decoding = start_decoding(
                self.rows, self.decoder, self.workers, self.dealing.batch_per_device, self.device, self._ahead()
            )
        return self._decoding

    def _ahead(self) -> int:
        """Images to decode in advance: where workers take the windows of a track in turns, one window each."""
        if self.cut is None or self.cut.lanes * self.cut.tracks >= self.workers * self.dealing.num_processes:
            return 0
        return self.workers * self.cut.largest_window

    def close(self) -> None:
        """Ends the workers."""
        if self._decoding is not None:
            self._decoding.close()

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
            f"{batch.problems[0]}{more} Repair it, or raise data.max_corrupt, the share that may be left out."
        )


def start_decoding(
    source: Rows | Stream, decoder: Decoder, workers: int, batch: int, device: torch.device, ahead: int = 0
) -> Pool | Here:
    """Workers that decode batches of a source, or this process without them."""
    pin_memory = device.type == "cuda"
    if not workers:
        return Here(source, decoder, pin_memory)
    return Pool(source, decoder, workers, batch, pin_memory, max(ahead, AHEAD_IMAGES))


def one_ahead(batches: Iterator[Decoded], device: torch.device) -> Iterator[Decoded]:
    """The batches on the device, each copied while the one before it is in use; on the CPU as they are."""
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    coming: deque[tuple[Decoded, torch.cuda.Event | None]] = deque()
    with closing(batches):
        for batch in batches:
            coming.append(_copied(batch, device, side))
            if len(coming) > (side is not None):
                yield _arrived(*coming.popleft(), device)
            for _, copied in coming:  # the ring writes over a batch once the second one after it is asked for
                copied.synchronize()
        for batch, copied in coming:
            yield _arrived(batch, copied, device)


def _copied(
    batch: Decoded, device: torch.device, side: "torch.cuda.Stream | None"
) -> "tuple[Decoded, torch.cuda.Event | None]":
    if side is None:
        return batch._replace(labels=batch.labels.clone()), None  # images are read before the next batch is asked for
    with torch.cuda.stream(side):
        images, labels = (t.to(device, non_blocking=True) for t in (batch.images, batch.labels))
        return batch._replace(images=images, labels=labels), side.record_event()


def _arrived(batch: Decoded, copied: "torch.cuda.Event | None", device: torch.device) -> Decoded:
    if copied is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        batch.images.record_stream(current)
        batch.labels.record_stream(current)
    return batch


def evaluation_batches(
    samples: Split | Rows | Stream,
    batch: int,
    *,
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
        own = dealt(len(samples), batch, rank, num_processes)
        for start in own[::batch]:
            rows = slice(start, min(start + batch, own.stop))
            images, labels = samples.images[rows], samples.labels[rows]
            yield normalize(images.to(device), mean, std), labels.to(device)
        return
    own = Scan(dealt(samples.count, batch, rank, num_processes), batch)
    corrupt, seen, tolerated = [], 0, math.inf if max_corrupt else 0
    decoding = start_decoding(samples, decoder, workers if len(own) else 0, batch, device)
    try:
        for found in one_ahead(decoding.run(own), device):
            seen += len(found.labels) + len(found.problems)
            check_corrupt(corrupt, found, tolerated)
            yield normalize(found.images, mean, std), found.labels
    finally:
        decoding.close()
    if len(corrupt) > max_corrupt * seen:
        raise InputError(f"{corrupt[0]} {len(corrupt)} of {seen} are, more than data.max_corrupt={max_corrupt}.")


def placed(split: Split, device: torch.device, limit_bytes: int = 4 * 2**30) -> Split:
    """The split on the device when it is small enough to lie there, else locked in host memory where it is."""
    if device.type == "cpu":
        return split
    if split.images.numel() <= limit_bytes:
        return Split(split.images.to(device), split.labels.to(device))
    for tensor in (split.images, split.labels):
        if not tensor.is_pinned():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    return split
