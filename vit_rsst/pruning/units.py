"""Units: the smallest structures that are kept or removed as a whole, and the tensor slices they own."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Member:
    """The slices of one tensor that the units of a group own.

    Attributes:
        name: the tensor's name in the state dict, such as `blocks.0.mlp.fc1.weight`.
        dim: the dimension divided among units.
        index: int64, (units, span): unit u owns the slices `index[u]` along `dim`.
    """

    name: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Site:
    """Where the output of units can be observed: at the input of the module that consumes it.

    Attributes:
        module: name of the consumer, such as `blocks.0.mlp.fc2` or `blocks.0.attn.proj`.
        index: int64, (units, span): the input features (or channels) that come from each unit.
    """

    module: str
    index: Tensor


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind in one module, the smallest set in which they compete.

    Attributes:
        name: of the module that holds them, such as `blocks.0.attn`.
        kind: head, neuron or channel.
        depth: index of the block in the network, from 0.
        members: slices of prunable weights, to which masks and scores apply.
        vectors: slices of biases and norms that are removed with a unit when the model is shrunk. Masks need not cover
            them: the consumer's columns are masked, so they have no effect.
        site: where the units' output is consumed.
    """

    name: str
    kind: str
    depth: int
    members: tuple[Member, ...]
    vectors: tuple[Member, ...] = field(repr=False)
    site: Site = field(repr=False)

    @property
    def units(self) -> int:
        return len(self.site.index)


def depths(names: Iterable[str]) -> list[int]:
    """Index of the block of each module or weight, counting the blocks among the names: usually 3 for `blocks.3.attn`
    and `blocks.3.mlp.fc1.weight`."""
    blocks = [match.group(1) if (match := re.match(r"(.*\.\d+)(\.|$)", name)) else name for name in names]
    order = {block: position for position, block in enumerate(dict.fromkeys(blocks))}
    return [order[block] for block in blocks]
