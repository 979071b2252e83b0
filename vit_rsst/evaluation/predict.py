"""Predictions: the most probable classes of image files, prepared as the images of the model's dataset were."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from vit_rsst.data.decoding import Corrupt, suffixes
from vit_rsst.data.images import decode_file
from vit_rsst.data.transforms import normalize
from vit_rsst.data.tree import read_tree
from vit_rsst.errors import InputError
from vit_rsst.tickets.trained import Trained, default_device, open_trained

BATCH = 64


def predict(what: Path, images: Sequence[Path], top: int = 5) -> dict:
    """The `top` most probable classes of every image.

    Args:
        what: a ticket, a run folder or an exported folder.
        images: files, and folders that are searched for them.

    Returns:
        `model`; `predictions` in the order of the files: `image` and its `classes`, each with name, label and
        probability; `skipped`: a sentence for each file that cannot be decoded.

    Raises:
        InputError: there is no such file, a folder has no image, or none can be decoded.
    """
    if top < 1:
        raise InputError(f"--top: {top} classes; expected at least 1.")
    files = list(find_images(images))
    trained = open_trained(what)
    device = default_device()
    trained.net.to(device)
    found, skipped = [], []
    for start in range(0, len(files), BATCH):
        found += _classes(trained, files[start : start + BATCH], top, device, skipped)
    if not found:
        more = f" (none of {len(skipped)} files can)" if len(skipped) > 1 else ""
        raise InputError(f"{skipped[0]}{more}")
    return {"model": str(trained.path), "predictions": found, "skipped": skipped}


def find_images(images: Iterable[Path]) -> Iterator[Path]:
    """The files, and for each folder all image files below it, links followed, sorted by path."""
    for path in images:
        if path.is_dir():
            tree = read_tree(path, None)
            inside = sorted(
                path / place / os.fsdecode(name)
                for place, folder in tree.below("")
                for name in folder.names.split(b"\0")[:-1]
            )
            if not inside:
                raise InputError(f"{path}: no image in this folder; expected {', '.join(sorted(suffixes()))}.")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise InputError(f"{path}: no such image file or folder.")


@torch.no_grad()
def _classes(
    trained: Trained, files: Sequence[Path], top: int, device: torch.device, skipped: list[str]
) -> Iterator[dict]:
    """The predictions of one batch; adds what cannot be decoded to `skipped`."""
    decoded, kept = [], []
    for file in files:
        try:
            decoded.append(decode_file(file, trained.data))
            kept.append(file)
        except Corrupt as problem:
            skipped.append(str(problem).removeprefix("data: "))
    if not kept:
        return
    pixels = torch.from_numpy(np.stack(decoded))
    with trained.autocast(device):
        logits = trained.net(normalize(pixels.to(device), trained.mean, trained.std))
    ranked = logits.float().softmax(1).cpu().topk(min(top, len(trained.classes)), dim=1)
    for file, probabilities, labels in zip(kept, ranked.values.tolist(), ranked.indices.tolist(), strict=True):
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


def skipped_text(result: dict) -> str:
    """What could not be decoded, in one line; empty where everything could."""
    skipped = result["skipped"]
    return (
        f"{len(skipped)} of {len(skipped) + len(result['predictions'])} images skipped: {skipped[0]}" if skipped else ""
    )
