"""Subjects of an analysis: a network with its mask.

A model of the catalogue, of timm or `hf:TYPE`; a recipe; a ticket, a run folder (its last ticket) or a slim folder.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from vit_rsst.assembly.data import count_rows
from vit_rsst.assembly.model import build_model
from vit_rsst.assembly.parts import parts_of
from vit_rsst.errors import InputError, first_line
from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_weights, unit_groups
from vit_rsst.models.complexity import flops_by_module, size_of
from vit_rsst.models.slim import SlimForm
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.units import UnitGroup
from vit_rsst.recipe import loading
from vit_rsst.recipe.schema import Recipe, Train
from vit_rsst.tickets import ticket_file
from vit_rsst.tickets.opening import open_ticket

NUM_CLASSES = 10
"""Classes of a model given by name alone, as in `vit-rsst models`."""


@dataclass(frozen=True)
class Subject:
    """A network to analyse.

    Attributes:
        label: short name, for column heads.
        kind: model, recipe or ticket.
        header: `architecture`, `model_args` and, for a slim network, `widths`: enough to rebuild its shape.
        net: on the CPU, in evaluation mode, masked; with random weights for a model or a recipe.
        mask: of the prunable weights.
        batch: images per training step on one device.
        moments: values that the optimizer keeps per weight.
        file: the ticket.
    """

    label: str
    kind: str
    header: dict[str, str]
    net: nn.Module
    mask: MaskSet
    image_size: int
    batch: int = Train().global_batch
    moments: int = 2
    file: Path | None = None

    @cached_property
    def groups(self) -> list[UnitGroup]:
        return unit_groups(self.net)

    @cached_property
    def slim(self) -> SlimForm:
        return SlimForm(self.net, self.mask)


def open_subject(what: str, image_size: int | None = None) -> Subject:
    """Resolves a name or path to a subject and builds it.

    Args:
        image_size: side of the images in px; None: the default of the model.

    Raises:
        InputError: nothing of that name, or a model that does not accept images of this size.
        Damaged: a ticket or a slim folder that cannot be read.
    """
    path = Path(what).expanduser()
    if path.is_dir() or path.suffix == ".safetensors":
        subject = _of_ticket(path, image_size)
    elif path.suffix in (".yaml", ".yml") or what in _builtin_names():
        subject = _of_recipe(loading.load(loading.find(what)), image_size)
    else:
        subject = _of_model(what, image_size)
    subject.net.eval()
    try:
        flops_by_module(subject.net, subject.image_size)
    except (AssertionError, RuntimeError, ValueError) as error:  # depends on the library
        raise InputError(
            f"{what}: does not accept images of {subject.image_size} px ({first_line(error)}); "
            "set --image-size to the input size of the model."
        ) from error
    return subject


def _builtin_names() -> list[str]:
    folder = loading.builtin_folder()
    return [str(path.relative_to(folder).with_suffix("")) for path in loading.builtin_recipes()]


def _of_ticket(what: Path, image_size: int | None) -> Subject:
    path, ticket = open_ticket(what)
    net = zoo.described(ticket.metadata, str(path))
    ticket_file.load_into_(net, ticket, str(path))
    run = path.parent.parent.name if path.parent.name == "tickets" else path.parent.name
    label = f"{run}/{path.stem}" if path.is_file() else path.name
    own = json.loads(ticket.metadata.get("data", "{}")).get("image_size")
    return Subject(
        label, "ticket", _shape(ticket.metadata), net, ticket.mask, image_size or own or size_of(net), file=path
    )


def _of_recipe(recipe: Recipe, image_size: int | None) -> Subject:
    num_classes = recipe.data.info.num_classes or count_rows(recipe).num_classes
    net, start_mask = build_model(recipe, num_classes)
    parts = parts_of(recipe, net, start_mask, recipe.data.size)
    architecture, args = zoo.describe(recipe.model.name, recipe.model.args, num_classes)
    return Subject(
        recipe.name,
        "recipe",
        {"architecture": architecture, "model_args": json.dumps(args)},
        net,
        parts.mask,
        image_size or parts.image_size,
        recipe.train.batch_per_device or recipe.train.global_batch,
        2 if recipe.optim.name != "sgd" else int(recipe.optim.momentum > 0),
    )


def _of_model(name: str, image_size: int | None) -> Subject:
    architecture, args = zoo.describe(name, {}, NUM_CLASSES)
    net = zoo.create(architecture, args, device="meta")
    own = size_of(net)
    if image_size not in (None, own):
        resizable = {"image_size": getattr(net, "config", None), "img_size": getattr(net, "patch_embed", None)}
        args |= {key: image_size for key, part in resizable.items() if hasattr(part, key)}
    net = zoo.create(architecture, args)
    header = {"architecture": architecture, "model_args": json.dumps(args)}
    return Subject(name, "model", header, net, MaskSet.full(prunable_weights(net)), image_size or own)


def _shape(header: dict[str, str]) -> dict[str, str]:
    return {key: header[key] for key in ("architecture", "model_args", "widths") if key in header}
