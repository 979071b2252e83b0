"""A split that is read row after row, never as a whole: shards in a seeded order, mixed by a buffer.

The order is a function of the seed alone. Every rank reads the same undecoded stream and decodes its own rows, so that
steps are equal on all ranks whatever the shards are, no row is seen twice, and a resumed run finds its place by
counting. `datasets` could shuffle too, but its buffer loses rows when it is resumed, holds a stream that is given up
for seconds, and its order differs between versions.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit_rsst.data.columns import Columns
from vit_rsst.data.decoding import Sample
from vit_rsst.data.locate import Located
from vit_rsst.errors import InputError

if TYPE_CHECKING:
    from datasets import IterableDataset

OPEN_SHARDS = 8
"""Shards that are read in turns, so that the buffer mixes even shards of one class each."""

READ_ROWS = 64


@dataclass(frozen=True)
class Shard:
    """One file of a stream; `rows` gives arrow tables of undecoded images and labels, unless `labels` are known."""

    name: str
    rows: "IterableDataset"
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Stream:
    """The rows of a split whose place lies in a part of 0 … 1.

    Attributes:
        part: from and below; the place of a row is a hash of its id, so that every reader agrees without talking.
        buffer: images that are drawn from at random; encoded, in host memory.
        count: rows of the part; None where that is not known without reading everything.
    """

    shards: tuple[Shard, ...]
    columns: Columns
    part: tuple[float, float]
    buffer: int
    count: int | None

    def walk(self, seed: int | None, start: int = 0) -> Iterator[Sample]:
        """The rows in the order of a seed, or as they lie, from position `start` on; skipped rows are not decoded.

        Raises:
            InputError: a label that no class has.
        """
        if seed is None:
            return islice((row for shard in self.shards for row in self._rows(shard)), start, None)
        generator = random.Random(seed)
        shards = list(self.shards)
        generator.shuffle(shards)
        return islice(mixed(in_turns(map(self._rows, shards), OPEN_SHARDS), self.buffer, generator), start, None)

    def _rows(self, shard: Shard) -> Iterator[Sample]:
        row = 0
        for table in shard.rows.iter(batch_size=READ_ROWS):
            images, labels = (table[name].to_pylist() for name in (self.columns.image, self.columns.label))
            for image, label in zip(images, labels, strict=True):
                place = f"{shard.name}:{row}"
                label = label if shard.labels is None else int(shard.labels[row])
                row += 1
                if self.part == (0.0, 1.0) or self.part[0] <= share_of(place) < self.part[1]:
                    yield Sample(place, image, self._checked(label, place))

    def _checked(self, label: int | None, place: str) -> int:
        if label is None or not 0 <= label < len(self.columns.classes):
            raise InputError(
                f"data: label {label} in {place} is not among the {len(self.columns.classes)} classes; mend the row, "
                "or set data.num_classes or data.label_column."
            )
        return label


def share_of(place: str) -> float:
    """A number in 0 … 1 for a row, the same for every seed and every reader."""
    return int.from_bytes(blake2b(place.encode(), digest_size=8).digest(), "big") / 2**64


def in_turns(sources: Iterator[Iterator], number: int) -> Iterator:
    """One row of each of `number` sources in turns; one that has ended is followed by the next."""
    going = list(islice(sources, number))
    while going:
        for i, source in enumerate(going):
            for row in source:
                yield row
                break
            else:
                going[i] = next(sources, None)
        going = [source for source in going if source is not None]


def mixed(rows: Iterator, size: int, generator: random.Random) -> Iterator:
    """Rows in a random order: each is drawn from the `size` that were read last and are left."""
    buffer = list(islice(rows, size))
    for row in rows:
        i = generator.randrange(size)
        yield buffer[i]
        buffer[i] = row
    generator.shuffle(buffer)
    yield from buffer


def open_stream(located: Located, columns: Columns, root: str | None, part: tuple[float, float], buffer: int) -> Stream:
    """The part of a split as a stream.

    Args:
        root: folder that the names of shards are told from; None: their own folder.
    """
    from datasets import Image

    wanted = located.rows.select_columns([columns.image, columns.label])
    undecoded = wanted.cast_column(columns.image, Image(decode=False)).with_format("arrow")
    number = undecoded.num_shards
    names = located.files if len(located.files) == number else tuple(map(str, range(number)))
    known = columns.labels or {}
    shards = tuple(
        Shard(_name(name, root), undecoded.shard(num_shards=number, index=i), known.get(name))
        for i, name in enumerate(names)
    )
    return Stream(shards, columns, part, buffer, _count(shards, located.files, part))


def _name(file: str, root: str | None) -> str:
    path, folder = Path(file), Path(root).expanduser() if root else None
    return path.relative_to(folder).as_posix() if folder and path.is_relative_to(folder) else path.name


def _count(shards: tuple[Shard, ...], files: tuple[str, ...], part: tuple[float, float]) -> int | None:
    """Rows of the part, from the footers of parquet files and the hashes of ids."""
    if len(files) != len(shards) or not all(file.endswith(".parquet") for file in files):
        return None
    with ThreadPoolExecutor(16) as pool:
        rows = list(pool.map(_parquet_rows, files))
    if part == (0.0, 1.0):
        return sum(rows)
    places = (f"{shard.name}:{row}" for shard, number in zip(shards, rows, strict=True) for row in range(number))
    return sum(part[0] <= share_of(place) < part[1] for place in places)


def _parquet_rows(file: str) -> int:
    import fsspec
    from pyarrow.parquet import read_metadata

    with fsspec.open(file) as opened:
        return read_metadata(opened).num_rows
