"""Complexity: FLOPs by torch's own counter, and what removing one unit saves. One multiply-add is 2 FLOPs."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vit_rsst.pruning.units import Member, UnitGroup


def flops_by_module(net: nn.Module, image_size: int, batch: int = 1) -> dict[str, int]:
    """FLOPs of one forward pass, by module name; `""` is the whole network. Matrix products, convolutions and
    attention are counted; norms and activations are not."""
    device = next(net.parameters()).device
    images = torch.zeros(batch, 3, image_size, image_size, device=device)
    was_training = net.training
    net.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(images)
    net.train(was_training)
    root = type(net).__name__
    found = {}
    for name, operations in counter.get_flop_counts().items():
        path = name.removeprefix(root).removeprefix(".")
        if name != "Global":
            found[path] = sum(operations.values())
    found[""] = counter.get_total_flops()
    return found


def flops(net: nn.Module, image_size: int, batch: int = 1) -> int:
    """FLOPs of one forward pass; see `flops_by_module`."""
    return flops_by_module(net, image_size, batch)[""]


def unit_costs(
    net: nn.Module, groups: Sequence[UnitGroup], image_size: int
) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs and parameters that removing one unit saves, by group name.

    A unit takes its share of every layer that it has slices of; a head also of the products of its attention. Of
    convolutions that follow each other inside one block the savings overlap, so that they cannot be added up exactly.
    """
    counts = flops_by_module(net, image_size)
    state = net.state_dict(keep_vars=True)

    def share(member: Member) -> float:
        return member.index.shape[1] / state[member.name].shape[member.dim]

    flop_costs, parameter_costs = {}, {}
    for group in groups:
        layers = [member.name.removesuffix(".weight") for member in group.members]
        cost = sum(share(m) * counts.get(layer, 0) for m, layer in zip(group.members, layers, strict=True))
        if group.kind == "head":
            cost += (counts[group.name] - sum(counts.get(layer, 0) for layer in layers)) / group.units
        flop_costs[group.name] = cost
        owned = [m for m in (*group.members, *group.vectors) if isinstance(state[m.name], nn.Parameter)]
        parameter_costs[group.name] = sum(share(m) * state[m.name].numel() for m in owned)
    return flop_costs, parameter_costs
