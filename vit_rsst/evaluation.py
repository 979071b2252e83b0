"""Scores of a ticket, in a model built from the ticket's own header, on data found as the run found it."""

import json
from pathlib import Path

import torch

from vit_rsst import tickets
from vit_rsst.assembly import EVALUATION_BATCH
from vit_rsst.data.loaders import evaluation_batches
from vit_rsst.data.sources import DataOptions, open_data
from vit_rsst.errors import Damaged
from vit_rsst.export.source import open_ticket
from vit_rsst.metrics.counters import score
from vit_rsst.models import zoo
from vit_rsst.results import aligned


def evaluate_ticket(what: Path, split: str, data_path: str | None = None) -> dict:
    """top1, top5, loss, and precision, recall, F1 and the confusion matrix by class.

    Args:
        what: a ticket, a run folder, whose last ticket is meant, or a slim folder.
        split: `test`, `val` or `train`, as the run divided them.
        data_path: folder of the data when it has moved.

    Raises:
        Damaged: the ticket cannot be read, or does not fit the data's classes.
    """
    path, ticket = open_ticket(what)

    def entry(name: str) -> str:
        if name not in ticket.metadata:
            raise Damaged(f"{path}: the header has no {name!r}; the ticket does not come from a run of this version.")
        return ticket.metadata[name]

    info = json.loads(entry("data"))
    mean, std, classes = tuple(info.pop("mean")), tuple(info.pop("std")), info.pop("classes")
    options = DataOptions(**(info | ({"path": data_path} if data_path else {})))
    data = open_data(options, int(entry("seed")))
    if list(data.classes) != classes:
        raise Damaged(
            f"{path}: trained on {len(classes)} classes, {classes[:3]} …, and the data have {data.classes[:3]} …."
        )
    net = zoo.described(ticket.metadata, str(path))
    tickets.load_into_(net, ticket, str(path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device).eval()
    samples = getattr(data, split)

    def batches() -> object:
        return evaluation_batches(samples, EVALUATION_BATCH, 0, 1, device, mean, std)

    # As the run scored it: Accelerate wraps the forward pass in autocast.
    with torch.autocast(device.type, torch.bfloat16, enabled=ticket.metadata.get("precision") == "bf16"):
        scores = score(net, batches(), device) | _by_class(net, batches(), classes)
    result = {"ticket": str(path), "split": split, "samples": len(samples), "density": ticket.mask.density}
    return result | scores


@torch.no_grad()
def _by_class(net: torch.nn.Module, batches: object, classes: list[str]) -> dict:
    from vit_rsst.metrics.reported import ClassificationReport

    report = ClassificationReport(keep_in_memory=True)
    for images, labels in batches:
        report.add_batch(predictions=net(images).argmax(1).cpu(), references=labels.cpu())
    return report.compute(num_classes=len(classes)) | {"classes": classes}


def report_text(result: dict, most_classes: int = 20) -> str:
    """The result as text: a line of totals, the table of classes, the most frequent confusions."""
    order = range(len(result["classes"]))
    if len(result["classes"]) > most_classes:
        order = sorted(order, key=lambda i: result["f1"][i])[:most_classes]
    lines = [("class", "precision", "recall", "F1", "images")] + [
        (
            result["classes"][i],
            *(f"{100 * result[key][i]:.2f}" for key in ("precision", "recall", "f1")),
            str(result["support"][i]),
        )
        for i in order
    ]
    head = (
        f"{result['ticket']} on {result['split']} ({result['samples']:,} images), density {result['density']:.4f}\n"
        f"top1 {result['top1']:.2f}  top5 {result['top5']:.2f}  loss {result['loss']:.4f}  "
        f"macro F1 {100 * result['macro_f1']:.2f}\n"
    )
    note = (
        f"\nthe {most_classes} classes of the lowest F1; --json FILE has all" if len(order) < len(result["f1"]) else ""
    )
    return f"{head}\n{aligned(lines)}{note}\n\n{_confusions(result)}"


def _confusions(result: dict, most: int = 5) -> str:
    pairs = [
        (count, result["classes"][true], result["classes"][predicted])
        for true, row in enumerate(result["confusion"])
        for predicted, count in enumerate(row)
        if true != predicted and count
    ]
    if not pairs:
        return "no confusions"
    return "most confused: " + ", ".join(f"{a} taken for {b} ({n})" for n, a, b in sorted(pairs, reverse=True)[:most])
