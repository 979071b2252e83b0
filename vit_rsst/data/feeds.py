"""Feeds: numbered batches of samples, in parts that any number of workers fill, the same for any number of them.

A `Course` is the rest of a training epoch on one rank, a `Scan` the share of an evaluation. A feed holds numbers alone
and travels to the workers; they hold the source, a table's rows or a stream. Of a stream, a worker takes whole tracks,
or the windows of a track in turns where a rank has fewer tracks than workers, so that no block is read by two of them
unless a lane's end cuts it.
"""

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from vit_rsst.data.dealing import Dealing
from vit_rsst.data.decoding import Sample
from vit_rsst.data.lanes import Epoch, Lanes, Piece, Window
from vit_rsst.data.streams import Ahead, Stream
from vit_rsst.data.tables import Rows, shuffled
from vit_rsst.seeds import derived_seed


class Part(NamedTuple):
    """Samples of a batch and their positions in it."""

    positions: list[int]
    samples: list[Sample]


class Feed(Protocol):
    """Batches of samples, known by their numbers."""

    def __len__(self) -> int: ...

    def size(self, number: int) -> int:
        """Samples of a batch."""

    def parts(self, source: Rows | Stream, worker: int, workers: int) -> Iterator[Part]:
        """What one of so many workers has of each batch, in the order of the batches; it may be nothing."""


