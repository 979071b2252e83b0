"""Finders: heads, neurons and channels of one module, found by its structure, not its class.

A module with anything that mixes units (a norm over all heads, a convolution between two layers) has none, since they
could not be removed exactly.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vit_rsst.models import narrow
from vit_rsst.models.layers import NORMS, applies_its_weight
from vit_rsst.pruning.units import Member, Site, UnitGroup

Modules = Mapping[str, nn.Module]
Finder = Callable[[str, nn.Module, Modules], list[UnitGroup]]


def _rows(num_units: int, span: int, *starts: int) -> torch.Tensor:
    """(units, span · len(starts)): each unit owns `span` consecutive slices, offset by every start."""
    one = torch.arange(num_units * span).view(num_units, span)
    return torch.cat([one + start for start in starts], 1)


def _has_tensors(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def _has_more(module: nn.Module, known: Iterable[str]) -> bool:
    """Whether a child other than the known ones has tensors, which may depend on units."""
    return any(_has_tensors(child) for name, child in module.named_children() if name not in known)


def _vectors(name: str, layer: nn.Module, index: torch.Tensor) -> list[Member]:
    """The bias of a layer, or all tensors of a per-feature norm."""
    parts = ("weight", "bias", "running_mean", "running_var") if isinstance(layer, NORMS) else ("bias",)
    return [Member(f"{name}.{part}", 0, index) for part in parts if getattr(layer, part, None) is not None]


# heads


def timm_heads(name: str, module: nn.Module, modules: Modules) -> list[UnitGroup]:
    """timm: rows of qkv are packed [q | k | v], each head-major; columns of proj are head-major."""
    qkv, proj, heads = (getattr(module, key, None) for key in ("qkv", "proj", "num_heads"))
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and heads):
        return []
    width = proj.in_features
    if qkv.out_features != 3 * width or width % heads or not _lets_heads_go(module):
        return []
    # Token mixtures are shared by all heads.
    own = {key for key, value in module.named_parameters(recurse=False)} - {"key_mix", "value_mix"}
    biases = {key: getattr(module, key, None) for key in ("q_bias", "k_bias", "v_bias")}
    tables = {"relative_position_bias_table"}  # (distances, heads)
    mixes = not isinstance(getattr(module, "norm", None), nn.Identity | None) or getattr(module, "gate", None)
    # Position biases are per head, in a table of the module or of the whole model.
    shared = (
        hasattr(module, "rel_pos")
        or _has_tensors(modules.get("rel_pos_bias"))
        or hasattr(modules.get("rope"), "num_heads")  # per-head frequencies
    )
    more = _has_more(module, ("qkv", "proj", "q_norm", "k_norm"))
    if mixes or shared or more or own - tables - biases.keys():
        return []
    dim = width // heads
    rows, columns = _rows(heads, dim, 0, width, 2 * width), _rows(heads, dim, 0)
    members = (Member(f"{name}.qkv.weight", 0, rows), Member(f"{name}.proj.weight", 1, columns))
    vectors = _vectors(f"{name}.qkv", qkv, rows)
    vectors += [Member(f"{name}.{key}", 0, columns) for key, bias in biases.items() if bias is not None]
    if getattr(module, "relative_position_bias_table", None) is not None:
        vectors.append(Member(f"{name}.relative_position_bias_table", 1, _rows(heads, 1, 0)))
    return [UnitGroup(name, "head", 0, members, tuple(vectors), Site(f"{name}.proj", columns))]


def _lets_heads_go(module: nn.Module) -> bool:
    """Whether the forward pass takes its width from its weights; assumed for plugins, which are tested before a run."""
    is_plugin = type(module).__module__.split(".")[0] not in ("timm", "transformers")
    return is_plugin or narrow.lets_heads_go(module)


PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("query", "key", "value", ""),
)
"""Names of the four layers; for query, key and value the last is the sibling `output.dense`."""


def hub_heads(name: str, module: nn.Module, modules: Modules) -> list[UnitGroup]:
    """transformers: separate projections, head-major."""
    heads = getattr(module, "num_attention_heads", None) or getattr(module, "num_heads", None)
    for *inner, last in PROJECTIONS:
        parent = name.rpartition(".")[0]
        place = f"{name}.{last}" if last else f"{parent}.output.dense"
        layers = [getattr(module, key, None) for key in inner]
        out = modules.get(place)
        if heads and isinstance(out, nn.Linear) and all(isinstance(layer, nn.Linear) for layer in layers):
            break
    else:
        return []
    width = out.in_features
    if any(layer.out_features != width for layer in layers) or width % heads:
        return []
    biases = _position_biases(name, module, modules, heads)
    # A sequence reduction, as in PVT, is shared by all heads.
    more = _has_more(module, (*inner, last, "relative_position_bias", "sequence_reduction", "layer_norm", POSITION_MLP))
    own = {key for key, _ in module.named_parameters(recurse=False)} - {
        member.name.rpartition(".")[2] for member in biases or ()
    }
    if biases is None or more or own:
        return []
    index = _rows(heads, width // heads, 0)
    members = [Member(f"{name}.{key}.weight", 0, index) for key in inner]
    vectors = [v for key, layer in zip(inner, layers, strict=True) for v in _vectors(f"{name}.{key}", layer, index)]
    members.append(Member(f"{place}.weight", 1, index))
    return [UnitGroup(name, "head", 0, tuple(members), (*vectors, *biases), Site(place, index))]


TABLE = "relative_position_bias_table"
POSITION_MLP = "continuous_position_bias_mlp"


def _position_biases(name: str, module: nn.Module, modules: Modules, heads: int) -> list[Member] | None:
    """Other per-head tensors of a transformers attention module; None: they are shared with other layers."""
    parent, one, found = name.rpartition(".")[0], _rows(heads, 1, 0), []
    for place in (name, f"{name}.relative_position_bias", f"{parent}.relative_position_bias"):  # a sibling in BEiT
        if isinstance(getattr(modules.get(place), TABLE, None), nn.Parameter):
            found.append(Member(f"{place}.{TABLE}", 1, one))
    if isinstance(getattr(module, "logit_scale", None), nn.Parameter):  # (heads, 1, 1)
        found.append(Member(f"{name}.logit_scale", 0, one))
    if isinstance(mlp := getattr(module, POSITION_MLP, None), nn.Sequential):
        found.append(Member(f"{name}.{POSITION_MLP}.{len(mlp) - 1}.weight", 0, one))
    above = parent.rpartition(".")[0]
    while above:  # a table shared by all layers
        for child, other in modules[above].named_children():
            if isinstance(getattr(other, TABLE, None), nn.Parameter) and f"{above}.{child}" != parent:
                return None
        above = above.rpartition(".")[0]
    return found


# neurons and channels


@dataclass(frozen=True)
class Part:
    """One Linear or Conv layer, alone or in a small module with the norm that follows it.

    Attributes:
        name: of the layer.
        norms: per-feature norms of its outputs, with their names.
    """

    name: str
    layer: nn.Module
    norms: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def out(self) -> int:
        return self.layer.weight.shape[0]

    @property
    def inner(self) -> int:
        return self.layer.weight.shape[1]

    def members(self, index: torch.Tensor) -> tuple[Member, list[Member]]:
        """Rows of the weight, and of the vectors removed with them."""
        vectors = _vectors(self.name, self.layer, index)
        return Member(f"{self.name}.weight", 0, index), vectors + [
            v for name, norm in self.norms for v in _vectors(name, norm, index)
        ]


def _part(name: str, module: nn.Module | None) -> Part | None:
    """The layer that a module is or contains; None if it contains several, or anything that mixes its outputs."""
    if _is_dense(module):
        return Part(name, module)
    if module is None or isinstance(module, NORMS):
        return None
    inner = [(f"{name}.{key}", child) for key, child in module.named_children() if _has_tensors(child)]
    layers = [(key, child) for key, child in inner if _is_dense(child)]
    norms = [(key, child) for key, child in inner if isinstance(child, NORMS)]
    has_own = any(True for _ in module.named_parameters(recurse=False))
    if len(layers) != 1 or len(norms) > 1 or len(inner) != len(layers) + len(norms) or has_own:
        return None
    return Part(*layers[0], tuple(norms))


def _is_dense(module: nn.Module | None) -> bool:
    """Whether it is a dense layer that applies its weight unmodified."""
    is_layer = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    return is_layer and applies_its_weight(module)


MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fc1",), "fc2"),
    (("fc1_g", "fc1_x"), "fc2"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("weights_in",), "weights_out"),
    (("pwconv1",), "pwconv2"),
    (("dense1",), "dense2"),
    (("intermediate",), "output"),
    (("w1", "w2"), "w3"),
    (("w12",), "w3"),
    (("linear1",), "linear2"),
    (("ln1",), "ln2"),
    (("pw1",), "pw2"),
    (("conv1",), "conv2"),
)
"""Input layers and output layer of an MLP, by their names in libraries."""


def neurons(name: str, module: nn.Module, modules: Modules) -> list[UnitGroup]:
    """Neurons: a row of fc1 and a column of fc2; in a gated MLP the gate's row, the value's row and one column."""
    for keys, last in MLPS:
        sources = [_part(f"{name}.{key}" if name else key, getattr(module, key, None)) for key in keys]
        consumer = _part(f"{name}.{last}" if name else last, getattr(module, last, None))
        if consumer is not None and all(source is not None for source in sources):
            break
    else:
        return []
    is_mlp = all(isinstance(part.layer, nn.Linear) or part.layer.kernel_size == (1, 1) for part in (*sources, consumer))
    hidden, between = consumer.inner, []
    columns = _rows(hidden, 1, 0)
    if not is_mlp or any(source.out not in (hidden, 2 * hidden) for source in sources):
        return []
    for key, child in module.named_children():
        if key in (*keys, last) or not _has_tensors(child):
            continue
        if not _touches(child.named_parameters(), hidden) and not _touches(child.named_buffers(), hidden):
            continue  # before or after the neurons
        if isinstance(child, NORMS) and hidden != consumer.out:
            between += _vectors(f"{name}.{key}", child, columns)
        elif kernel := _depthwise(f"{name}.{key}", child, hidden):
            between += [Member(f"{kernel}.weight", 0, columns), *_vectors(kernel, modules[kernel], columns)]
        else:
            return []
    if _touches(module.named_parameters(recurse=False), hidden) or _splits(module, hidden):
        return []
    members, vectors = [], []
    for source in sources:
        # Gate and value in one matrix, as in timm's GluMlp.
        index = _rows(hidden, 1, 0, hidden) if source.out == 2 * hidden else columns
        member, more = source.members(index)
        members.append(member)
        vectors += more
    vectors += between
    members.append(Member(f"{consumer.name}.weight", 1, columns))
    return [UnitGroup(name, "neuron", 0, tuple(members), tuple(vectors), Site(consumer.name, columns))]


def _depthwise(name: str, module: nn.Module, width: int) -> str:
    """Name of the depthwise convolution over `width` features that a module is or contains; else empty."""
    inner = [(f"{name}.{key}".rstrip("."), child) for key, child in module.named_modules() if child._parameters]
    if len(inner) != 1 or not isinstance(inner[0][1], nn.Conv2d):
        return ""
    [(place, conv)] = inner
    return place if conv.groups == conv.in_channels == conv.out_channels == width > 1 else ""


def _touches(tensors: Iterable[tuple[str, torch.Tensor]], hidden: int) -> bool:
    """Whether a tensor has a dimension of the hidden features, or of twice their number."""
    return any(size in (hidden, 2 * hidden) for _, tensor in tensors for size in tensor.shape)


def _splits(module: nn.Module, hidden: int) -> bool:
    """Whether the forward pass splits the hidden features at fixed widths, as in MambaOut."""
    sequences = (value for value in vars(module).values() if isinstance(value, tuple | list))
    return any(isinstance(width, int) and width == hidden for value in sequences for width in value)


def channels(name: str, module: nn.Module, modules: Modules) -> list[UnitGroup]:
    """Output channels of the inner convolutions of a residual block; those added to the residual stream stay."""
    parts = list(_numbered(name, module))
    joined = any(hasattr(module, key) for key in ("shortcut", "downsample"))
    numbered = [f"{key}{number}" for key in ("conv", "bn") for number in range(1, len(parts) + 1)]
    # `se` follows the last convolution; anything else with tensors may lie between two.
    if len(parts) < 2 or not joined or _has_more(module, (*numbered, "shortcut", "downsample", "se")):
        return []
    if any(not applies_its_weight(part.layer) or part.layer.groups != 1 for part in parts):
        return []
    if any(True for _ in module.named_parameters(recurse=False)):
        return []
    groups = []
    for number, (part, consumer) in enumerate(itertools.pairwise(parts), 1):
        norm = getattr(module, f"bn{number}", None)
        if not isinstance(norm, nn.BatchNorm2d | nn.Identity | None) or consumer.inner != part.out:
            continue  # a norm that mixes the channels
        index = _rows(part.out, 1, 0)
        member, vectors = part.members(index)
        if isinstance(norm, nn.BatchNorm2d):
            vectors += _vectors(f"{name}.bn{number}", norm, index)
        members = (member, Member(f"{consumer.name}.weight", 1, index))
        site = Site(consumer.name, index)
        groups.append(UnitGroup(f"{name}.conv{number}", "channel", 0, members, tuple(vectors), site))
    return groups


def _numbered(name: str, module: nn.Module) -> Iterator[Part]:
    """conv1, conv2, … while they are convolutions."""
    for number in itertools.count(1):
        conv = getattr(module, f"conv{number}", None)
        if not isinstance(conv, nn.Conv2d):
            return
        yield Part(f"{name}.conv{number}", conv)


def expanded(name: str, module: nn.Module, modules: Modules) -> list[UnitGroup]:
    """Channels of an inverted residual block: a row of the expansion, its depthwise kernel, a column of the last."""
    wide, deep, narrow_ = (getattr(module, key, None) for key in ("conv_pw", "conv_dw", "conv_pwl"))
    known = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
    if not (_is_dense(wide) and _is_dense(narrow_) and isinstance(deep, nn.Conv2d)) or _has_more(module, known):
        return []
    is_depthwise = deep.groups == deep.in_channels == deep.out_channels == wide.out_channels == narrow_.in_channels
    norms = [(f"{name}.{key}", getattr(module, key, None)) for key in ("bn1", "bn2")]
    if not is_depthwise or not applies_its_weight(deep) or not all(isinstance(norm, NORMS) for _, norm in norms):
        return []
    index = _rows(wide.out_channels, 1, 0)
    members = [Member(f"{name}.{key}.weight", 0, index) for key in ("conv_pw", "conv_dw")]
    members.append(Member(f"{name}.conv_pwl.weight", 1, index))
    vectors = [v for key in ("conv_pw", "conv_dw") for v in _vectors(f"{name}.{key}", getattr(module, key), index)]
    vectors += [v for key, norm in norms for v in _vectors(key, norm, index)]
    return [UnitGroup(name, "channel", 0, tuple(members), tuple(vectors), Site(f"{name}.conv_pwl", index))]


FINDERS: Mapping[str, tuple[Finder, ...]] = {
    "head": (timm_heads, hub_heads),
    "neuron": (neurons,),
    "channel": (channels, expanded),
}
"""Kind → finders of its units."""
