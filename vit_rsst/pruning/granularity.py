"""Granularity: pools weight scores to unit scores, and expands unit decisions to element masks."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from vit_rsst import shards
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.units import Member, UnitGroup


def slices(member: Member, tensor: Tensor) -> Tensor:
    """The slices of `tensor` owned by each unit: (units, span · other). Collective, for units span shards."""
    index = member.index.to(tensor.device)
    picked = shards.whole(tensor).movedim(member.dim, 0)[index]  # (units, span, other…)
    return picked.flatten(1)


def pool(group: UnitGroup, scores: Mapping[str, Tensor]) -> Tensor:
    """Mean score of every unit over all the weights it owns.

    Args:
        group: units of one kind in one place; its members index `scores`.
        scores: per weight, shaped like the weight; higher means keep.

    Returns:
        float32, (units,).

    Raises:
        KeyError: a member weight has no scores.
    """
    owned = [slices(member, scores[member.name]).float() for member in group.members]
    return sum(part.sum(1) for part in owned) / sum(part.shape[1] for part in owned)


def unit_size(group: UnitGroup, weights: Mapping[str, Tensor]) -> int:
    """Number of weight elements that one unit of the group owns."""
    return sum(weights[m.name].numel() // weights[m.name].shape[m.dim] * m.index.shape[1] for m in group.members)


def alive_units(group: UnitGroup, mask: MaskSet) -> Tensor:
    """Which units have any element alive: bool, (units,)."""
    return torch.stack([slices(member, mask[member.name]).any(1) for member in group.members]).any(0)


def units_left(groups: Iterable[UnitGroup], mask: MaskSet) -> dict[str, dict[str, str | int]]:
    """Per unit group: kind, units, alive units."""
    return {g.name: {"kind": g.kind, "units": g.units, "alive": int(alive_units(g, mask).sum())} for g in groups}


def expand(groups: Iterable[UnitGroup], kept: Sequence[Tensor], like: Mapping[str, Tensor]) -> MaskSet:
    """Expands a decision on units to element masks: everything a dropped unit owns is dead, the rest alive.

    Args:
        groups: unit groups over the weights of `like`.
        kept: per group bool, (units,).
        like: per weight a tensor with its shape and device.
    """
    mask = MaskSet.full(like)
    for group, keep in zip(groups, kept, strict=True):
        for member in group.members:
            alive = mask[member.name]
            dead = shards.within(alive, member.dim, member.index[~keep.cpu()].flatten())
            shards.local(alive).index_fill_(member.dim, dead.to(alive.device), False)
    return mask
