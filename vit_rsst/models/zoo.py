"""Models through timm and transformers: the catalogue in timm's registry, and construction that never starts from
random in silence."""

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
    """What timm wants to know of an architecture of this package: its images, first layer and classifier."""
    is_vit, size = issubclass(OWN[name], VisionTransformer), CATALOG[name].args.get("img_size", 32)
    first, last = ("patch_embed.proj", "head") if is_vit else ("conv1", "fc")
    classes = {"num_classes": -1}  # none that would be a default
    return {
        "input_size": (3, size, size),
        "fixed_input_size": is_vit,
        "first_conv": first,
        "classifier": last,
    } | classes


default_cfgs = {name: _published_cfg(name) for name in OWN}
"""Where timm looks for them."""

SOURCES_OF_WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of `timm.create_model` through which a file of any kind would be loaded."""


def _register(name: str) -> None:
    """Makes a catalogue name one that `timm.create_model` knows as well."""

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
    """An architecture of this package, built and loaded as timm builds and loads its own."""
    adapt = checkpoint_filter_fn if issubclass(OWN[name], VisionTransformer) else None
    return build_model_with_cfg(OWN[name], name, pretrained, pretrained_filter_fn=adapt, **args)


for _name in CATALOG:
    _register(_name)


def describe(name: str, args: dict, num_classes: int) -> tuple[str, dict]:
    """Architecture and all arguments that build the model, where it is a stock one without this package."""
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
        architecture: a name of timm or `hf:TYPE`, as `describe` gives it.
        args: arguments of `timm.create_model`, `num_classes` among them; of `hf:TYPE` the configuration's fields.
        pretrained: load published weights, or those of a tag of timm's, or of a file or folder; timm resamples patch
            and position embeddings, and the classifier is new where the classes differ. What was loaded is then the
            network's attribute `loaded`.
        device: where to build; `meta` makes shapes without memory, and weights are checked and not loaded.
        classes: of the data, by label: of pretrained weights, a classifier of the same classes is reordered to fit,
            one of other classes is new.

    Raises:
        InputError: no such model or tag, arguments it does not take, or no published weights for it.
        MissingRequirement: the weights exist but cannot be had.
        Damaged: the file is damaged, or of another model.
    """
    if beside := sorted(set(args) & set(SOURCES_OF_WEIGHTS)):
        raise InputError(
            f"model.args.{beside[0]}: loads weights without any check; use model.pretrained or model.start_from."
        )
    if architecture.startswith(hub.PREFIX):
        return hub.create(architecture, args, pretrained, device, classes)
    if not timm.is_model(architecture.split(".")[0]):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)  # those of CATALOG among them
        raise InputError(
            f"model.name: unknown model {architecture!r}; expected {', '.join(CATALOG)} or a name of timm "
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
    """Share of the learning rate that each parameter gets: 1 in the last layer, times `decay` for each one before.

    Raises:
        InputError: the model does not list its layers.
    """
    if not hasattr(net, "group_matcher"):
        raise InputError(
            f"optim.layer_decay: {type(net).__name__} does not list its layers as timm models do; leave it out."
        )
    layers = group_parameters(net, cast(VisionTransformer, net).group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def checkpoint_gradients_(net: nn.Module) -> None:
    """Makes the network recompute its blocks in the backward pass instead of keeping their activations.

    Raises:
        InputError: the model cannot do that.
    """
    try:
        if hasattr(net, "gradient_checkpointing_enable"):  # transformers
            cast("PreTrainedModel", net).gradient_checkpointing_enable({"use_reentrant": False})
        else:
            cast(VisionTransformer, net).set_grad_checkpointing(True)
    except (AttributeError, AssertionError, ValueError) as error:
        raise InputError(
            f"train.grad_checkpointing: {type(net).__name__} cannot recompute its blocks ({first_line(error)}); "
            "set it to false."
        ) from error


def description(header: Mapping[str, str], place: str) -> tuple[str, dict]:
    """Architecture and arguments in the header of a ticket, as `describe` gave them.

    Raises:
        Damaged: the header does not hold them.
    """
    missing = [key for key in ("architecture", "model_args") if key not in header]
    if missing:
        raise Damaged(f"{place}: the header has no {missing[0]!r}; it was not written by a run of this version.")
    return header["architecture"], json.loads(header["model_args"])


def described(header: Mapping[str, str], place: str, device: str | None = None) -> nn.Module:
    """The network that the header of a ticket describes, of the widths that it names; its weights are random.

    Raises:
        Damaged: the header does not say what to build, or describes what cannot be built.
    """
    architecture, args = description(header, place)
    net = create(architecture, args, device=device)
    if "widths" in header:
        slim.shape_like_(net, json.loads(header["widths"]), place)
    return net
