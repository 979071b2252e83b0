"""The model of a recipe, its initial weights, and the header of its tickets."""

import functools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from vit_rsst.assembly.data import channels
from vit_rsst.data.images import ImageData
from vit_rsst.errors import OF_A_LIBRARY, Damaged, InputError, at_field, first_line
from vit_rsst.models import complexity, observation, slim, zoo
from vit_rsst.models.hub import PLACE
from vit_rsst.models.weights import Classes, is_path, shortened
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.recipe.schema import Recipe
from vit_rsst.seeds import derived_seed
from vit_rsst.tickets import ticket_file
from vit_rsst.tickets.opening import open_ticket
from vit_rsst.tickets.ticket_file import Ticket


def build_model(
    recipe: Recipe, num_classes: int, classes: Sequence[str] = (), is_real: bool = True
) -> tuple[nn.Module, MaskSet | None]:
    """The network, seeded, with the weights and the mask of `model.start_from` if set.

    Parameters that the loss does not reach are frozen.

    Args:
        classes: of the data, by label, which a classifier from elsewhere is fitted to; empty if not known.
        is_real: False: shapes alone, on `meta`; nothing is downloaded, and weights in local files are only checked.

    Raises:
        InputError, MissingRequirement, Damaged: it cannot be built, its initial weights cannot be loaded, or they
            predict other classes.
    """
    architecture, args = zoo.describe(recipe.model.name, recipe.model.args, num_classes)
    pretrained = recipe.model.pretrained if is_real or is_path(recipe.model.pretrained) else False
    torch.manual_seed(derived_seed(recipe.seed, "model"))
    net = zoo.create(architecture, args, pretrained, None if is_real else "meta", classes)
    net.observed = observe(architecture, json.dumps(args), recipe.data.size)
    observation.freeze_(net, net.observed.unreached)
    if recipe.train.grad_checkpointing:
        zoo.checkpoint_gradients_(net)
    opened = reshape_(net, recipe, architecture, args)
    if opened is None or not recipe.model.start_from:
        return net, None
    path, ticket = opened
    ticket = of_our_classes(path, ticket, net, classes)
    if is_real:
        ticket_file.load_into_(net, ticket, str(path))
    return net, ticket.mask


@functools.cache
def observe(architecture: str, args: str, size: int) -> observation.Observed:
    """What one pass through a model shows on images of `size` px; `args` is JSON."""
    with torch.random.fork_rng(devices=[]):
        return observation.observe(zoo.create(architecture, json.loads(args), device="meta"), size)


def of_our_classes(path: Path, ticket: Ticket, net: nn.Module, classes: Sequence[str]) -> Ticket:
    """A ticket whose classifier predicts our classes in our order.

    Raises:
        InputError: it predicts other classes.
    """
    theirs = json.loads(ticket.metadata.get("data", "{}")).get("classes", ())
    known = Classes(tuple(theirs), tuple(classes))
    if known.rows is None:
        raise InputError(
            f"model.start_from: {path} was trained on other classes ({shortened(known.theirs)}) than those of the "
            f"dataset ({shortened(known.ours)}); for a new classifier, export it with `vit-rsst export "
            f"{shlex.quote(str(path))} --to timm FOLDER` and set model.pretrained=FOLDER."
        )
    if known.rows == sorted(known.rows):
        return ticket
    net.note = f"{path} has the same classes in another order; its classifier is reordered by name"
    names = net.pretrained_cfg["classifier"]
    parts = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))

    def reordered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor[known.rows] if name.startswith(parts) else tensor for name, tensor in tensors.items()}

    return replace(ticket, state=reordered(ticket.state), mask=MaskSet(reordered(ticket.mask.masks)))


