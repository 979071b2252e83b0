"""MaskSet: which elements of which weights are alive. Mask sets are immutable; every operation returns a new one."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vit_rsst import shards


@dataclass(frozen=True)
class MaskSet:
    """Weight name → bool tensor shaped like the weight, and sharded like it; True means alive.

    Counts, fingerprints and packed bits are those of whole masks, and collective if weights are sharded.
    """

    masks: Mapping[str, Tensor]

    @classmethod
    def full(cls, weights: Mapping[str, Tensor]) -> "MaskSet":
        """Everything alive, on the devices of `weights`."""
        return cls({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def tensors(self) -> list[Tensor]:
        """The bool tensors, in name order."""
        return list(self.masks.values())

    def _combine(self, other: "MaskSet", op: Callable[[Tensor, Tensor], Tensor]) -> "MaskSet":
        assert list(self) == list(other), "masks of different weights"
        return MaskSet({name: op(mask, other[name]) for name, mask in self.masks.items()})

    def __and__(self, other: "MaskSet") -> "MaskSet":
        return self._combine(other, torch.logical_and)

    def __or__(self, other: "MaskSet") -> "MaskSet":
        return self._combine(other, torch.logical_or)

    def __invert__(self) -> "MaskSet":
        return MaskSet({name: ~mask for name, mask in self.masks.items()})

    def minus(self, other: "MaskSet") -> "MaskSet":
        """Alive here and not in `other`."""
        return self._combine(other, lambda a, b: a & ~b)

    def nested_in(self, other: "MaskSet") -> bool:
        """Whether everything alive here is alive in `other`."""
        return not self.minus(other).num_alive

    @property
    def num_alive(self) -> int:
        return sum(self._counts())

    def _counts(self) -> list[int]:
        """Alive elements of each mask."""
        if not self.masks:
            return []
        masks = self.tensors()
        counts = torch.stack([shards.local(mask).sum() for mask in masks])
        return shards.total(counts, masks[0]).tolist()

    @property
    def num_elements(self) -> int:
        return sum(mask.numel() for mask in self.tensors())

    @cached_property
    def is_full(self) -> bool:
        """Whether everything is alive, so there is nothing to enforce; cached."""
        return self.num_alive == self.num_elements

    @property
    def density(self) -> float:
        """Fraction of prunable elements that are alive."""
        return self.num_alive / self.num_elements

    def layers(self) -> dict[str, dict[str, float]]:
        """Per weight: elements, alive elements, density."""
        return {
            name: {"elements": mask.numel(), "alive": alive, "density": alive / mask.numel()}
            for (name, mask), alive in zip(self.masks.items(), self._counts(), strict=True)
        }

    def gathered(self) -> "MaskSet":
        """Whole masks on rank 0; see `shards.gathered`."""
        return MaskSet(shards.gathered(self.masks))

    def pack(self) -> dict[str, Tensor]:
        """Packed bits, row-major, most significant first: uint8 of ceil(elements / 8) bytes per weight, on the CPU."""
        return {name: pack_bits(shards.whole(mask)) for name, mask in self.masks.items()}

    @classmethod
    def unpack(cls, packed: Mapping[str, shards.Source], like: Mapping[str, Tensor]) -> "MaskSet":
        """Inverse of `pack`, with the shapes, shards and devices of `like`; a rank unpacks the rows that it holds."""
        own = {name: unpack_bits(packed[name], w.shape, shards.rows(w)) for name, w in like.items()}
        return cls({name: shards.like(own[name].to(w.device), w) for name, w in like.items()})

    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the sha256 over names and bits; equal masks have equal fingerprints."""
        digest = hashlib.sha256()
        for name, bits in self.pack().items():
            digest.update(name.encode() + b"\0")
            digest.update(bits.numpy().tobytes())
        return digest.hexdigest()[:16]


def pack_bits(mask: Tensor) -> Tensor:
    """One bool tensor of any shape as uint8 bits."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def unpack_bits(bits: shards.Source, shape: tuple[int, ...], rows: slice = slice(None)) -> Tensor:
    """Inverse of `pack_bits` for rows of a tensor of `shape`, which has a dimension; reads the bytes that hold them."""
    assert bits.shape[0] == -(-math.prod(shape) // 8), "bits of another shape"
    start, stop, _ = rows.indices(shape[0])
    width = math.prod(shape[1:])
    first, last = start * width, stop * width
    skipped = first % 8
    read = bits[first // 8 : -(-last // 8)].cpu().numpy()
    own = np.unpackbits(read, count=skipped + last - first)[skipped:]
    return torch.from_numpy(own.astype(bool)).reshape(stop - start, *shape[1:])
