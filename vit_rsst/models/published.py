"""Trained models that are no tickets: a folder of timm or transformers, or a name of timm with published weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import timm
from PIL import Image
from torch import nn

from vit_rsst.errors import Damaged, InputError, first_line
from vit_rsst.models import hub, weights, zoo
from vit_rsst.models.catalog import CATALOG

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Where transformers says how images are prepared: older and newer versions."""


@dataclass(frozen=True)
class Published:
    """A network with its weights and what it takes to show it images.

    Attributes:
        net: on the CPU, in evaluation mode; its forward pass gives logits.
        image_size: side in px.
        crop_pct: share of the shorter side that the middle of an image has.
        interpolation: how images are resized.
        mean, std: of the channels.
        classes: names by label; empty where they are not said.
    """

    net: nn.Module
    image_size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]


def kind(what: str) -> str:
    """`timm` or `transformers` for a folder of theirs, `name` for a model of timm's, else empty."""
    config = _read(Path(what) / CONFIG)
    if "architecture" in config and "pretrained_cfg" in config:
        return "timm"
    if "model_type" in config:
        return "transformers"
    return "name" if not Path(what).exists() and timm.is_model(what.split(".")[0]) else ""


def open_published(what: str) -> Published:
    """Builds what `kind` knows, with its weights.

    Raises:
        InputError: a name of this package's catalogue, or one without published weights.
        EnvironmentLacks: the weights can be neither found here nor had.
        Damaged: the folder cannot be loaded, or has its weights as a pickle alone.
    """
    if kind(what) == "transformers":
        return _of_transformers(Path(what))
    if kind(what) == "timm":
        weights.local_file(what)  # timm would read a pickle where there is nothing else
        try:
            net = timm.create_model(f"local-dir:{what}", pretrained=True)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise Damaged(f"{what}: timm cannot load this folder ({first_line(error)}); export it again.") from error
    elif what in CATALOG:
        raise InputError(f"{what}: a model of the catalogue is trained by a recipe first; name a run or a ticket.")
    else:
        net = zoo.create(what, {}, pretrained=True)
    config = net.pretrained_cfg
    shown = (config["input_size"][-1], config["crop_pct"], config["interpolation"])
    return Published(
        net.eval(), *shown, tuple(config["mean"]), tuple(config["std"]), list(config.get("label_names") or [])
    )


def _of_transformers(folder: Path) -> Published:
    config = _read(folder / CONFIG)
    names = {int(number): name for number, name in config.get("id2label", {}).items()}
    classes = [names[number] for number in sorted(names)]
    place = f"{hub.PREFIX}{folder}"
    architecture, args = hub.describe(place, {}, len(classes) or 2)
    net = hub.create(architecture, args, pretrained=True)
    prepared = next(filter(None, (_read(folder / name) for name in PROCESSORS)), {})
    prepared = prepared.get("image_processor", prepared)
    resized = prepared.get("size") or {}
    cropped = (prepared.get("do_center_crop") and prepared.get("crop_size")) or resized
    side = cropped.get("height") or cropped.get("shortest_edge") or config.get("image_size", 224)
    interpolation = Image.Resampling(prepared.get("resample", Image.Resampling.BICUBIC)).name.lower()
    shown = (side, min(side / resized.get("shortest_edge", side), 1.0), interpolation)
    mean, std = (tuple(prepared.get(f"image_{name}", (0.5, 0.5, 0.5))) for name in ("mean", "std"))
    return Published(net.eval(), *shown, mean, std, classes)


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
