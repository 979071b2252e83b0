"""Shards: tensors of which every rank holds some rows, as FSDP2 leaves them (a DTensor divided along dimension 0).

Every function leaves plain tensors as they are, so callers need not know whether weights are sharded. Elementwise
operations of torch work on shards as on whole tensors. A sum of a shard is one over its own rows as soon as `int()`,
`float()` or `bool()` reads it: sums are taken of `local` rows, and added up by `total`.
What is marked collective communicates if the tensor is sharded: all ranks call it, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class Source(Protocol):
    """A whole tensor whose rows can be taken: in memory, or in a file, of which only those are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def is_sharded(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes 0.5 s; without it there are no shards
    return module is not None and isinstance(tensor, module.DTensor)


def is_divided_by_rows(tensor: Tensor) -> bool:
    """Whether it is sharded in the way that this module understands: along dimension 0, over one group of ranks."""
    return is_sharded(tensor) and tensor.device_mesh.ndim == 1 and tensor.placements[0].is_shard(0)


def is_fsdp(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether FSDP2 gathers the weights of a module for its forward pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """The rows that this rank holds, detached; they share memory with the tensor."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return [local(tensor) for tensor in tensors]


def rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor this rank holds: equal parts, rounded up, so the last ranks may hold none."""
    if not is_sharded(tensor):
        return slice(None)
    number, mesh = tensor.shape[0], tensor.device_mesh
    size = -(-number // mesh.size())
    start = min(mesh.get_local_rank() * size, number)
    return slice(start, min(start + size, number))


def within(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Those of `index` along `dim` that lie in the rows of this rank, counted from its first."""
    if dim or not is_sharded(tensor):
        return index
    own = rows(tensor)
    return index[(index >= own.start) & (index < own.stop)] - own.start


def like(own: Tensor, tensor: Tensor) -> Tensor:
    """Inverse of `local`: rows of this rank, of any type, as a shard of a whole of the shape of `tensor`."""
    if not is_sharded(tensor):
        return own
    shape, stride = tensor.shape, torch.empty(tensor.shape, device="meta").stride()
    spread = {"device_mesh": tensor.device_mesh, "placements": tensor.placements}
    return type(tensor.data).from_local(own, **spread, run_check=False, shape=shape, stride=stride)


def part(whole: Source, tensor: Tensor) -> Tensor:
    """The rows of a whole tensor that this rank holds of `tensor`; a copy, unless that is all of one in memory."""
    taken = _taken(whole, tensor)
    return taken.clone() if isinstance(whole, Tensor) and is_sharded(tensor) else taken


def _taken(whole: Source, tensor: Tensor) -> Tensor:
    """As `part`; a view of what is in memory."""
    return whole if isinstance(whole, Tensor) and not is_sharded(tensor) else whole[rows(tensor)]


def placed(whole: Source, tensor: Tensor) -> Tensor:
    """A whole tensor on the device of `tensor`, sharded like it."""
    return like(part(whole, tensor).to(tensor.device), tensor)


def whole(tensor: Tensor) -> Tensor:
    """All rows, on every rank; collective."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], copies: bool = False) -> Mapping[str, Tensor]:
    """Whole tensors in the host memory of rank 0; collective. Other ranks, which drop each at once, get those that are
    not sharded alone.

    Args:
        copies: rank 0 gets copies of those that are not sharded too, so that nothing else holds what it gets.
    """
    found = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            complete = whole(tensor)
            if distributed.get_rank() == 0:
                found[name] = complete.cpu()
        else:
            found[name] = tensor.detach().to("cpu", copy=True) if copies else tensor
    return found


def total(number: Tensor, tensor: Tensor) -> Tensor:
    """Sum of a plain tensor over the ranks that `tensor` is divided among; collective."""
    if not is_sharded(tensor):
        return number
    summed = number.clone()
    distributed.all_reduce(summed, group=tensor.device_mesh.get_group())
    return summed


def before(number: Tensor, tensor: Tensor) -> Tensor:
    """Sum of a plain tensor over the ranks that hold earlier rows of `tensor`; collective."""
    if not is_sharded(tensor):
        return torch.zeros_like(number)
    rank, world = tensor.device_mesh.get_local_rank(), tensor.device_mesh.size()
    ours = torch.zeros(world, *number.shape, dtype=number.dtype, device=number.device)
    ours[rank] = number
    return total(ours, tensor)[:rank].sum(0)


def same(number: Tensor, tensor: Tensor) -> Tensor:
    """A plain tensor as the first rank has it; collective. Ranks that compute the same on other hardware may differ."""
    if is_sharded(tensor):
        device, group = torch.device(tensor.device_mesh.device_type), tensor.device_mesh.get_group()
        told = number.to(device, copy=True)
        distributed.broadcast(told, group=group, group_src=0)
        return told.to(number.device)
    return number


def in_step(
    batches: Iterable[tuple[Tensor, Tensor]], filler: Tensor, give_up: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches, then `filler` without labels until every rank has seen all of its own; collective.

    A forward pass through sharded weights gathers them, so either all ranks compute or none does.

    Args:
        filler: images of any one batch.
        give_up: once it is true on one rank, batches end on all.
    """
    own, no_labels = iter(batches), torch.zeros(0, dtype=torch.int64, device=filler.device)
    while True:
        batch = next(own, None)
        flags = torch.tensor([batch is not None, give_up()], dtype=torch.int64, device=filler.device)
        distributed.all_reduce(flags)
        number_left, is_over = flags.tolist()
        if is_over or not number_left:
            return
        yield (filler, no_labels) if batch is None else batch


def in_memory(whole: Source) -> Tensor:
    """All of a whole tensor."""
    return whole if isinstance(whole, Tensor) else whole[:]


@torch.no_grad()
def load_(tensor: Tensor, source: Source) -> None:
    """Copies a whole tensor into a tensor or, of its rows, those that this rank holds."""
    local(tensor).copy_(_taken(source, tensor))


def load_state_(net: nn.Module, state: Mapping[str, Source]) -> None:
    """Copies whole tensors into a network, one at a time; each rank the rows that it holds."""
    for name, tensor in net.state_dict().items():
        load_(tensor, state[name])


def reshard_(net: nn.Module) -> None:
    """Frees the weights that FSDP2 has gathered for a forward pass without a backward pass.

    FSDP2 keeps those of the outermost module for the backward pass. The next forward pass would use them again, without
    what has since been written to the shards.
    """
    for module in net.modules():
        if is_fsdp(module):
            module.reshard()
