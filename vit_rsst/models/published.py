"""Trained models other than tickets: a timm or transformers folder, or a timm name with published weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import timm
from PIL import Image
from torch import nn

from vit_rsst.data.decoding import MODES
from vit_rsst.errors import Damaged, InputError, first_line
from vit_rsst.models import hub, weights, zoo
from vit_rsst.models.catalog import CATALOG

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Image processor files of transformers, of older and newer versions."""


@dataclass(frozen=True)
class Published:
    """A network with its weights and preprocessing.

    Attributes:
        net: on the CPU, in evaluation mode; its forward pass returns logits.
        image_size: side in px.
        crop_pct: centre crop as a fraction of the shorter side.
        interpolation: used to resize images.
        mean, std: per channel.
        classes: class names by label; empty if unknown.
    """

    net: nn.Module
    image_size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]
    crop_mode: str = "center"


def kind(what: str) -> str:
    """`timm` or `transformers` for one of their folders, `name` for a timm model name, else empty."""
    config = _read(Path(what) / CONFIG)
    if "architecture" in config and "pretrained_cfg" in config:
        return "timm"
    if "model_type" in config:
        return "transformers"
    return "name" if not Path(what).exists() and timm.is_model(what.split(".")[0]) else ""


def open_published(what: str) -> Published:
    """Builds a model that `kind` recognises, with its weights.

    Raises:
        InputError: a catalogue name of this package, or a name without published weights.
        MissingRequirement: the weights are not available.
        Damaged: the folder cannot be loaded, or has pickled weights only.
    """
    if kind(what) == "transformers":
        return _of_transformers(Path(what))
    if kind(what) == "timm":
        weights.local_file(what)  # timm would fall back to a pickle
        try:
            net = timm.create_model(f"local-dir:{what}", pretrained=True)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise Damaged(f"{what}: timm cannot load this folder ({first_line(error)}); export it again.") from error
    elif what in CATALOG:
        raise InputError(f"{what}: a catalogue model has no weights until a recipe trains it; name a run or a ticket.")
    else:
        net = zoo.create(what, {}, pretrained=True)
    config = net.pretrained_cfg
    _check_preparation(what, config["interpolation"], config.get("crop_mode") or "center")
    shown = (config["input_size"][-1], config["crop_pct"], config["interpolation"])
    names = list(config.get("label_names") or [])
    return Published(
        net.eval(), *shown, tuple(config["mean"]), tuple(config["std"]), names, config.get("crop_mode") or "center"
    )


def _check_preparation(what: str, interpolation: str, crop_mode: str) -> None:
    """Raises:
    InputError: its preprocessing is not supported.
    """
    known = [kernel.name.lower() for kernel in Image.Resampling]
    for name, value, choices in (("interpolation", interpolation, known), ("crop_mode", crop_mode, MODES)):
        if value not in choices:
            raise InputError(
                f"{what}: unsupported preprocessing: {name} is {value!r}, expected {', '.join(choices)}; evaluate it "
                "with the library it comes from."
            )


def _of_transformers(folder: Path) -> Published:
    config = _read(folder / CONFIG)
    try:
        names = {int(number): name for number, name in config.get("id2label", {}).items()}
    except (AttributeError, ValueError) as error:
        raise Damaged(f"{folder / CONFIG}: id2label does not number its classes ({error}); save it again.") from error
    architecture, args = hub.describe(f"{hub.PREFIX}{folder}", {}, len(names) or 2)
    net = hub.create(architecture, args, pretrained=True)
    processor = next(filter(None, (_read(folder / name) for name in PROCESSORS)), {})
    try:
        prepared = _prepared(processor.get("image_processor", processor), config.get("image_size", 224))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Damaged(
            f"{folder}: cannot read its image processor ({first_line(error)}); save it again with transformers."
        ) from error
    _check_preparation(str(folder), prepared["interpolation"], prepared["crop_mode"])
    classes = [names[number] for number in sorted(names)]
    if classes == [f"LABEL_{number}" for number in sorted(names)]:  # placeholders of transformers
        classes = []
    return Published(net.eval(), classes=classes, **prepared)


def _prepared(processor: dict, image_size: int) -> dict:
    """Preprocessing of a transformers image processor, as fields of `Published`.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: it is not an image processor, or images are not square.
    """
    crops = bool(processor.get("do_center_crop"))
    size = processor.get("size") or {"height": image_size, "width": image_size}
    if isinstance(size, int):  # of older versions
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    crop = (processor.get("crop_size") if crops else None) or {}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    resized, kept = size.get("height") or size["shortest_edge"], crop.get("height")
    for sides in (size, crop):
        if sides.get("height") != sides.get("width"):
            raise ValueError(f"{sides} is not square")
    if kept is not None and kept > resized:
        raise ValueError(f"the crop of {kept} px exceeds the image of {resized} px")
    scale = 255 * (processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0)
    normalizes = processor.get("do_normalize", True)
    mean = processor.get("image_mean", (0.5,) * 3) if normalizes else (0.0,) * 3
    std = processor.get("image_std", (0.5,) * 3) if normalizes else (1.0,) * 3
    if not len(mean) == len(std) == 3:
        raise ValueError(f"image_mean {mean} and image_std {std} do not have three channels")
    return {
        "image_size": kept or resized,
        "crop_pct": (kept or resized) / resized,
        "crop_mode": "squash" if "height" in size else "center",
        "interpolation": Image.Resampling(processor.get("resample", Image.Resampling.BICUBIC)).name.lower(),
        "mean": tuple(value / scale for value in mean),
        "std": tuple(value / scale for value in std),
    }


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
