"""A split that is read block after block, never as a whole, and of which no rank reads more than it needs.

`blocks.py` says what is read at once and reads it, `lanes.py` in which order; here the two meet. A row's id is
`file:row`; rows are held out by a hash of it, so that every reader knows without reading which rows are whose.
"""

import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b

import numpy as np

from vit_rsst.data.blocks import Block, Fields, Reader, list_blocks
from vit_rsst.data.columns import Columns
from vit_rsst.data.decoding import Sample
from vit_rsst.data.lanes import Lanes, Piece, cut
from vit_rsst.data.locate import Located
from vit_rsst.errors import InputError

AHEAD_BYTES = 64 * 2**20

READER_BYTES = AHEAD_BYTES + Reader.KEPT_BYTES
"""What a worker holds besides its windows in use and the block that it reads."""


@dataclass(frozen=True)
class Stream:
    """The rows of a split whose place lies in a part of 0 … 1.

    Attributes:
        part: from and below; the place of a row is a hash of its id.
        buffer: images that the windows of all lanes hold together; encoded, in host memory.
        ahead_bytes: of windows that a reader, here or in a worker, loads before they are needed.
    """

    blocks: tuple[Block, ...] = field(repr=False)
    columns: Columns
    part: tuple[float, float]
    buffer: int
    ahead_bytes: int = AHEAD_BYTES

    @property
    def count(self) -> int:
        """Rows of the part."""
        return int(self.counts.sum())

    @cached_property
    def counts(self) -> np.ndarray:
        """Rows of each block that belong to the part, int64 (blocks,)."""
        return np.asarray([len(self.kept(block)) for block in self.blocks], dtype=np.int64)

    def kept(self, block: Block) -> np.ndarray:
        """Numbers of the rows of a block that belong to the part, int64."""
        if self.part == (0.0, 1.0):
            return np.arange(block.rows)
        shares = shares_of(block.shard.name, block.first, block.rows)
        return np.flatnonzero((shares >= self.part[0]) & (shares < self.part[1]))

    @property
    def num_bytes(self) -> int:
        """Of the rows of the part, estimated from their blocks."""
        blocks = zip(self.blocks, self.counts.tolist(), strict=True)
        return sum(block.num_bytes * count // max(block.rows, 1) for block, count in blocks)

    @property
    def largest_block(self) -> int:
        """Bytes of the largest block."""
        return max((block.num_bytes for block in self.blocks), default=0)

    def cut(self, global_batch: int, lanes: int | None = None) -> Lanes:
        """How the epochs of a training are cut.

        Raises:
            InputError: `lanes` does not divide the global batch.
        """
        return cut(self.counts, self.largest_block, global_batch, self.buffer, lanes)

    def reader(self) -> Reader:
        return Reader(Fields(self.columns.image, self.columns.label))

    def walk(self, seed: int | None, start: int = 0) -> Iterator[Sample]:
        """The rows as they lie, from position `start` on; with a seed, block after block in an order drawn from it.

        Raises:
            InputError: a label that no class has; a file that has changed or is damaged.
            MissingRequirement: the network does not answer.
        """
        reader, order = self.reader(), np.arange(len(self.blocks))
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        for number in order.tolist():
            if start >= self.counts[number]:
                start -= int(self.counts[number])
                continue
            samples = self.samples(reader, number)
            if seed is not None:
                samples = [samples[i] for i in np.random.default_rng((seed, number)).permutation(len(samples))]
            yield from samples[start:]
            start = 0

    def samples(self, reader: Reader, number: int, first: int = 0, last: int | None = None) -> list[Sample]:
        """Rows of a block that belong to the part, as they lie: those from `first` and below `last` of them."""
        block = self.blocks[number]
        rows = self.kept(block)[first:last].tolist()
        images, labels = reader.read(block, is_shared=len(rows) < self.counts[number])
        known = (self.columns.labels or {}).get(block.shard.file)
        if known is not None:
            labels = known[block.first : block.first + block.rows].tolist()
        places = ((row, f"{block.shard.name}:{block.first + row}") for row in rows)
        return [Sample(place, images[row], self._checked(labels[row], place)) for row, place in places]

    def load(self, reader: Reader, pieces: Iterable[Piece]) -> list[Sample]:
        """The rows of some pieces of blocks, as they lie."""
        return [sample for piece in pieces for sample in self.samples(reader, *piece)]

    def _checked(self, label: int | None, place: str) -> int:
        if label is None or not 0 <= label < len(self.columns.classes):
            raise InputError(
                f"data: label {label} in {place} is not among the {len(self.columns.classes)} classes; correct the "
                "row, or set data.num_classes or data.label_column."
            )
        return label


@lru_cache(maxsize=2**16)
def shares_of(name: str, first: int, rows: int) -> np.ndarray:
    """The places of some rows of a file, float64 (rows,)."""
    return np.asarray([share_of(f"{name}:{row}") for row in range(first, first + rows)])


def share_of(place: str) -> float:
    """A number in 0 … 1 for a row, the same for every seed and every reader."""
    return int.from_bytes(blake2b(place.encode(), digest_size=8).digest(), "big") / 2**64


def open_stream(located: Located, columns: Columns, root: str | None, part: tuple[float, float], buffer: int) -> Stream:
    """The part of a split as a stream.

    Args:
        root: folder that the names of shards are told from; None: their own folder.

    Raises:
        InputError: a row group of more than 512 MB; a tar that is cut short.
        MissingRequirement: the network does not answer.
    """
    return Stream(list_blocks(located.files, root, Fields(columns.image, columns.label)), columns, part, buffer)


class Ahead:
    """Loads pieces of blocks in a thread, in the order in which they are needed, some of them before they are.

    Attributes:
        reader: counts what it has read.
    """

    def __init__(self, stream: Stream, loads: Iterator[tuple[int, Hashable, Sequence[Piece]]]):
        """Begins to load.

        Args:
            loads: number of the batch that needs it first, name, pieces; in the order of the batches.
        """
        self.reader = stream.reader()
        self._stream, self._loads = stream, loads
        self._found: dict[Hashable, list[Sample]] = {}
        self._bytes: dict[Hashable, int] = {}
        self._batch, self._is_closed = -1, False
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def take(self, name: Hashable, batch: int) -> list[Sample]:
        """What was loaded under a name, waiting for it.

        Args:
            batch: that is being made; loads of batches up to it do not wait for room.

        Raises:
            RunError: it cannot be read.
        """
        with self._changed:
            self._batch = max(self._batch, batch)
            self._changed.notify_all()
            self._changed.wait_for(lambda: name in self._found or self._failure is not None)
            if name not in self._found and self._failure is not None:
                raise self._failure
            del self._bytes[name]
            self._changed.notify_all()
            return self._found.pop(name)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for batch, name, pieces in self._loads:
                if not self._has_room(batch):
                    return
                rows = self._stream.load(self.reader, pieces)
                with self._changed:
                    self._found[name], self._bytes[name] = rows, self._size(pieces)
                    self._changed.notify_all()
        except Exception as failure:  # it is raised where the rows are taken
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _has_room(self, batch: int) -> bool:
        """Waits until a load of a batch may begin; False: it was closed."""
        limit = self._stream.ahead_bytes
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or batch <= self._batch or sum(self._bytes.values()) < limit)
            return not self._is_closed

    def _size(self, pieces: Sequence[Piece]) -> int:
        blocks = self._stream.blocks
        return sum(blocks[p.block].num_bytes * (p.last - p.first) // max(blocks[p.block].rows, 1) for p in pieces)
