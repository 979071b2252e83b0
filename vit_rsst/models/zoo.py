"""Models through timm and transformers: the catalogue in timm's registry, and construction that never starts from
random in silence."""

import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping

import timm
import torch
from timm.models import register_model
from torch import nn

from vit_rsst import reach
from vit_rsst.errors import Damaged, EnvironmentLacks, InputError
from vit_rsst.models import hub, slim
from vit_rsst.models.catalog import CATALOG, stock
from vit_rsst.models.resnet import CifarResNet

OWN = {"resnet20": CifarResNet}
"""Catalogue names that neither timm nor transformers has."""

TIMMS_OWN = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments that `timm.create_model` adds of itself."""

SOURCES_OF_WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of `timm.create_model` through which a file of any kind would be loaded."""


def _register(name: str) -> None:
    """Makes a catalogue name one that `timm.create_model` knows as well."""

    def entrypoint(pretrained: bool = False, **kwargs: object) -> nn.Module:
        if pretrained and not CATALOG[name].has_weights:
            raise ValueError(f"{name} has no published weights")
        args = {**CATALOG[name].args, **kwargs}
        if CATALOG[name].is_stock:
            return timm.create_model(CATALOG[name].architecture, pretrained=pretrained, **args)
        return OWN[name](**{key: value for key, value in args.items() if key not in TIMMS_OWN})

    entrypoint.__name__ = name
    entrypoint.__module__ = __name__
    register_model(entrypoint)


for _name in CATALOG:
    _register(_name)


def describe(name: str, args: dict, num_classes: int) -> tuple[str, dict]:
    """Architecture and all arguments that build the model, where it is a stock one without this package."""
    if name.startswith(hub.PREFIX):
        return hub.describe(name, args, num_classes)
    found = stock(name)
    return found.architecture, {**found.args, **args, "num_classes": num_classes}


def create(architecture: str, args: dict, pretrained: bool = False, device: str | None = None) -> nn.Module:
    """Builds a model.

    Args:
        architecture: a name of timm or `hf:TYPE`, as `describe` gives it.
        args: arguments of `timm.create_model`, `num_classes` among them; of `hf:TYPE` the configuration's fields.
        pretrained: load published weights; timm resamples patch and position embeddings and replaces the head.
        device: where to build; `meta` makes shapes without memory.

    Raises:
        InputError: no such model, arguments it does not take, or no published weights for it.
        EnvironmentLacks: the weights exist but cannot be had.
    """
    if beside := sorted(set(args) & set(SOURCES_OF_WEIGHTS)):
        raise InputError(
            f"model.args.{beside[0]}: names other weights, past all checks; use model.pretrained, or model.start_from."
        )
    if architecture.startswith(hub.PREFIX):
        return hub.create(architecture, args, pretrained, device)
    if not timm.is_model(architecture.split(".")[0]):
        near = difflib.get_close_matches(architecture, [*CATALOG, *timm.list_models()], n=3)
        raise InputError(
            f"model.name: unknown model {architecture!r}; expected {', '.join(CATALOG)} or a name of timm "
            f"{timm.__version__}." + (f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
        )
    if pretrained and not timm.is_model_pretrained(architecture):
        raise InputError(
            f"model.pretrained: timm has no weights for {architecture!r}; set it to false or name another."
        )
    if pretrained:
        reach.prefer_cache()
    try:
        with torch.device(device or "cpu"), _recorded_loads() as loads:
            net = timm.create_model(architecture, pretrained=pretrained, **args)
    except TypeError as error:
        raise InputError(f"model.args: {architecture} does not take these arguments: {error}.") from error
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        if not pretrained:
            raise InputError(f"model.args: {architecture} cannot be built with {args}: {error}.") from error
        why = " ".join(str(error).split())
        raise EnvironmentLacks(
            f"model.pretrained: the weights of {architecture!r} could not be loaded ({why}). Check the network or "
            "the cache, or set model.pretrained=false to train from random weights."
        ) from error
    if pretrained:
        _check_loaded(net, loads, architecture)
    return net


def description(header: Mapping[str, str], place: str) -> tuple[str, dict]:
    """Architecture and arguments in the header of a ticket, as `describe` gave them.

    Raises:
        Damaged: the header does not hold them.
    """
    missing = [key for key in ("architecture", "model_args") if key not in header]
    if missing:
        raise Damaged(f"{place}: the header has no {missing[0]!r}; it does not come from a run of this version.")
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


@contextlib.contextmanager
def _recorded_loads() -> Iterator[list]:
    """What every `load_state_dict` meanwhile found missing and left over; timm only logs it."""
    found, original = [], nn.Module.load_state_dict

    def load_state_dict(self: nn.Module, *args: object, **kwargs: object) -> object:
        found.append(original(self, *args, **kwargs))
        return found[-1]

    nn.Module.load_state_dict = load_state_dict
    try:
        yield found
    finally:
        nn.Module.load_state_dict = original


def _check_loaded(net: nn.Module, loads: list, architecture: str) -> None:
    """Refuses weights that left a part of the network, other than a new classifier, at random."""
    classifier = net.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    wrong = [
        key for load in loads for key in (*load.missing_keys, *load.unexpected_keys) if not key.startswith(tuple(heads))
    ]
    if wrong or not loads:
        raise InputError(
            f"model.pretrained: the published weights of {architecture} do not fit this network in {len(wrong)} places "
            f"({', '.join(wrong[:5])}); use its own width and depth in model.args, or set model.pretrained=false."
        )
