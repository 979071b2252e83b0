"""Complexity: FLOPs of a forward pass, and the savings from removing one unit.

One multiply-accumulate (MAC) is two FLOPs; all figures are FLOPs as counted by torch's FlopCounterMode: convolutions,
matrix products and attention. Norms, activations and additions are ignored, as usual. Nothing is computed: the network
runs on the device `meta`, wherever its weights are, or on zeros if its forward pass depends on values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vit_rsst.errors import OF_A_LIBRARY
from vit_rsst.pruning.granularity import alive_units
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.units import UnitGroup

T = TypeVar("T")


def size_of(net: nn.Module) -> int:
    """Input size of a network in px; 32 for models of this package."""
    embedding = getattr(net, "patch_embed", None)
    published = (getattr(net, "pretrained_cfg", None) or {}).get("input_size") or (32,)
    found = getattr(embedding, "img_size", None) or getattr(getattr(net, "config", None), "image_size", None)
    return int(torch.tensor(found or published).flatten()[-1])


def flops(net: nn.Module, image_size: int, batch: int = 1) -> int:
    """FLOPs of one forward pass; MACs are half of that."""
    return flops_by_module(net, image_size, batch)[""]


def flops_by_module(net: nn.Module, image_size: int, batch: int = 1) -> dict[str, int]:
    """FLOPs of one forward pass by module name, including submodules; the whole network is `""`.

    Modules without counted operations are omitted.
    """

    def passed(device: str) -> FlopCounterMode:
        with FlopCounterMode(display=False) as counter, evaluating(net), torch.no_grad():
            functional_call(net, shapes_of(net, device), (images(batch, image_size, device),))
        return counter

    counter = without_numbers(passed)
    root = type(net).__name__
    counts = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    inside = {n.removeprefix(f"{root}."): count for n, count in counts.items() if n.startswith(f"{root}.")}
    return {"": counter.get_total_flops()} | inside


def own_flops(by_module: Mapping[str, int]) -> dict[str, int]:
    """FLOPs of each module without its submodules: for an attention module, its two matrix products.

    Args:
        by_module: from `flops_by_module`.
    """
    own = dict(by_module)
    for name, count in by_module.items():
        holder = name
        while holder:  # a ModuleList in between is never called and has no count
            holder = holder.rpartition(".")[0]
            if holder in own:
                own[holder] -= count
                break
    return own


def unit_costs(
    net: nn.Module, groups: Sequence[UnitGroup], image_size: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Exact savings from removing one unit: (FLOPs, parameters), each by unit group name.

    A head saves its rows of q, k and v, its columns of the projection and its share of the attention; a neuron its row
    of fc1 and its column of fc2; a channel its filter, its batch norm and its slice of the next convolution; each also
    its biases. Savings are additive over units and groups, unless two groups divide the two sides of one weight, as do
    the channels of consecutive inner convolutions of a bottleneck block: the sum then counts their intersection twice
    and slightly overestimates.
    """
    own, parameters = own_flops(flops_by_module(net, image_size)), dict(net.named_parameters())
    saved_flops, saved_parameters = {}, {}
    for group in groups:
        spent, size = 0.0, 0
        for member in (*group.members, *group.vectors):
            if member.name not in parameters:  # running statistics
                continue
            tensor, span = parameters[member.name], member.index.shape[1]
            size += tensor.numel() // tensor.shape[member.dim] * span
            if tensor.ndim > 1:
                spent += own.get(member.name.removesuffix(".weight"), 0) * span / tensor.shape[member.dim]
        if group.kind == "head":
            spent += own.get(group.name, 0) / group.units
        saved_flops[group.name], saved_parameters[group.name] = spent, float(size)
    return saved_flops, saved_parameters


def effective_flops(net: nn.Module, mask: MaskSet, groups: Sequence[UnitGroup], image_size: int) -> float:
    """FLOPs of one forward pass on hardware that skips every zero weight.

    Attention counts for heads with any alive weight.

    Args:
        mask: alive elements of the masked weights; all other weights count in full.
        groups: unit groups of the model; only heads covered by the mask are used.
    """
    own = own_flops(flops_by_module(net, image_size))
    density = {name.removesuffix(".weight"): float(mask[name].float().mean()) for name in mask}
    for group in groups:
        if group.kind == "head" and all(member.name in mask.masks for member in group.members):
            density[group.name] = float(alive_units(group, mask).float().mean())
    return sum(count * density.get(name, 1.0) for name, count in own.items())


def without_numbers(passed: Callable[[str], T]) -> T:
    """Result of a pass on `meta`, or on the CPU if the forward pass depends on values."""
    try:
        return passed("meta")
    except OF_A_LIBRARY:
        with torch.random.fork_rng(devices=[]):
            return passed("cpu")


def images(batch: int, size: int, device: str) -> Tensor:
    """Black images, (batch, 3, size, size)."""
    return torch.zeros(batch, 3, size, size, device=device)


def shapes_of(net: nn.Module, device: str) -> dict[str, Tensor]:
    """Parameters and buffers filled with zeros; on `meta` without memory."""
    parameters = {n: torch.zeros_like(p, device=device, requires_grad=True) for n, p in net.named_parameters()}
    return parameters | {name: torch.zeros_like(buffer, device=device) for name, buffer in net.named_buffers()}


@contextmanager
def in_mode(net: nn.Module, training: bool) -> Iterator[None]:
    """Puts every module in training or evaluation mode inside the context."""
    modes = {module: module.training for module in net.modules()}
    net.train(training)
    try:
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


def evaluating(net: nn.Module) -> AbstractContextManager[None]:
    """Puts every module in evaluation mode inside the context."""
    return in_mode(net, training=False)
