"""Ranks agree: rank 0 selects masks, the bits are broadcast, fingerprints are compared; buffers are those of rank 0."""

from collections.abc import Callable

from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from vit_rsst.pruning.masks import MaskSet


def agreed(select: Callable[[], MaskSet], like: MaskSet) -> MaskSet:
    """The mask that rank 0 selects, on every rank.

    Args:
        select: computes the mask; called on rank 0 alone, so it must not communicate.
        like: masks of the same weights, which give names, shapes and device.
    """
    state = PartialState()
    if state.num_processes == 1:
        return select()
    packed: dict[str, Tensor] = (select() if state.is_main_process else like).pack()
    return MaskSet.unpack(broadcast({name: bits.to(state.device) for name, bits in packed.items()}), like.masks)


def fingerprints(mask: MaskSet) -> list[str]:
    """Fingerprint of the mask on every rank.

    Raises:
        RuntimeError: they differ, so that the ranks would train different networks.
    """
    found = gather_object([mask.fingerprint()])
    if len(set(found)) > 1:
        raise RuntimeError(f"the masks differ between ranks: {found}")
    return found


def share_buffers_(model: nn.Module) -> None:
    """Gives every rank the statistics of rank 0, as DDP does before the next forward pass; collective."""
    if PartialState().num_processes > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(broadcast(buffer))
