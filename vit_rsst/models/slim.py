"""Slim: physically removes dead units, so that the network is smaller and faster and computes the same.

A unit can be removed if it has no effect: all its weights are zero, or all weights with which the consumer reads it
are. Its rows are removed from the producing layers with their biases and norms, its columns from the consumer.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from vit_rsst.errors import Damaged
from vit_rsst.models import narrow
from vit_rsst.models.anatomy import unit_groups
from vit_rsst.pruning.granularity import alive_units, slices
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.units import UnitGroup

Kept = dict[str, Tensor]
"""Group name → int64 indices of the units to keep, ascending."""


def kept_units(net: nn.Module, mask: MaskSet, round_to: int = 1) -> Kept:
    """Which units to keep; at least one per group, since libraries do not support empty layers.

    Args:
        net: the full model that the mask belongs to.
        mask: weights without a mask are alive.
        round_to: round neurons and channels up to a multiple, by keeping dead ones, which have no effect.
    """
    state = net.state_dict()
    found: Kept = {}
    for group in unit_groups(net):
        names = [member.name for member in group.members]
        whole = MaskSet({n: mask.masks.get(n, torch.ones(state[n].shape, dtype=torch.bool)) for n in names})
        seen = slices(group.members[-1], whole[group.members[-1].name]).any(1)  # what the consumer reads
        alive = alive_units(group, whole) & seen
        number = max(int(alive.sum()), 1)
        if group.kind != "head":
            number = min(-(-number // round_to) * round_to, group.units)
        spare = (~alive).nonzero().flatten()[: number - int(alive.sum())]
        found[group.name] = torch.cat([alive.nonzero().flatten(), spare]).sort().values
    return found


@dataclass(frozen=True)
class SlimForm:
    """What is left of a network without its dead units; each part is made when it is first asked for.

    Attributes:
        whole: the full network that the mask belongs to; not changed.
        round_to: neurons and channels are rounded up to a multiple.
    """

    whole: nn.Module
    mask: MaskSet
    round_to: int = 1

    @cached_property
    def kept(self) -> Kept:
        """The units of each group that stay; at least one each."""
        return kept_units(self.whole, self.mask, self.round_to)

    @property
    def is_narrower(self) -> bool:
        """Whether it has fewer units than the full network."""
        return any(len(self.kept[group.name]) < group.units for group in unit_groups(self.whole))

    @cached_property
    def net(self) -> nn.Module:
        """The network itself; the full one, not a copy, if it has no fewer units."""
        if not self.is_narrower:
            return self.whole
        net = copy_of(self.whole)
        shrink_(net, self.kept)
        return net

    @property
    def header(self) -> dict[str, str]:
        """What the header of a slim ticket says beyond that of the full one."""
        return {"widths": json.dumps(widths(self.kept))}


def widths(kept: Kept) -> dict[str, int]:
    """Units per group, which is all it takes to rebuild the shape."""
    return {name: len(units) for name, units in kept.items()}


def shape_of(net: nn.Module, mask: MaskSet, header: Mapping[str, str]) -> dict[str, int]:
    """Widths of the slim model of a ticket: its own if it is slim, else from the full model `net` and the mask."""
    return json.loads(header["widths"]) if "widths" in header else widths(kept_units(net, mask))


def narrowed(net: nn.Module, stock: nn.Module) -> dict[str, int]:
    """Widths of the groups with fewer units than in the stock network; empty if none has."""
    full = {group.name: group.units for group in unit_groups(stock)}
    return {group.name: group.units for group in unit_groups(net) if group.units < full[group.name]}


def shrink_(net: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Keeps these units of each group and removes the others, in place."""
    for group in unit_groups(net):
        if group.name in kept and len(kept[group.name]) < group.units:
            _shrink_group_(net, group, kept[group.name])


def shape_like_(net: nn.Module, widths: Mapping[str, int], place: str) -> None:
    """Shrinks a full model to the widths of a slim one, whose tensors can then be loaded.

    Raises:
        Damaged: the model lacks a group or has fewer units.
    """
    units = {group.name: group.units for group in unit_groups(net)}
    wrong = [name for name, width in widths.items() if not 0 < width <= units.get(name, 0)]
    if wrong:
        raise Damaged(
            f"{place}: {wrong[0]} has {widths[wrong[0]]} units, but the model has {units.get(wrong[0], 'none')}."
        )
    shrink_(net, {name: torch.arange(width) for name, width in widths.items()})


def copy_of(net: nn.Module) -> nn.Module:
    """A deep copy, even if a module stores a tensor of its last forward pass."""
    kept = [value for module in net.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(net, {id(value): value.detach().clone() for value in kept if not value.is_leaf})


def _shrink_group_(net: nn.Module, group: UnitGroup, kept: Tensor) -> None:
    for member in (*group.members, *group.vectors):
        path, name = member.name.rsplit(".", 1)
        module = net.get_submodule(path)
        tensor = getattr(module, name)
        stays = torch.ones(tensor.shape[member.dim], dtype=torch.bool)
        stays[member.index.flatten()] = False  # slices owned by no unit are kept
        stays[member.index[kept].flatten()] = True
        left = stays.nonzero().flatten().to(tensor.device)
        smaller = tensor.detach().index_select(member.dim, left)
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
        setattr(module, name, smaller)
        _say_width_(module)
    if group.kind == "head":
        _say_heads_(net.get_submodule(group.name), len(kept))


def _say_width_(module: nn.Module) -> None:
    """Updates a layer's attributes to the shapes of its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        is_depthwise = module.groups == module.in_channels > 1
        module.out_channels, module.in_channels = module.weight.shape[:2]
        if is_depthwise:
            module.groups = module.in_channels = module.out_channels
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.num_features = len(module.running_mean)


def _say_heads_(attention: nn.Module, number: int) -> None:
    """Updates the number of heads and of their features under the names libraries use; the head size is unchanged."""
    narrow.let_go_(attention)
    for count, total, one in WIDTHS:
        if hasattr(attention, count):
            setattr(attention, count, number)
        if hasattr(attention, total):
            setattr(attention, total, number * getattr(attention, one))


WIDTHS = (
    ("num_heads", "attn_dim", "head_dim"),
    ("num_heads", "attention_dim", "head_dim"),
    ("num_attention_heads", "all_head_size", "attention_head_size"),
)
"""Attribute names: number of heads, total features, features per head."""