@dataclass(frozen=True)
class Course:
    """The micro-batches of one rank, from a step of an epoch to its end.

    Attributes:
        seed: of the run.
        epoch: since the run began.
        first: steps of the run before this epoch.
        start: step of the epoch to begin with.
        steps: of the epoch.
        repeats: how often each image comes, one time after the other.
        lanes: how the epochs of a stream are cut.
    """

    dealing: Dealing
    rank: int
    seed: int
    epoch: int
    first: int
    start: int
    steps: int
    repeats: int = 1
    lanes: Lanes | None = None

    def __len__(self) -> int:
        return (self.steps - self.start) * self.dealing.accumulation

    def size(self, number: int) -> int:
        return self.dealing.batch_per_device

    @property
    def order_seed(self) -> int:
        """Of the epoch's order."""
        return derived_seed(self.seed, "order", self.epoch)

    def parts(self, source: Rows | Stream, worker: int, workers: int) -> Iterator[Part]:
        return (self._of_stream if isinstance(source, Stream) else self._of_table)(source, worker, workers)

    def numbered(self) -> Iterator[tuple[int, int, slice]]:
        """(number, step, part of the global batch) of each micro-batch."""
        slices = self.dealing.slices(self.rank)
        for number in range(len(self)):
            step, micro = divmod(number, len(slices))
            yield number, self.start + step, slices[micro]

    def _seeded(self, sample: Sample, step: int, position: int) -> Sample:
        return sample._replace(seed=derived_seed(self.seed, "crop", self.first + step, position))

    def _of_table(self, rows: Rows, worker: int, workers: int) -> Iterator[Part]:
        order = shuffled(rows.count, self.order_seed, rows.weights).tolist()
        for _, step, part in self.numbered():
            own = evenly(part.stop - part.start, worker, workers)
            found = []
            for offset in own:
                position = part.start + offset
                row = order[(step * self.dealing.global_batch + position) // self.repeats]
                found.append(self._seeded(rows.sample(row), step, position))
            yield Part(list(own), found)

    def _of_stream(self, stream: Stream, worker: int, workers: int) -> Iterator[Part]:
        tracks = Tracks(self, stream, worker, workers)
        try:
            for number, step, part in self.numbered():
                found = Part([], [])
                for offset, position in enumerate(range(part.start, part.stop)):
                    sample = tracks.sample(number, step, position)
                    if sample is not None:
                        found.positions.append(offset)
                        found.samples.append(self._seeded(sample, step, position))
                yield found
        finally:
            tracks.close()


class Tracks:
    """What one worker of a rank reads of an epoch: its windows of the rank's tracks, one of each track in use."""

    def __init__(self, course: Course, stream: Stream, worker: int, workers: int):
        self.course, self.lanes = course, course.lanes
        self.epoch = Epoch(self.lanes, course.order_seed)
        self._stream, self._worker, self._workers = stream, worker, workers
        self._size = course.dealing.global_batch // self.lanes.lanes  # rows of a lane in a global batch
        own = course.dealing.lanes_of(course.rank, self.lanes.lanes)
        tracks = [(lane, track) for lane in own for track in range(self.lanes.tracks)]
        tracks.sort(key=lambda track: self.epoch.segment(*track))  # neighbours share the blocks that are cut
        self._index = {track: index for index, track in enumerate(tracks)}
        self._upcoming = {track: self._windows(track) for track in tracks}
        self._held: dict[tuple[int, int], Held] = {}
        self.ahead = Ahead(stream, heapq.merge(*map(self._loads, tracks), key=lambda load: load[0]))

    def sample(self, number: int, step: int, position: int) -> Sample | None:
        """The sample at a position of a global batch; None: another worker has it."""
        lane, offset = divmod(position, self._size)
        row, turn = divmod(step * self._size + offset, self.course.repeats)
        row, track = divmod(row, self.lanes.tracks)
        held = self._held.get((lane, track))
        while held is None or row >= held.window.last:
            _, window, is_own = next(self._upcoming[lane, track])
            rows = self.ahead.take((lane, track, window.first), number) if is_own else None
            held = self._held[lane, track] = Held(window, self.epoch.shuffled(lane, track, window), rows)
        if held.rows is None:
            return None
        place = int(held.order[row - held.window.first])
        sample = held.rows[place]
        if turn == self.course.repeats - 1:
            held.rows[place] = None  # its bytes are not needed any more
        return sample

    def close(self) -> None:
        self.ahead.close()

    def _windows(self, track: tuple[int, int]) -> Iterator[tuple[int, Window, bool]]:
        """(batch that needs it first, window, whether this worker reads it) of what is left of a track."""
        course, tracks, size = self.course, self.lanes.tracks, self._size
        begin, end = course.start * size // course.repeats, -(-course.steps * size // course.repeats)
        for turn, window in enumerate(self.epoch.windows(*track)):
            first, last = (row * tracks + track[1] for row in (window.first, window.last))  # rows of the lane
            if last <= begin:
                continue
            if first >= end:
                return
            step = max(first * course.repeats // size, course.start)
            batch = (step - course.start) * course.dealing.accumulation
            yield batch, window, self._owner(self._index[track], turn) == self._worker

    def _owner(self, index: int, turn: int) -> int:
        number = len(self._index)
        if number >= self._workers:
            return index * self._workers // number
        return (turn * number + index) % self._workers

    def _loads(self, track: tuple[int, int]) -> Iterator[tuple[int, Hashable, Sequence[Piece]]]:
        for batch, window, is_own in self._windows(track):
            if is_own:
                yield batch, (*track, window.first), window.pieces


class Held(NamedTuple):
    """The window of a track that is in use.

    Attributes:
        order: of its rows.
        rows: as they lie; None: another worker has them.
    """

    window: Window
    order: np.ndarray
    rows: list[Sample | None] | None


@dataclass(frozen=True)
class Scan:
    """Whole batches of rows as they lie, on one rank: those of a range of positions."""

    rows: range
    batch: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def size(self, number: int) -> int:
        return len(self._of(number))

    def _of(self, number: int) -> range:
        return self.rows[number * self.batch : (number + 1) * self.batch]

    def parts(self, source: Rows | Stream, worker: int, workers: int) -> Iterator[Part]:
        return (self._of_stream if isinstance(source, Stream) else self._of_table)(source, worker, workers)

    def _of_table(self, rows: Rows, worker: int, workers: int) -> Iterator[Part]:
        for number in range(len(self)):
            own = evenly(self.size(number), worker, workers)
            yield Part(list(own), [rows.sample(self._of(number)[i]) for i in own])

    def _of_stream(self, stream: Stream, worker: int, workers: int) -> Iterator[Part]:
        """A worker has the rows of every so many blocks."""
        ends = np.cumsum(stream.counts)

        def pieces(number: int) -> Iterator[tuple[int, Piece]]:
            """Positions in the batch where they begin, and the pieces."""
            rows = self._of(number)
            position = rows.start
            for block in range(int(np.searchsorted(ends, position, side="right")), len(ends)):
                first = int(ends[block] - stream.counts[block])
                last = min(int(ends[block]), rows.stop)
                if last > position and block % workers == worker:
                    yield position - rows.start, Piece(block, position - first, last - first)
                position = max(position, last)
                if position == rows.stop:
                    return

        loads = ((number, number, [piece for _, piece in pieces(number)]) for number in range(len(self)))
        ahead = Ahead(stream, loads)
        try:
            for number in range(len(self)):
                places = [first + i for first, piece in pieces(number) for i in range(piece.last - piece.first)]
                yield Part(places, ahead.take(number, number))
        finally:
            ahead.close()


def evenly(count: int, worker: int, workers: int) -> range:
    """The positions of one worker, neighbours of each other."""
    return range(count * worker // workers, count * (worker + 1) // workers)
