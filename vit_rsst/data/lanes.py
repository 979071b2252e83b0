"""The order of a stream's epoch: lanes of tracks over shuffled blocks, as arithmetic alone. Nothing is read here.

A *block* is what is read at once: a row group of a parquet file, or some 8 MB of a tar. Each epoch lays the blocks of a
split end to end on a line, in a new order and without the held-out rows, and cuts the line into `tracks × lanes` equal
segments. A *lane* owns one segment per track and draws from them in turns. Every lane gives the same number of rows to
every global batch, at the same positions: position p belongs to lane p·L // B. Rows are shuffled within *windows*, the
pieces of blocks that a track holds at a time.

So the order follows from the seed, the blocks and the number of lanes, whatever the ranks and workers. A rank reads the
lanes of its positions alone, and finds its place at any step by reading one window per track. All segments are read
side by side, so even shards of one class each are mixed; neighbours come from different tracks, and tracks are paired
anew in each epoch, so they are not neighbours again. An order that does not depend on the number of nodes is MosaicML
Streaming's idea (elastic determinism); WebDataset and timm have none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vit_rsst.errors import InputError
from vit_rsst.seeds import derived_seed

MAX_LANES = 64
MAX_TRACKS = 16  # of a lane

PLACES = 128
"""Windows that an epoch draws from at once, at the least: in batches of 256, blocks of one of 10 classes each then give
0.99 of the class entropy of a full shuffle."""

IN_FLIGHT_BYTES = 4 * 2**30
"""Windows of all lanes together; large blocks make fewer lanes and tracks."""


@dataclass(frozen=True)
class Lanes:
    """How every epoch of a split is cut.

    Attributes:
        counts: rows of each block that belong to the split, int64 (blocks,).
        lanes: equal parts of an epoch; a divisor of the global batch.
        tracks: segments of the line that a lane draws from in turns.
        window: rows that small blocks are joined to before they are shuffled.
    """

    counts: np.ndarray = field(repr=False)
    lanes: int
    tracks: int
    window: int = 1

    @property
    def length(self) -> int:
        """Rows of a lane; what is left of the line, fewer rows than lanes, is dropped."""
        return int(self.counts.sum()) // self.lanes

    @property
    def largest_window(self) -> int:
        """An upper bound of the rows of a window."""
        longest = -(-self.length // self.tracks)
        return int(min(self.counts.max(initial=0) + self.window - 1, longest))

    def order(self, seed: int, global_batch: int) -> np.ndarray:
        """Rows of an epoch's global batches, int64 (steps, global_batch), numbered through in the order of the blocks.

        What a stream delivers, worked out without reading: for measuring how well it is shuffled.
        """
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        epoch, rows = Epoch(self, seed), np.empty((self.lanes, self.length), dtype=np.int64)
        for lane in range(self.lanes):
            for track in range(self.tracks):
                found = []
                for window in epoch.windows(lane, track):
                    here = np.concatenate([np.arange(p.first, p.last) + starts[p.block] for p in window.pieces])
                    found.append(here[epoch.shuffled(lane, track, window)])
                rows[lane, track :: self.tracks] = np.concatenate(found)
        size = global_batch // self.lanes
        steps = self.length // size
        return rows[:, : steps * size].reshape(self.lanes, steps, size).transpose(1, 0, 2).reshape(steps, global_batch)

    def record(self) -> dict[str, int]:
        """What the order follows from besides seed and data, for the record of a run."""
        return {"lanes": self.lanes, "tracks": self.tracks, "window": self.window}


def cut(counts: np.ndarray, block_bytes: int, global_batch: int, buffer: int, lanes: int | None = None) -> Lanes:
    """Derives lanes, tracks and windows from the data, the global batch and the images that may be in flight.

    Args:
        counts: rows of each block, int64 (blocks,).
        block_bytes: of the largest block.
        buffer: images that the windows of all lanes hold; at least two blocks a lane do.
        lanes: as the recipe asks; None: the largest divisor of the global batch that is not above 64 and whose blocks
            fit into 4 GiB.

    Raises:
        InputError: `lanes` does not divide the global batch.
    """
    if lanes is not None and global_batch % lanes:
        divisors = [str(d) for d in range(1, global_batch + 1) if global_batch % d == 0]
        raise InputError(
            f"data.lanes: {lanes} does not divide train.global_batch={global_batch}; choose one of "
            f"{', '.join(divisors)}, or leave it out."
        )
    fitting = max(IN_FLIGHT_BYTES // max(block_bytes, 1), 1)
    if lanes is None:
        lanes = max(d for d in range(1, min(MAX_LANES, fitting) + 1) if global_batch % d == 0)
    rows = max(int(counts.sum()) // max(np.count_nonzero(counts), 1), 1)  # of a block
    wanted = max(-(-PLACES // lanes), buffer // (lanes * rows))
    tracks = max(min(wanted, MAX_TRACKS if wanted > -(-PLACES // lanes) else wanted, fitting // lanes), 1)
    return Lanes(counts, lanes, tracks, max(buffer // (lanes * tracks), 1))


class Piece(NamedTuple):
    """Some rows of a block, from `first` and below `last`, counted among its rows that belong to the split."""

    block: int
    first: int
    last: int


class Window(NamedTuple):
    """Rows of a track that are shuffled together: those of `first` and below `last`."""

    first: int
    last: int
    pieces: tuple[Piece, ...]


class Epoch:
    """One epoch's order."""

    def __init__(self, lanes: Lanes, seed: int):
        self.lanes, self.seed = lanes, seed
        generator = np.random.default_rng(seed)
        self._blocks = generator.permutation(len(lanes.counts))
        self._starts = np.concatenate([[0], np.cumsum(lanes.counts[self._blocks])])  # on the line
        # The line is a ring that is entered anywhere, so that no row is always in the tail that is dropped.
        self._entry = int(generator.integers(max(self._starts[-1], 1)))
        self._shifts = generator.integers(lanes.lanes, size=lanes.tracks)
        self._windows: dict[tuple[int, int], list[Window]] = {}

    def windows(self, lane: int, track: int) -> list[Window]:
        """The windows of a track, in their order."""
        if (lane, track) not in self._windows:
            self._windows[lane, track] = self._cut(lane, track)
        return self._windows[lane, track]

    def shuffled(self, lane: int, track: int, window: Window) -> np.ndarray:
        """The rows of a window in their order, int64: positions within its pieces laid end to end."""
        seed = derived_seed(self.seed, "window", lane, track, window.first)
        return np.random.default_rng(seed).permutation(window.last - window.first)

    def segment(self, lane: int, track: int) -> int:
        """Which segment of the line a track is; neighbours on the line follow each other."""
        return track * self.lanes.lanes + (lane + int(self._shifts[track])) % self.lanes.lanes

    @cached_property
    def _lengths(self) -> list[int]:
        """Rows of the tracks of a lane; the first ones have one more where they do not divide it."""
        tracks = self.lanes.tracks
        return [(self.lanes.length - track + tracks - 1) // tracks for track in range(tracks)]

    def _cut(self, lane: int, track: int) -> list[Window]:
        length = self._lengths[track]
        first = self.lanes.lanes * sum(self._lengths[:track]) + self.segment(lane, track) % self.lanes.lanes * length
        windows, pieces, begin, end = [], [], 0, 0
        for piece in self._pieces(first, length):
            pieces.append(piece)
            end += piece.last - piece.first
            if end - begin >= self.lanes.window:
                windows.append(Window(begin, end, tuple(pieces)))
                pieces, begin = [], end
        if pieces:
            windows.append(Window(begin, end, tuple(pieces)))
        return windows

    def _pieces(self, first: int, length: int) -> Iterator[Piece]:
        total = int(self._starts[-1])
        position, left = (self._entry + first) % max(total, 1), length
        block = int(np.searchsorted(self._starts, position, side="right")) - 1
        while left:
            here = position - int(self._starts[block])
            taken = min(int(self._starts[block + 1]) - position, left)
            if taken:
                yield Piece(int(self._blocks[block]), here, here + taken)
            position, left, block = position + taken, left - taken, block + 1
            if position == total:
                position, block = 0, 0
