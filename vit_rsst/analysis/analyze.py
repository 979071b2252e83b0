"""Analysis of one or more subjects: counts and, by default, measurements."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from vit_rsst import files, timing
from vit_rsst.analysis import measure
from vit_rsst.analysis.counts import count, count_file
from vit_rsst.analysis.subject import Subject, open_subject
from vit_rsst.errors import InputError
from vit_rsst.export import deployed
from vit_rsst.models.published import Published
from vit_rsst.tickets.trained import default_device

EPOCH_IMAGES = 50_000
"""Size of CIFAR's training split, for the time per epoch."""


def analyze(
    whats: Sequence[str], image_size: int | None = None, batches: Sequence[int] = (1, 8, 64), is_measured: bool = True
) -> dict:
    """Counts and measures every subject.

    Args:
        whats: models, recipes, tickets, run folders, slim folders, or ONNX and `.pt2` files and their folders.
        image_size: side of the images in px; None: the default of each.
        batches: batch sizes at which latency is measured; memory at the largest.
        is_measured: also measure latency, memory and training steps.

    Returns:
        Plain data: `device`, `threads`, `torch`, and `items` with one entry per subject.

    Raises:
        InputError: a subject cannot be analysed; raised before anything is measured.
    """
    if any(batch < 1 for batch in batches) or (image_size is not None and image_size < 1):
        raise InputError("--batch, --image-size: expected whole numbers of at least 1.")
    opened = [opened_file(what, image_size) or open_subject(what, image_size) for what in whats]
    items = [count(one) if isinstance(one, Subject) else count_file(*one) for one in opened]
    device = default_device()
    if is_measured:
        for one, item in zip(opened, items, strict=True):
            print(f"measuring {item['what']} …", file=sys.stderr, flush=True)
            item |= measured(one, batches, device) if isinstance(one, Subject) else measured_file(one[1], batches)
    where = {"device": f"{device.type}: {timing.device_name(device)}", "threads": torch.get_num_threads()}
    return where | {"torch": torch.__version__, "precision": "fp32", "items": items}


def opened_file(what: str, image_size: int | None) -> tuple[Path, Published] | None:
    """An ONNX or `.pt2` file, or an export folder with one; None: something else.

    Raises:
        InputError: its images have another size.
    """
    file = deployed.path_of(Path(what).expanduser())
    if file is None:
        return None
    found = deployed.opened(file)
    if image_size not in (None, found.image_size):
        raise InputError(f"--image-size: {file} takes images of {found.image_size} px only; omit it.")
    return file, found


def measured_file(found: Published, batches: Sequence[int]) -> dict:
    """Latency by batch, in the runtime of the file, on the CPU."""
    networks, cpu = {"file": found.net}, torch.device("cpu")
    times = {str(batch): timing.latency(networks, found.image_size, batch, cpu)["file"] for batch in batches}
    return {"latency": {"file": times}}


def measured(subject: Subject, batches: Sequence[int], device: torch.device) -> dict:
    """Latency by network and batch, and peak memory; of the dense network and, if smaller, the slim one.

    The dense network contains the zeros of its mask, which save neither time nor memory.
    """
    networks = {"dense": subject.net.to(device)}
    headers = {"dense": subject.header}
    if subject.slim.is_narrower:
        networks["slim"], headers["slim"] = subject.slim.net.to(device).eval(), subject.header | subject.slim.header
    times = {batch: timing.latency(networks, subject.image_size, batch, device) for batch in batches}
    probes = {
        name: measure.probe(header, subject.image_size, max(batches), subject.batch if name == "dense" else None)
        for name, header in headers.items()
    }
    step = probes["dense"]["step"]["median"] / probes["dense"]["train_batch"]
    return {
        "latency": {name: {str(batch): times[batch][name] for batch in batches} for name in networks},
        "memory": probes | {"batch": max(batches)},
        "epoch_seconds": EPOCH_IMAGES * step,
    }


def write_csv(path: Path, result: Mapping) -> None:
    """One row per item, one column per number, such as `latency.slim.64.median`; without layers and units."""
    where = {key: value for key, value in result.items() if key != "items"}
    rows = [dict(_flat({k: v for k, v in item.items() if k not in ("layers", "units")})) for item in result["items"]]
    columns = [*dict.fromkeys(name for row in rows for name in row), *where]
    files.write_csv(path, [columns, *([(row | where).get(name) for name in columns] for row in rows)])


def _flat(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
