"""Splits with random access: encoded rows of a table, or images decoded in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vit_rsst.data.decoding import Encoded, Sample


@dataclass(frozen=True)
class Table:
    """One split as it lies on disk: encoded images (or arrays) and integer labels.

    Attributes:
        labels: int64 (rows,); −1 where there is none.
        digest: identifies the content.
        place: how messages refer to a row; sent to workers.
    """

    images: Sequence[Encoded]
    labels: np.ndarray
    classes: tuple[str, ...]
    digest: str = ""
    place: Callable[[int], str] = "row {}".format

    @property
    def is_unlabelled(self) -> bool:
        """Whether there are rows, and none has a label."""
        return len(self.labels) > 0 and bool((self.labels < 0).all())


@dataclass(frozen=True)
class Rows:
    """Rows of a table, with random access.

    Attributes:
        weights: relative sampling weights, float64 (rows,); None: each row once per epoch.
    """

    name: str
    table: Table
    index: np.ndarray
    weights: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> Tensor:
        """int64, shape (rows,)."""
        return torch.from_numpy(self.table.labels[self.index].astype(np.int64))

    def part(self, positions: range) -> "Rows":
        """Some of the rows, neighbours of each other."""
        return replace(self, index=self.index[positions.start : positions.stop])

    def walk(self, seed: int | None, start: int = 0) -> Iterator[Sample]:
        """The rows in the order of a seed, or as they lie, from position `start` on."""
        if seed is None:
            order = range(start, self.count)
        else:
            order = shuffled(self.count, seed, self.weights)[start:].tolist()
        return map(self.sample, order)

    def sample(self, i: int) -> Sample:
        """One of the rows."""
        row = int(self.index[i])
        return Sample(self.table.place(row), row, int(self.table.labels[row]))


@dataclass(frozen=True)
class Split:
    """Images in memory: uint8, shape (samples, 3, size, size); labels int64, shape (samples,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def shuffled(count: int, seed: int, weights: Tensor | None = None) -> Tensor:
    """Row order of an epoch for a seed, int64 (count,): each row once, or drawn with replacement by weight."""
    generator = torch.Generator().manual_seed(seed)
    if weights is None:
        return torch.randperm(count, generator=generator)
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def class_balanced(labels: Tensor) -> Tensor:
    """Row weights that sample all classes equally often, float64 (rows,)."""
    return 1.0 / torch.bincount(labels).double()[labels]


def balanced_rows(labels: Tensor, number: int, seed: int) -> Tensor:
    """`number` rows drawn by the seed, balanced over classes as far as possible; all rows if there are fewer."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = labels.cpu()[order]
    turn = torch.zeros_like(drawn)  # first, second … of its class
    for label in drawn.unique():
        of_class = (drawn == label).nonzero().flatten()
        turn[of_class] = torch.arange(len(of_class))
    return order[torch.argsort(turn, stable=True)][:number]
