"""Predictions: the most probable classes of image files, which the model sees prepared as its run's data were."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from vit_rsst.data.images import decode_file
from vit_rsst.data.transforms import normalize
from vit_rsst.errors import InputError
from vit_rsst.tickets.trained import Trained, default_device, open_trained

BATCH = 64
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""What counts as an image inside a folder; a file that is named itself may be called anything."""


def predict(what: Path, images: Sequence[Path], top: int = 5) -> dict:
    """The `top` most probable classes of every image.

    Args:
        what: a ticket, a run folder or an exported folder.
        images: files, and folders that are searched for them.

    Returns:
        `model`, and `predictions` in the order of the files: `image` and its `classes`, each with name, label and
        probability.

    Raises:
        InputError: there is no such file, it is no image, or a folder has none.
    """
    if top < 1:
        raise InputError(f"--top: {top} classes were asked; at least 1.")
    files = list(find_images(images))
    trained = open_trained(what)
    device = default_device()
    trained.net.to(device)
    parts = (files[start : start + BATCH] for start in range(0, len(files), BATCH))
    found = [item for part in parts for item in _classes(trained, part, top, device)]
    return {"model": str(trained.path), "predictions": found}


def find_images(images: Iterable[Path]) -> Iterator[Path]:
    """The files, and of each folder all image files below it in the order of their names."""
    for path in images:
        if path.is_dir():
            inside = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in SUFFIXES and f.is_file()]
            if not inside:
                raise InputError(f"{path}: there is no image in this folder; expected {', '.join(SUFFIXES)}.")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise InputError(f"{path}: there is no such image file or folder.")


@torch.no_grad()
def _classes(trained: Trained, files: Sequence[Path], top: int, device: torch.device) -> Iterator[dict]:
    pixels = torch.from_numpy(np.stack([decode_file(file, trained.data) for file in files]))
    with trained.autocast(device):
        logits = trained.net(normalize(pixels.to(device), trained.mean, trained.std))
    ranked = logits.float().softmax(1).cpu().topk(min(top, len(trained.classes)), dim=1)
    for file, probabilities, labels in zip(files, ranked.values.tolist(), ranked.indices.tolist(), strict=True):
        classes = [
            {"class": trained.classes[label], "label": label, "probability": probability}
            for label, probability in zip(labels, probabilities, strict=True)
        ]
        yield {"image": str(file), "classes": classes}


def predictions_text(result: dict) -> str:
    """Every image with its classes below it, the most probable first."""
    return "\n".join(
        "\n".join([item["image"], *(f"  {100 * c['probability']:6.2f} %  {c['class']}" for c in item["classes"])])
        for item in result["predictions"]
    )
