"""Models to tickets and back: what a training script keeps, readable by `vit_rsst.load` and by the command line."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vit_rsst.data.catalog import CATALOG
from vit_rsst.data.options import DataOptions
from vit_rsst.errors import InputError, RunError, unknown
from vit_rsst.library.target import unwrapped
from vit_rsst.models import hub, slim, zoo
from vit_rsst.models.anatomy import prunable_weights, unit_groups
from vit_rsst.models.complexity import size_of
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.recipe.calls import in_words_of
from vit_rsst.tickets import ticket_file
from vit_rsst.tickets.opening import open_ticket

OF_DATA = ("mean", "std", "classes")
"""Entries of a ticket's `data` beside the data options."""


def save(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    args: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Path:
    """Writes a model as a ticket: of pruned weights the values that are left and one bit per element.

    Args:
        path: of the file, `NAME.safetensors`; replaced if it exists.
        name: of the architecture: of the catalogue or timm, or `hf:TYPE`; default: what timm or transformers notes in
            the model, if that builds the same shapes. A ticket without one is loaded with `load(path, model)`.
        args: arguments of that architecture beside `num_classes`, such as `{"img_size": 32}`.
        data: what `vit-rsst evaluate` and `export` need: `source`, `classes` and further fields of a recipe's section
            `data`; `mean` and `std` per channel, in 0 … 1, default to the source's.
        masks: weight name → bool, True is alive; default: the prunable weights where they are not zero.
        seed: with which the source was split.

    Returns:
        The path.

    Raises:
        InputError: the architecture does not have the model's shapes, or a field of `data` is unknown.
        MissingRequirement: the disk is full.
    """
    path = Path(path)
    with in_words_of("save", {"model.name": "name", "model.args": "args", "model": "model"}):
        net = unwrapped(model)
        if path.suffix != ".safetensors" or not path.parent.is_dir():
            raise InputError(f"save(path=…): {path}: expected NAME.safetensors in an existing folder.")
        header = described(net, name, args) | {"seed": str(seed), "precision": "no"}
        if data is not None:
            header["data"] = json.dumps(_data(net, data))
    if masks is None:
        masks = {weight: value.detach() != 0 for weight, value in prunable_weights(net).items()}
    ticket_file.save(path, net.state_dict(), MaskSet(masks), header)
    return path


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model of a ticket, of a run folder's last ticket, or of a slim or dense folder.

    Args:
        model: takes the weights, in place, if the file does not say how to build one; needed then.

    Returns:
        The model in evaluation mode, on the CPU unless `model` is elsewhere; zero where masked.

    Raises:
        InputError: a run folder without a ticket, or a ticket that does not name its architecture.
        Damaged: it does not exist, cannot be read, or does not fit the model.
    """
    place, ticket = open_ticket(Path(path).expanduser())
    if model is None and "architecture" not in ticket.metadata:
        raise InputError(f"load(path=…): {place} does not name its architecture; pass the model as second argument.")
    net = zoo.described(ticket.metadata, str(place)) if model is None else unwrapped(model)
    ticket_file.load_into_(net, ticket, str(place))
    return net.eval()


def described(net: nn.Module, name: str | None = None, args: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Header entries that rebuild the network; none if it is not known how."""
    args = dict(args or {})
    if name is not None:
        architecture, complete = zoo.describe(name, args, _num_classes(net, args))
        return _header(net, name, architecture, complete)
    if args:
        raise InputError("save(args=…): has no effect without name; set it, or omit args.")
    for architecture, complete in _noted(net):
        try:
            return _header(net, architecture, architecture, complete)
        except RunError:
            continue
    return {}


def _noted(net: nn.Module) -> list[tuple[str, dict]]:
    """What timm and transformers note in a model of theirs."""
    config: Any = getattr(net, "config", None)
    if hasattr(config, "to_diff_dict") and hasattr(net, "base_model_prefix"):
        fields = {key: value for key, value in config.to_diff_dict().items() if key not in hub.OF_A_FILE}
        architectures = {"architectures": [type(net).__name__], "num_labels": config.num_labels}
        return [(f"{hub.PREFIX}{config.model_type}", {**fields, **architectures})]
    architecture = (getattr(net, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture:
        return []
    classes = {"num_classes": net.num_classes} if hasattr(net, "num_classes") else {}
    return [(architecture, classes), (architecture, classes | {"img_size": size_of(net)})]


def _header(net: nn.Module, name: str, architecture: str, args: dict) -> dict[str, str]:
    """
    Raises:
        InputError: the architecture has other shapes or units, apart from those that are cut out.
    """
    stock = zoo.create(architecture, args, device="meta")
    cut = (
        slim.narrowed(net, stock) if {g.name for g in unit_groups(net)} <= {g.name for g in unit_groups(stock)} else {}
    )
    slim.shape_like_(stock, cut, "save(model=…)")
    units, theirs = ({g.name: (g.kind, g.units) for g in unit_groups(one)} for one in (net, stock))
    shapes, found = (ticket_file.shapes(one.state_dict()) for one in (net, stock))
    if units != theirs or shapes != found:
        wrong = next((key for key in shapes | found if shapes.get(key) != found.get(key)), "the number of its heads")
        raise InputError(f"save(name=…): {name} with these args is not the model to save: {wrong} differs.")
    widths = {"widths": json.dumps(cut)} if cut else {}
    return {"model": name, "architecture": architecture, "model_args": json.dumps(args), **widths}


def _num_classes(net: nn.Module, args: Mapping[str, Any]) -> int:
    found = args.get(
        "num_classes", getattr(net, "num_classes", getattr(getattr(net, "config", None), "num_labels", None))
    )
    if found is None:
        raise InputError("save(args=…): num_classes is missing, and the model does not say it.")
    return found


def _data(net: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(DataOptions)]
    for key in given:
        if key not in (*known, *OF_DATA):
            raise InputError(f"save(data=…): {unknown('field', key, [*known, *OF_DATA])}")
    for key in ("source", "classes"):
        if key not in given:
            raise InputError(f"save(data=…): {key!r} is missing.")
    if given["source"] not in CATALOG:
        raise InputError(f"save(data=…): {unknown('source', given['source'], CATALOG)}")
    options = DataOptions(**{"image_size": size_of(net)} | {k: v for k, v in given.items() if k not in OF_DATA})
    info = options.info
    shown = {"crop_pct": options.crop_share, "interpolation": options.resampling, "classes": list(given["classes"])}
    return asdict(options) | shown | {key: list(given.get(key, getattr(info, key))) for key in ("mean", "std")}
