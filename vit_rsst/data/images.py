"""The images of a run in three splits, decoded into memory on demand."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from vit_rsst import machine
from vit_rsst.data.decoding import Corrupt, Decoded, Decoder, Sample, decode
from vit_rsst.data.options import DataOptions
from vit_rsst.data.streams import Stream
from vit_rsst.data.tables import Rows, Split, balanced_rows
from vit_rsst.errors import MissingRequirement

PART = 64
"""Images that one thread decodes at a time."""


@dataclass(frozen=True)
class ImageData:
    """A source, opened and split but not decoded; `train`, `val` and `test` are decoded on first use.

    Attributes:
        rows: split name → rows of a table, or a stream.
        classes: names of the classes, by label.
        identity: identifies the dataset; recorded with the run.
        told: a line per split, and what was not read and why.
    """

    options: DataOptions
    rows: dict[str, Rows | Stream]
    classes: tuple[str, ...]
    identity: dict = field(repr=False)
    told: tuple[str, ...] = ()

    def count(self, split: str) -> int | None:
        """Number of images; None for a stream of unknown length."""
        return self.rows[split].count

    def decoder(self, split: str) -> Decoder:
        """Decodes the samples of a split, center-cropped."""
        rows = self.rows[split]
        images = rows.table.images if isinstance(rows, Rows) else None
        options = self.options
        return Decoder(
            options.size, images, options.max_pixels, options.resampling, options.crop_share, options.crop_mode
        )

    def samples(self, split: str, in_memory: bool | None = None, share: float = 0.4) -> Split | Rows | Stream:
        """A split decoded into memory, or as it is read.

        Args:
            in_memory: None: if it takes at most a `share` of free memory. Never for a stream, nor where corrupt images
                are tolerated, which are counted as they are read.
        """
        rows = self.rows[split]
        if isinstance(rows, Stream) or self.options.max_corrupt:
            return rows
        wanted = self._bytes(split) <= share * machine.available_memory() if in_memory is None else in_memory
        return getattr(self, split) if wanted else rows

    def _bytes(self, split: str) -> int:
        return self.count(split) * 3 * self.options.size**2

    def decode(self, split: str) -> Split:
        """Decodes one split into memory, on all cores.

        Raises:
            MissingRequirement: it takes more memory than is free.
            Corrupt: an image cannot be decoded.
        """
        rows = self.rows[split]
        free = machine.available_memory()
        if self._bytes(split) > 0.7 * free:
            raise MissingRequirement(
                f"data: {rows.count:,} images at {self.options.size} px take {self._bytes(split) / 2**30:.1f} GiB "
                f"decoded, and {free / 2**30:.1f} GiB of memory are free; set data.in_memory=false, or use a part "
                "(data.train_samples) or smaller images (data.image_size)."
            )
        return self._decoded(split, list(rows.walk(None)))

    def balanced(self, split: str, number: int, seed: int) -> Split:
        """`number` images in memory, as many of each class as there are, drawn by the seed; all where that is fewer."""
        rows = self.rows[split]
        if isinstance(rows, Rows):
            chosen = balanced_rows(rows.labels, number, seed)
            samples = list(replace(rows, index=rows.index[chosen.numpy()]).walk(None))
        else:
            samples = _first_of_each_class(rows.walk(seed), number, len(self.classes))
        return self._decoded(split, samples)

    def _decoded(self, split: str, samples: list[Sample]) -> Split:
        """The samples in memory, less the corrupt ones where some are tolerated."""
        decoder = self.decoder(split)
        images = torch.empty((len(samples), 3, self.options.size, self.options.size), dtype=torch.uint8)

        def decode_part(start: int) -> Decoded:
            part = decoder.__getitems__(samples[start : start + PART])
            place = images[start : start + len(part.images)]
            return part._replace(images=place.copy_(part.images))

        with ThreadPoolExecutor(max(machine.cores() // machine.local_processes(1), 1)) as pool:
            parts = list(pool.map(decode_part, range(0, len(samples), PART)))
        problems = [problem for part in parts for problem in part.problems]
        if problems and not self.options.max_corrupt:
            raise Corrupt(problems[0])
        if problems:
            images = torch.cat([part.images for part in parts])
        return Split(images, torch.cat([part.labels for part in parts]))

    @cached_property
    def train(self) -> Split:
        return self.decode("train")

    @cached_property
    def val(self) -> Split:
        return self.decode("val")

    @cached_property
    def test(self) -> Split:
        return self.decode("test")


def _first_of_each_class(samples: Iterator[Sample], number: int, num_classes: int) -> list[Sample]:
    """As many of each class, as a stream brings them."""
    wanted = -(-number // num_classes)
    seen: dict[int, int] = {}

    def is_wanted(sample: Sample) -> bool:
        seen[sample.label] = seen.get(sample.label, 0) + 1
        return seen[sample.label] <= wanted

    return list(islice(filter(is_wanted, samples), number))


def decode_file(path: Path, options: DataOptions) -> np.ndarray:
    """An image file as uint8 (3, size, size), prepared as the images of the source are.

    Raises:
        Corrupt: the file cannot be read as an image.
    """
    image = {"bytes": None, "path": str(path)}
    return decode(image, options.size, str(path), options.max_pixels, None, options.resampling, options.crop_share)
