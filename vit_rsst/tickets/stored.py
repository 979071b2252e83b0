"""Tensors in safetensors files, of which only the rows that are asked for are read.

They stand in for whole tensors in host memory wherever those are copied into a model; see `shards.Source`.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vit_rsst.pruning.masks import unpack_bits
from vit_rsst.shards import Source


@dataclass(frozen=True)
class Stored:
    """A tensor in an open safetensors file."""

    file: safe_open = field(repr=False)
    name: str

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @cached_property
    def dtype(self) -> torch.dtype:
        return self[:0].dtype

    def __getitem__(self, rows: slice) -> Tensor:
        """A copy of some rows, or of the only number."""
        # What safetensors returns is a window on the file, which may be deleted and would count as memory.
        return (self.file.get_slice(self.name)[rows] if self.shape else self.file.get_tensor(self.name)).clone()


def stored(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file by name, and the strings of its header. The file stays open as long as one of them lives.

    Raises:
        SafetensorError, OSError: it is not readable.
    """
    file = safe_open(path, "pt")
    return {name: Stored(file, name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


@dataclass(frozen=True)
class Packed:
    """A pruned weight as a ticket holds it: the kept values, row-major, and the bits of its mask."""

    values: Source
    bits: Source
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows, zero where masked. Of the mask, those above are read too: they say where the values begin."""
        start, stop, _ = rows.indices(self.shape[0])
        above = int(unpack_bits(self.bits, self.shape, slice(0, start)).sum())
        alive = unpack_bits(self.bits, self.shape, slice(start, stop))
        values = self.values[above : above + int(alive.sum())]
        return torch.zeros(alive.shape, dtype=values.dtype).masked_scatter_(alive, values)
