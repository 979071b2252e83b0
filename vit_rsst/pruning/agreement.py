"""Keeping ranks in sync: rank 0 selects and broadcasts masks, fingerprints are compared, buffers come from rank 0."""

from collections import defaultdict
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, gather_object
from torch import Tensor, nn

from vit_rsst import shards
from vit_rsst.errors import RunError
from vit_rsst.pruning.masks import MaskSet

MIXER = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd multiplier that spreads positions over 64 bits (multiplicative hashing; Knuth, TAOCP 3, section 6.4)."""


def agreed(select: Callable[[], MaskSet], like: MaskSet) -> MaskSet:
    """The mask that rank 0 selects, on every rank; of sharded weights all ranks select together.

    Args:
        select: computes the mask; called on rank 0 only, so it communicates for sharded weights alone.
        like: masks of the same weights, for names, shapes and device.
    """
    state = PartialState()
    if state.num_processes == 1 or any(map(shards.is_sharded, like.tensors())):
        return select()
    packed: dict[str, Tensor] = (select() if state.is_main_process else like).pack()
    return MaskSet.unpack(broadcast({name: bits.to(state.device) for name, bits in packed.items()}), like.masks)


def fingerprints(mask: MaskSet) -> list[str]:
    """Fingerprints of the mask on all ranks.

    Raises:
        RuntimeError: they differ, so the ranks would train different networks.
    """
    found = gather_object([mask.fingerprint()])
    if len(set(found)) > 1:
        raise RuntimeError(f"the masks differ between ranks: {found}")
    return found


def share_buffers_(model: nn.Module) -> None:
    """Broadcasts rank 0's buffers, as DDP does before the next forward pass; one broadcast per dtype."""
    if PartialState().num_processes == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            by_type[buffer.dtype].append(buffer)
    for buffers in by_type.values():
        shared = broadcast(torch.cat([buffer.flatten() for buffer in buffers])).split([b.numel() for b in buffers])
        for buffer, values in zip(buffers, shared, strict=True):
            buffer.copy_(values.view_as(buffer))


def check_same_weights(model: nn.Module) -> None:
    """Compares every tensor of the model that each rank holds whole, bit for bit. Collective.

    Raises:
        RunError: they differ, so the ranks train different networks; names the first tensor and rank.
    """
    if PartialState().num_processes == 1:
        return
    state = {name: tensor for name, tensor in model.state_dict().items() if not shards.is_sharded(tensor)}
    if not state:
        return
    prints = torch.stack([bits_sum(tensor) for tensor in state.values()])  # (tensors,)
    found = gather(prints[None])  # (ranks, tensors)
    differ = found != found[0]
    if differ.any():
        names, tensors = list(state), differ.any(0).nonzero().flatten().tolist()
        rank = int(differ[:, tensors[0]].nonzero()[0])
        raise RunError(
            f"the weights differ between ranks: {names[tensors[0]]} first, on rank {rank} ({len(tensors)} of "
            f"{len(names)} tensors). Look for code that draws or branches by rank; the last resume point is intact."
        )


@torch.no_grad()
def bits_sum(tensor: Tensor) -> Tensor:
    """Fingerprint of a tensor's bits, independent of summation order: int64, on its device."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4)).view(torch.int32).long()
    place = torch.arange(1, flat.numel() + 1, device=flat.device)
    return (flat * (place * MIXER)).sum()  # wraps around
