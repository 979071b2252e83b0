"""Anatomy: which weights of a model can be pruned, and which of their slices are heads, neurons and channels.

Structure is found by the shape of the modules, not by their class: timm's attention (`qkv`, `proj`) and transformers'
(`q_proj`, `k_proj`, `v_proj`, `o_proj`), plain and gated MLPs, and the inner convolutions of residual blocks.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from vit_rsst.errors import InputError
from vit_rsst.pruning.patterns import UNIT_KINDS, pattern
from vit_rsst.pruning.units import Member, Site, UnitGroup, depths

Found = Callable[[str, nn.Module], UnitGroup | None]


def prunable_weights(
    model: nn.Module, include: Iterable[str] = (), protect: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """The weights of Linear and Conv layers, less the first layer and the classifier, by parameter name.

    Args:
        model: a timm or transformers model; its configuration names the first layer and the classifier, its attribute
            `task_modules`, where it has one, what else decides and is treated like the classifier.
        include: globs of weights to prune beside those, such as `patch_embed.*` or `head.*`.
        protect: globs of weights never to prune; wins over `include`.

    Raises:
        InputError: a glob matches no weight, or nothing is left to prune.
    """
    matrices = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    for field, globs in (("include", include), ("protect", protect)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in matrices):
                raise InputError(
                    f"pruning.{field}: {glob!r} matches no weight; this model has, for example, "
                    f"{', '.join(list(matrices)[:6])}."
                )

    def matches(name: str, globs: Iterable[str]) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs)

    ends = _first_and_last(model)
    chosen = {
        name: weight
        for name, weight in matrices.items()
        if (name not in ends or matches(name, include)) and not matches(name, protect)
    }
    if not chosen:
        raise InputError("pruning.protect: nothing is left to prune; protect fewer weights or include some.")
    return chosen


def _first_and_last(model: nn.Module) -> set[str]:
    config = getattr(model, "pretrained_cfg", None) or {}
    ends: set[str] = set()
    for key in ("first_conv", "classifier"):
        names = config.get(key) or ()
        ends |= {f"{name}.weight" for name in ([names] if isinstance(names, str) else names)}
    for name in getattr(model, "task_modules", ()):
        ends |= {f"{name}.{inner}" for inner, _ in model.get_submodule(name).named_parameters()}
    return ends


def prunable_parts(
    model: nn.Module, granularity: str, include: Iterable[str] = (), protect: Iterable[str] = ()
) -> tuple[dict[str, nn.Parameter], list[UnitGroup]]:
    """The weights that a granularity prunes, and their unit groups (none for element and N:M).

    Raises:
        InputError: the model has no such units, all of them are protected, or a width is no multiple of M.
    """
    weights = prunable_weights(model, include, protect)
    if granularity in UNIT_KINDS:
        kinds = UNIT_KINDS[granularity]
        found = unit_groups(model, kinds)
        missing = [kind for kind in kinds if not any(group.kind == kind for group in found)]
        if missing:
            has = sorted({group.kind for group in unit_groups(model)}) or ["none of head, neuron and channel"]
            raise InputError(
                f"pruning.granularity: {type(model).__name__} has no unit of kind {missing[0]!r} that can be removed "
                f"exactly; it has {', '.join(has)}. Use one of these, or element or N:M."
            )
        groups = [group for group in found if all(member.name in weights for member in group.members)]
        owned = dict.fromkeys(member.name for group in groups for member in group.members)
        if not groups:
            raise InputError(f"pruning.protect: every {granularity} has a protected weight; protect fewer.")
        return {name: weights[name] for name in weights if name in owned}, groups
    if (windows := pattern(granularity)) is not None:
        wrong = [name for name, weight in weights.items() if weight.shape[1] % windows[1]]
        if wrong:
            raise InputError(
                f"pruning.granularity: {granularity} needs input widths that {windows[1]} divides, and "
                f"{wrong[0]} has {weights[wrong[0]].shape[1]} ({len(wrong)} such weight(s)); protect them with "
                f"pruning.protect, or use another pattern."
            )
    return weights, []


def unit_groups(model: nn.Module, kinds: Iterable[str] = ("head", "neuron", "channel")) -> list[UnitGroup]:
    """Unit groups of a model in the order of its modules; a group whose units cannot be removed exactly is left out."""
    finders: Mapping[str, tuple[Found, ...]] = {
        "head": (_timm_heads, _hub_heads),
        "neuron": (_neurons,),
        "channel": (_channels,),
    }
    found: list[UnitGroup] = []
    for name, module in model.named_modules():
        for kind in kinds:
            for finder in finders[kind]:
                groups = finder(name, module)
                found += groups if isinstance(groups, list) else [groups] if groups is not None else []
    return [replace(group, depth=depth) for group, depth in zip(found, depths(g.name for g in found), strict=True)]


def _rows(num_units: int, span: int, *starts: int) -> torch.Tensor:
    """(units, span · len(starts)): each unit owns `span` consecutive slices counted from every start."""
    one = torch.arange(num_units * span).view(num_units, span)
    return torch.cat([one + start for start in starts], 1)


def _has_more(module: nn.Module, known: Iterable[str]) -> bool:
    """Whether a child besides the known ones has tensors, in which each unit may have a part."""
    children = (child for name, child in module.named_children() if name not in known)
    return any(True for child in children for _ in itertools.chain(child.parameters(), child.buffers()))


def _vectors(name: str, module: nn.Module, index: torch.Tensor) -> list[Member]:
    """The bias of a Linear or Conv layer, where it has one."""
    return [Member(f"{name}.bias", 0, index)] if getattr(module, "bias", None) is not None else []


def _timm_heads(name: str, module: nn.Module) -> UnitGroup | None:
    """Rows of qkv are packed [q | k | v], each head-major; columns of proj are head-major."""
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    heads, dim = getattr(module, "num_heads", None), getattr(module, "head_dim", None)
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and heads and dim):
        return None
    width = heads * dim
    fits = qkv.out_features == 3 * width and proj.in_features == width
    mixes = not isinstance(getattr(module, "norm", None), nn.Identity | None) or getattr(module, "gate", None)
    # Mixtures of tokens are alike for all heads; a table of position biases, for example, is not.
    own = {name for name, _ in module.named_parameters(recurse=False)} - {"key_mix", "value_mix"}
    # Position biases are by head, in a table of the module's or of the whole model's.
    more = hasattr(module, "rel_pos") or _has_more(module, ("qkv", "proj", "q_norm", "k_norm"))
    if not fits or mixes or own or more:  # a norm over all heads changes with their number
        return None
    rows, columns = _rows(heads, dim, 0, width, 2 * width), _rows(heads, dim, 0)
    members = (Member(f"{name}.qkv.weight", 0, rows), Member(f"{name}.proj.weight", 1, columns))
    vectors = _vectors(f"{name}.qkv", qkv, rows)
    return UnitGroup(name, "head", 0, members, tuple(vectors), Site(f"{name}.proj", columns))


def _hub_heads(name: str, module: nn.Module) -> UnitGroup | None:
    """transformers: separate projections, head-major."""
    parts = {key: getattr(module, key, None) for key in ("q_proj", "k_proj", "v_proj", "o_proj")}
    heads = getattr(module, "num_attention_heads", None) or getattr(module, "num_heads", None)
    if not heads or not all(isinstance(part, nn.Linear) for part in parts.values()):
        return None
    width = parts["o_proj"].in_features
    unequal = any(parts[key].out_features != width for key in ("q_proj", "k_proj", "v_proj"))
    if unequal or width % heads or _has_more(module, parts):
        return None
    index = _rows(heads, width // heads, 0)
    inner = [Member(f"{name}.{key}.weight", 0, index) for key in ("q_proj", "k_proj", "v_proj")]
    vectors = [v for key in ("q_proj", "k_proj", "v_proj") for v in _vectors(f"{name}.{key}", parts[key], index)]
    members = (*inner, Member(f"{name}.o_proj.weight", 1, index))
    return UnitGroup(name, "head", 0, members, tuple(vectors), Site(f"{name}.o_proj", index))


def _neurons(name: str, module: nn.Module) -> UnitGroup | None:
    """A row of fc1 and a column of fc2; of a gated MLP the gate's row, the value's row and one column."""
    fc2 = getattr(module, "fc2", None)
    sources = [key for key in ("fc1", "fc1_g", "fc1_x") if isinstance(getattr(module, key, None), nn.Linear)]
    if not isinstance(fc2, nn.Linear) or not sources:
        return None
    if not isinstance(getattr(module, "norm", None), nn.Identity | None):  # it mixes the neurons
        return None
    if _has_more(module, (*sources, "fc2")):  # a convolution over the neurons, for example
        return None
    hidden, columns = fc2.in_features, _rows(fc2.in_features, 1, 0)
    members, vectors = [], []
    for key in sources:
        source = getattr(module, key)
        if source.out_features not in (hidden, 2 * hidden):
            return None
        is_packed = source.out_features == 2 * hidden  # timm's GluMlp: two halves in one matrix
        rows = _rows(hidden, 1, 0, hidden) if is_packed else columns
        members.append(Member(f"{name}.{key}.weight", 0, rows))
        vectors += _vectors(f"{name}.{key}", source, rows)
    members.append(Member(f"{name}.fc2.weight", 1, columns))
    return UnitGroup(name, "neuron", 0, tuple(members), tuple(vectors), Site(f"{name}.fc2", columns))


def _channels(name: str, module: nn.Module) -> list[UnitGroup]:
    """Output channels of the inner convolutions of a residual block; those that join the residual stream stay."""
    convs = []
    while isinstance(conv := getattr(module, f"conv{len(convs) + 1}", None), nn.Conv2d):
        convs.append(conv)
    joined = hasattr(module, "shortcut") or hasattr(module, "downsample")
    numbered = [f"{part}{number}" for part in ("conv", "bn") for number in range(1, len(convs) + 1)]
    # `se` comes after the last convolution; whatever else has tensors may stand between two.
    more = _has_more(module, (*numbered, "shortcut", "downsample", "se"))
    if len(convs) < 2 or not joined or more or any(conv.groups != 1 for conv in convs):
        return []
    groups = []
    for number, (conv, consumer) in enumerate(itertools.pairwise(convs), 1):
        index = _rows(conv.out_channels, 1, 0)
        vectors = _vectors(f"{name}.conv{number}", conv, index)
        norm = getattr(module, f"bn{number}", None)
        if not isinstance(norm, nn.BatchNorm2d | nn.Identity | None):  # it mixes the channels
            continue
        if isinstance(norm, nn.BatchNorm2d):
            parts = ("weight", "bias", "running_mean", "running_var")
            vectors += [Member(f"{name}.bn{number}.{p}", 0, index) for p in parts if getattr(norm, p) is not None]
        members = (
            Member(f"{name}.conv{number}.weight", 0, index),
            Member(f"{name}.conv{number + 1}.weight", 1, index),
        )
        if consumer.in_channels == conv.out_channels:
            site = Site(f"{name}.conv{number + 1}", index)
            groups.append(UnitGroup(f"{name}.conv{number}", "channel", 0, members, tuple(vectors), site))
    return groups
