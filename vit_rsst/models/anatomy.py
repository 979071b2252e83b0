"""Anatomy: which weights of a model can be pruned. For a ViT: qkv, proj, fc1 and fc2 of every block."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from vit_rsst.errors import InputError


def prunable_weights(
    model: nn.Module, include: Iterable[str] = (), protect: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """The weights of Linear and Conv layers, less the first layer and the classifier, by parameter name.

    Args:
        model: a timm model; its `pretrained_cfg` names the first layer and the classifier.
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
    return ends