def check_images(recipe: Recipe, size: int, num_classes: int) -> None:
    """Runs the model on two images of `size` px, in training mode.

    Raises:
        InputError: it rejects them, or does not return one logit per class.
    """
    name = recipe.model.name
    architecture, args = zoo.describe(name, recipe.model.args, num_classes)
    net = zoo.create(architecture, args, device="meta")
    expected = tuple(getattr(getattr(net, "patch_embed", None), "img_size", None) or (size, size))
    if expected != (size, size):
        px = " × ".join(map(str, dict.fromkeys(expected)))
        way_out = f"data.image_size={px}, or " if len(set(expected)) == 1 else ""
        raise InputError(
            f"data.image_size: {name} expects images of {px} px, but the dataset has {size} px; set {way_out}"
            f"model.args.img_size={size}."
        )

    def look(device: str) -> object:
        looking = net if device == "meta" else zoo.create(architecture, args)
        return looking.train()(complexity.images(2, size, device))

    try:
        with torch.no_grad():
            logits = complexity.without_numbers(look)
    except OF_A_LIBRARY as error:
        raise InputError(
            f"model.args: {name} fails on images of {size} px ({first_line(error)}); adjust model.args or "
            "data.image_size."
        ) from error
    shape = getattr(logits, "shape", None)
    if shape != (2, num_classes):
        given = f"a {type(logits).__name__}" if shape is None else f"{tuple(shape)}"
        raise InputError(
            f"model.args: {name} returns {given} for two images instead of a logit for each of {num_classes} classes; "
            "check global_pool and the other arguments that shape the head."
        )


def reshape_(net: nn.Module, recipe: Recipe, architecture: str, args: dict) -> tuple[Path, Ticket] | None:
    """Gives the network the shape of `model.start_from` or `model.shape_from`; returns that ticket.

    Raises:
        InputError: a run without a ticket.
        Damaged: it cannot be read, or belongs to another model.
    """
    field = "model.start_from" if recipe.model.start_from else "model.shape_from"
    source = recipe.model.start_from or recipe.model.shape_from
    if not source:
        return None
    with at_field(field):
        path, ticket = open_ticket(Path(source).expanduser())
    check_same_model(path, ticket, architecture, args)
    if recipe.model.shape_from or "widths" in ticket.metadata:
        slim.shape_like_(net, slim.shape_of(net, ticket.mask, ticket.metadata), str(path))
    return path, ticket


def check_same_model(path: Path, ticket: Ticket, architecture: str, args: dict) -> None:
    """Rejects a ticket of another model even if all shapes match: the same rows may be split into other heads.

    Raises:
        Damaged: architecture or arguments differ, except for dropout and the location of published weights.
    """
    their_architecture, their_args = zoo.description(ticket.metadata, str(path))
    theirs = {"architecture": their_architecture, **their_args}
    ours = json.loads(json.dumps({"architecture": architecture, **args}))
    for key in sorted(theirs.keys() | ours.keys()):
        if "drop" not in key and key != PLACE and theirs.get(key) != ours.get(key):
            raise Damaged(
                f"{path}: belongs to another model: {key} is {theirs.get(key, 'not set')} there and "
                f"{ours.get(key, 'not set')} in this recipe; use the same model.name and model.args."
            )


def ticket_header(recipe: Recipe, data: ImageData, net: nn.Module) -> dict[str, str]:
    """Header of every ticket of the run: enough to rebuild the model and to preprocess its images."""
    architecture, args = zoo.describe(recipe.model.name, recipe.model.args, len(data.classes))
    widths = slim.narrowed(net, zoo.create(architecture, args, device="meta"))
    mean, std = channels(recipe)
    options = data.options
    shown = {"image_size": options.size, "crop_pct": options.crop_share, "interpolation": options.resampling}
    info = {**shown, "mean": mean, "std": std, "classes": data.classes}
    info["content"] = data.identity.get("content")
    return {
        "model": recipe.model.name,
        "architecture": architecture,
        "model_args": json.dumps(args),
        "data": json.dumps({**asdict(options), **info}),
        "seed": str(recipe.seed),
        "method": recipe.pruning.method_name,
        "precision": recipe.train.precision,
        "ema": str(recipe.train.ema_decay or "false"),
        "recipe": recipe.fingerprint,
        **({"widths": json.dumps(widths)} if widths else {}),
        **({"pretrained": net.loaded.sha256} if hasattr(net, "loaded") else {}),
    }
