"""Models from timm and transformers: registers the catalogue with timm, and builds models without silently random
weights."""

import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import timm
import torch
from timm.models import build_model_with_cfg, group_parameters, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from vit_rsst.errors import OF_A_LIBRARY, Damaged, InputError, first_line
from vit_rsst.models import hub, slim, timm_weights
from vit_rsst.models.catalog import CATALOG, stock
from vit_rsst.models.dynamic_vit import DynamicVit
from vit_rsst.models.gated_vit import GatedVit
from vit_rsst.models.lightweight_vit import LightweightVit
from vit_rsst.models.resnet import CifarResNet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN: dict[str, type[nn.Module]] = {
    "resnet20": CifarResNet,
    "dynamic_vit": DynamicVit,
    "lightweight_vit": LightweightVit,
    "vit_t16": GatedVit,
    "vit_m16": GatedVit,
}
"""Catalogue names that neither timm nor transformers has."""


def _published_cfg(name: str) -> dict:
    """timm's `default_cfg` of an architecture of this package: image size, first layer and classifier."""
    is_vit, size = issubclass(OWN[name], VisionTransformer), CATALOG[name].args.get("img_size", 32)
    first, last = ("patch_embed.proj", "head") if is_vit else ("conv1", "fc")
    classes = {"num_classes": -1}  # no default
    return {
        "input_size": (3, size, size),
        "fixed_input_size": is_vit,
        "first_conv": first,
        "classifier": last,
    } | classes


default_cfgs = {name: _published_cfg(name) for name in OWN}
"""Module attribute that timm reads."""

SOURCES_OF_WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of `timm.create_model` that would load arbitrary files."""


def _register(name: str) -> None:
    """Registers a catalogue name with `timm.create_model`."""

    def entrypoint(pretrained: bool = False, **kwargs: object) -> nn.Module:
        cfg, overlay = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
        if pretrained and not (CATALOG[name].has_weights or cfg or overlay):
            raise ValueError(f"{name} has no published weights")
        args = {**CATALOG[name].args, **kwargs}
        if CATALOG[name].is_stock:
            return timm.create_model(CATALOG[name].architecture, pretrained=pretrained, **args)
        return _build_own(name, pretrained, args)

    entrypoint.__name__ = name
    entrypoint.__module__ = __name__
    register_model(entrypoint)


def _build_own(name: str, pretrained: bool, args: dict) -> nn.Module:
    """Builds an architecture of this package the way timm builds its own."""
    adapt = checkpoint_filter_fn if issubclass(OWN[name], VisionTransformer) else None
    return build_model_with_cfg(OWN[name], name, pretrained, pretrained_filter_fn=adapt, **args)


@functools.cache
def register_models() -> None:
    """Registers the catalogue with `timm.create_model`, once."""
    for name in CATALOG:
        _register(name)


register_models()


def describe(name: str, args: dict, num_classes: int) -> tuple[str, dict]:
    """Architecture and complete arguments of a model; stock ones can be built without this package."""
    if name.startswith(hub.PREFIX):
        return hub.describe(name, args, num_classes)
    found = stock(name)
    return found.architecture, {**found.args, **args, "num_classes": num_classes}


def create(
    architecture: str,
    args: dict,
    pretrained: bool | str = False,
    device: str | None = None,
    classes: Sequence[str] = (),
) -> nn.Module:
    """Builds a model.

    Args:
        architecture: a timm name or `hf:TYPE`, as returned by `describe`.
        args: arguments of `timm.create_model`, including `num_classes`; for `hf:TYPE`, configuration fields.
        pretrained: load published weights, or those of a timm tag, or of a file or folder; timm resamples patch and
            position embeddings, and the classifier is replaced if classes differ. The network's attribute `loaded`
            records what was loaded.
        device: where to build; on `meta`, weights are checked but not loaded.
        classes: of the data, by label; a pretrained classifier of the same classes is reordered to match, one of other
            classes is replaced.

    Raises:
        InputError: unknown model or tag, unsupported arguments, or no published weights.
        MissingRequirement: the weights exist but are not available.
        Damaged: the file is damaged, or belongs to another model.
    """
    if beside := sorted(set(args) & set(SOURCES_OF_WEIGHTS)):
        raise InputError(
            f"model.args.{beside[0]}: loads weights without checks; use model.pretrained or model.start_from."
        )
    if architecture.startswith(hub.PREFIX):
        return hub.create(architecture, args, pretrained, device, classes)
    if not timm.is_model(architecture.split(".")[0]):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)  # includes CATALOG
        raise InputError(
            f"model.name: unknown model {architecture!r}; expected {', '.join(CATALOG)} or a model of timm "
            f"{timm.__version__}." + (f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
        )
    build = functools.partial(_build, architecture, args, device=device)
    return timm_weights.load(build, architecture, pretrained, classes) if pretrained else build()


def _build(architecture: str, args: dict, device: str | None = None, **loading: object) -> nn.Module:
    try:
        with torch.device(device or "cpu"):
            return timm.create_model(architecture, **loading, **args)
    except TypeError as error:
        raise InputError(f"model.args: {architecture} does not take these arguments: {error}.") from error
    except InputError:
        raise
    except (OSError, *OF_A_LIBRARY) as error:
        raise InputError(f"model.args: {architecture} cannot be built with {args}: {first_line(error)}.") from error


def lr_scales(net: nn.Module, decay: float) -> dict[str, float]:
    """Learning rate scale of each parameter: 1 in the last layer, multiplied by `decay` for each earlier layer.

    Raises:
        InputError: the model does not define its layers.
    """
    if not hasattr(net, "group_matcher"):
        raise InputError(
            f"optim.layer_decay: {type(net).__name__} does not define `group_matcher` as timm models do; leave it out."
        )
    layers = group_parameters(net, cast(VisionTransformer, net).group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def checkpoint_gradients_(net: nn.Module) -> None:
    """Enables gradient checkpointing: blocks are recomputed in the backward pass instead of storing activations.

    Raises:
        InputError: the model does not support it.
    """
    try:
        if hasattr(net, "gradient_checkpointing_enable"):  # transformers
            cast("PreTrainedModel", net).gradient_checkpointing_enable({"use_reentrant": False})
        else:
            cast(VisionTransformer, net).set_grad_checkpointing(True)
    except (AttributeError, AssertionError, ValueError) as error:
        raise InputError(
            f"train.grad_checkpointing: {type(net).__name__} does not support it ({first_line(error)}); set it to "
            "false."
        ) from error


def description(header: Mapping[str, str], place: str) -> tuple[str, dict]:
    """Architecture and arguments in a ticket's header, as returned by `describe`.

    Raises:
        Damaged: the header lacks them.
    """
    missing = [key for key in ("architecture", "model_args") if key not in header]
    if missing:
        raise Damaged(f"{place}: the header has no {missing[0]!r}; it was not written by a run of this version.")
    return header["architecture"], json.loads(header["model_args"])


def described(header: Mapping[str, str], place: str, device: str | None = None) -> nn.Module:
    """The network described in a ticket's header, with its widths and random weights.

    Raises:
        Damaged: the header is incomplete, or its widths do not fit the model.
    """
    architecture, args = description(header, place)
    net = create(architecture, args, device=device)
    if "widths" in header:
        slim.shape_like_(net, json.loads(header["widths"]), place)
    return net
