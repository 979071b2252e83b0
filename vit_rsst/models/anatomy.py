"""Anatomy: which weights of a model are prunable, and which of their slices form heads, neurons and channels.

Units are found by the structure of modules, not by their class; see `finders`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from vit_rsst.errors import InputError
from vit_rsst.models.finders import FINDERS
from vit_rsst.models.layers import altered_weights, weight_layers
from vit_rsst.pruning.patterns import UNIT_KINDS, pattern
from vit_rsst.pruning.units import UnitGroup, depths


def prunable_weights(
    model: nn.Module, include: Iterable[str] = (), protect: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Weights of all Linear and Conv layers except the first layer and the classifiers, by parameter name.

    Frozen weights, and weights that their layer standardises before use, are excluded.

    Args:
        model: a timm or transformers model; its configuration names the first layer and the classifiers. Modules named
            in its attribute `task_modules`, if any, are treated like classifiers.
        include: globs of weights to prune as well, such as `patch_embed.*` or `head.*`.
        protect: globs of weights never to prune; takes precedence over `include`.

    Raises:
        InputError: a glob matches no weight, or nothing is left to prune.
    """
    matrices = {f"{name}.weight": layer.weight for name, layer in weight_layers(model) if layer.weight.requires_grad}
    for field, globs in (("include", include), ("protect", protect)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in matrices):
                raise InputError(
                    f"pruning.{field}: {glob!r} matches no prunable weight; examples in this model: "
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
    if not chosen and (altered := altered_weights(model)):
        raise InputError(
            f"model.name: nothing to prune in {type(model).__name__}: {altered[0]} and {len(altered) - 1} more are "
            "standardised before use, which undoes zeros; use another model."
        )
    if not chosen:
        raise InputError("pruning.protect: no prunable weight is left; protect fewer or include some.")
    return chosen


def _first_and_last(model: nn.Module) -> set[str]:
    ends: set[str] = set()
    for prefix, config in _configured(model):
        for key in ("first_conv", "classifier"):
            names = config.get(key) or ()
            ends |= {f"{prefix}{name}.weight" for name in ([names] if isinstance(names, str) else names)}
    for name in getattr(model, "task_modules", ()):
        ends |= {f"{name}.{inner}" for inner, _ in model.get_submodule(name).named_parameters()}
    return ends


def _configured(model: nn.Module) -> Iterator[tuple[str, dict]]:
    """timm's configuration of the model, or of those inside it, with the prefix of their parameters."""
    if config := getattr(model, "pretrained_cfg", None):
        yield "", config
        return
    for name, child in model.named_children():
        yield from ((f"{name}.{prefix}", config) for prefix, config in _configured(child))


def prunable_parts(
    model: nn.Module, granularity: str, include: Iterable[str] = (), protect: Iterable[str] = ()
) -> tuple[dict[str, nn.Parameter], list[UnitGroup]]:
    """The weights that a granularity prunes, and their unit groups (none for element and N:M).

    Raises:
        InputError: the model has no such units, all are protected, or an input width is not a multiple of M.
    """
    weights = prunable_weights(model, include, protect)
    if granularity in UNIT_KINDS:
        kinds = UNIT_KINDS[granularity]
        found = unit_groups(model, kinds)
        missing = [kind for kind in kinds if not any(group.kind == kind for group in found)]
        if missing:
            has = sorted({group.kind for group in unit_groups(model)})
            way = f"use {', '.join(has)}, element or N:M" if has else "use element or N:M"
            raise InputError(
                f"pruning.granularity: {type(model).__name__} has no {missing[0]} that can be removed exactly; {way}."
            )
        groups = [group for group in found if all(member.name in weights for member in group.members)]
        owned = dict.fromkeys(member.name for group in groups for member in group.members)
        if not groups:
            raise InputError(
                f"pruning.protect: every {granularity} has a weight that is protected or frozen; protect fewer."
            )
        return {name: weights[name] for name in weights if name in owned}, groups
    if (n_of_m := pattern(granularity)) is not None:
        wrong = [name for name, weight in weights.items() if weight.shape[1] % n_of_m[1]]
        if wrong:
            raise InputError(
                f"pruning.granularity: {granularity} needs input widths divisible by {n_of_m[1]}, but {wrong[0]} has "
                f"{weights[wrong[0]].shape[1]} ({len(wrong)} such weights); protect them with pruning.protect, or use "
                f"another pattern."
            )
    return weights, []


def unit_groups(model: nn.Module, kinds: Iterable[str] = ("head", "neuron", "channel")) -> list[UnitGroup]:
    """Unit groups of a model in module order; groups whose units cannot be removed exactly are omitted."""
    modules, found = dict(model.named_modules()), []
    for name, module in modules.items():
        for kind in kinds:
            for finder in FINDERS[kind]:
                found += finder(name, module, modules)
    return [replace(group, depth=depth) for group, depth in zip(found, depths(g.name for g in found), strict=True)]
