"""Scores of a ticket, in a model built from the ticket's own header, on data found as the run found it."""

from dataclasses import replace
from pathlib import Path

import torch

from vit_rsst.assembly import EVALUATION_BATCH
from vit_rsst.data.loaders import evaluation_batches
from vit_rsst.data.sources import open_data
from vit_rsst.errors import Damaged
from vit_rsst.metrics.counters import score
from vit_rsst.results import aligned
from vit_rsst.trained import default_device, open_trained


def evaluate_ticket(what: Path, split: str, data_path: str | None = None) -> dict:
    """top1, top5, loss, and precision, recall, F1 and the confusion matrix by class.

    Args:
        what: a ticket, a run folder, whose last ticket is meant, or a slim folder.
        split: `test`, `val` or `train`, as the run divided them.
        data_path: folder of the data when it has moved.

    Raises:
        Damaged: the ticket cannot be read, or does not fit the data's classes.
    """
    trained = open_trained(what)
    options = replace(trained.data, path=data_path) if data_path else trained.data
    data = open_data(options, trained.seed)
    if list(data.classes) != trained.classes:
        raise Damaged(
            f"{trained.path}: trained on {len(trained.classes)} classes, {trained.classes[:3]} …, and the data have "
            f"{data.classes[:3]} …."
        )
    device = default_device()
    net, samples = trained.net.to(device), data.samples(split)

    def batches() -> object:
        return evaluation_batches(
            samples, EVALUATION_BATCH, 0, 1, device, trained.mean, trained.std, data.decoder(split),
            max_corrupt=options.max_corrupt,
        )  # fmt: skip

    with trained.autocast(device):
        report = _by_class(net, batches(), trained.classes)
        scores = score(net, batches(), device) | report
    number = sum(report["support"])
    result = {"ticket": str(trained.path), "split": split, "samples": number, "density": trained.mask.density}
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
