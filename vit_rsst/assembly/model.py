"""The model of a recipe, with what it starts from, and what its tickets say of it."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from vit_rsst.assembly.data import channels
from vit_rsst.data.images import ImageData
from vit_rsst.errors import OF_A_LIBRARY, Damaged, InputError, at_field, first_line
from vit_rsst.models import complexity, slim, zoo
from vit_rsst.models.hub import PLACE
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.recipe.schema import Recipe
from vit_rsst.seeds import derived_seed
from vit_rsst.tickets import ticket_file
from vit_rsst.tickets.opening import open_ticket
from vit_rsst.tickets.ticket_file import Ticket


def build_model(recipe: Recipe, data: ImageData) -> tuple[nn.Module, MaskSet | None]:
    """The network, seeded; with the weights and the mask of `model.start_from` where it is given.

    Raises:
        InputError, MissingRequirement, Damaged: it cannot be built, or what it starts from cannot be had.
    """
    architecture, args = zoo.describe(recipe.model.name, recipe.model.args, len(data.classes))
    torch.manual_seed(derived_seed(recipe.seed, "model"))
    net = zoo.create(architecture, args, recipe.model.pretrained)
    if recipe.train.grad_checkpointing:
        zoo.checkpoint_gradients_(net)
    opened = reshape_(net, recipe, architecture, args)
    if opened is None or not recipe.model.start_from:
        return net, None
    path, ticket = opened
    ticket_file.load_into_(net, ticket, str(path))
    return net, ticket.mask


def check_images(recipe: Recipe, size: int, num_classes: int) -> None:
    """Lets a model look at two images of `size` px, in training.

    Raises:
        InputError: it does not take them, or gives something else than a logit a class.
    """
    name = recipe.model.name
    architecture, args = zoo.describe(name, recipe.model.args, num_classes)
    net = zoo.create(architecture, args, device="meta")
    expected = tuple(getattr(getattr(net, "patch_embed", None), "img_size", None) or (size, size))
    if expected != (size, size):
        px = " × ".join(map(str, dict.fromkeys(expected)))
        way_out = f"data.image_size={px}, or " if len(set(expected)) == 1 else ""
        raise InputError(
            f"data.image_size: {name} takes images of {px} px and the data have {size} px; set {way_out}"
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
            f"model.args: {name} stops at images of {size} px ({first_line(error)}); set them, or data.image_size, so "
            "that they fit."
        ) from error
    shape = getattr(logits, "shape", None)
    if shape != (2, num_classes):
        given = f"a {type(logits).__name__}" if shape is None else f"{tuple(shape)}"
        raise InputError(
            f"model.args: {name} gives {given} for two images, not a logit for each of {num_classes} classes; look at "
            "global_pool and at what else shapes its end."
        )


def reshape_(net: nn.Module, recipe: Recipe, architecture: str, args: dict) -> tuple[Path, Ticket] | None:
    """Gives the network the shape of what it starts from, or of what its shape is taken from, and names that.

    Raises:
        InputError: it is a run without a ticket.
        Damaged: it cannot be read, or is of another model.
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
    """Refuses a ticket of another model even where all shapes fit: as many rows may be other heads.

    Raises:
        Damaged: architecture or arguments differ, but for dropout and the place of published weights.
    """
    their_architecture, their_args = zoo.description(ticket.metadata, str(path))
    theirs = {"architecture": their_architecture, **their_args}
    ours = json.loads(json.dumps({"architecture": architecture, **args}))
    for key in sorted(theirs.keys() | ours.keys()):
        if "drop" not in key and key != PLACE and theirs.get(key) != ours.get(key):
            raise Damaged(
                f"{path}: it is of another model: {key} is {theirs.get(key, 'not given')} there and "
                f"{ours.get(key, 'not given')} in this recipe; name the same model in model.name and model.args."
            )


def ticket_header(recipe: Recipe, data: ImageData, net: nn.Module) -> dict[str, str]:
    """What every ticket of the run says of itself: enough to build the model and to prepare its images."""
    architecture, args = zoo.describe(recipe.model.name, recipe.model.args, len(data.classes))
    widths = slim.narrowed(net, zoo.create(architecture, args, device="meta"))
    mean, std = channels(recipe)
    options = data.options
    shown = {"image_size": options.size, "crop_pct": options.crop_share, "interpolation": options.resampling}
    info = {**shown, "mean": mean, "std": std, "classes": data.classes}
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
