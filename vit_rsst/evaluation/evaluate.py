"""Scores of a trained model on a split: a ticket on its run's dataset, any model on a dataset that is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from vit_rsst import files, machine
from vit_rsst.assembly.data import evaluation_batch
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import evaluation_batches
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import match_classes, open_data, open_scored
from vit_rsst.errors import Damaged, InputError
from vit_rsst.evaluation.outcomes import Outcomes, most_confused, outcomes
from vit_rsst.export import deployed
from vit_rsst.models import published
from vit_rsst.models.anatomy import prunable_weights
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.run.ranks import once_a_node
from vit_rsst.run.tracking import to_stderr
from vit_rsst.text import aligned
from vit_rsst.tickets.trained import Trained, open_trained


def evaluate(
    what: str,
    split: str,
    state: PartialState,
    data_path: str | None = None,
    source: str | None = None,
    batch: int | None = None,
    by_position: bool = False,
) -> dict:
    """All reported scores, the same on any number of ranks; collective.

    Args:
        what: a ticket, a run folder (its last ticket), an exported folder, an ONNX or `.pt2` file, or a timm model with
            published weights.
        split: `test`, `val` or `train`, as the run split them.
        state: processes and device.
        data_path: folder of the dataset, if it has moved, or of images to score alone.
        source: name of the dataset; a ticket knows its own.
        batch: images per forward pass.
        by_position: match classes by position instead of by name.

    Raises:
        InputError: no such model, or no dataset is named.
        Damaged: it cannot be read, does not fit the dataset's classes, or its logits are not finite.
    """
    if batch is not None and batch < 1:
        raise InputError(f"--batch: {batch} images; expected at least 1.")
    trained = open_model(what, source, data_path)
    if split != "test" and "data" not in trained.header and state.is_main_process:
        to_stderr(
            f"{what} does not record how its dataset was split: it may have trained on some of these {split} images."
        )
    with once_a_node(state):
        data, classes = open_for(trained, split, data_path is not None, by_position)
    if data_path is not None and state.is_main_process:
        for line in data.told:
            to_stderr(line)
    place = (state.device, state.process_index, state.num_processes)
    found, rate = outcomes_of(trained, data, split, batch or evaluation_batch(state.device), *place)
    if not np.isfinite(found.confidences).all():
        raise Damaged(f"{trained.path}: its logits are not finite (the weights diverged); use another ticket.")

    from vit_rsst.evaluation.reported import scores

    result = {
        "ticket": str(trained.path),
        "split": split,
        "samples": len(found),
        "density": trained.mask.density if trained.mask.masks else None,
        "images_per_s": rate,
        "processes": state.num_processes,
        "device": str(state.device),
    }
    return result | scores(found, len(classes)) | {"classes": classes}


def open_model(what: str, source: str | None, data_path: str | None) -> Trained:
    """The model and the dataset to score it on.

    A model that is neither a ticket nor a slim or dense folder has a header without `data`, and seed 0.
    """
    file = deployed.path_of(Path(what))
    if file is None and not published.kind(what):
        trained = open_trained(Path(what))
        changed = {key: value for key, value in (("source", source), ("path", data_path)) if value}
        return replace(trained, data=replace(trained.data, **changed))
    if source is None:
        raise InputError(f"{what}: does not record what it was trained on; name the dataset with --source and --data.")
    found = published.open_published(what) if file is None else deployed.opened(file)
    weights = prunable_weights(found.net) if file is None else {}
    mask = MaskSet({name: weight.detach() != 0 for name, weight in weights.items()})
    shown = {name: getattr(found, name) for name in ("image_size", "crop_pct", "crop_mode", "interpolation")}
    options = DataOptions(source, data_path, **shown)
    return Trained(found.net, mask, Path(what), {"seed": "0"}, options, found.mean, found.std, found.classes)


def open_for(trained: Trained, split: str, is_named: bool, by_position: bool) -> tuple[ImageData, list[str]]:
    """The data to score, with labels that are the model's, and the names of the classes by label.

    Args:
        is_named: whether the caller named the folder, which may then hold nothing but images to score.
        by_position: match classes by position instead of by name.

    Raises:
        Damaged: the dataset has a class that the model was not trained on.
        InputError: no such split; the model does not name its classes, or they are matched by position, and their
            number differs.
    """
    if is_named:
        content = json.loads(trained.header.get("data", "{}")).get("content") or {}
        data = open_scored(trained.data, trained.seed, split, content.get("train"))
    else:
        data = open_data(trained.data, trained.seed)
    return labelled(trained, data, split, by_position)


def labelled(trained: Trained, data: ImageData, split: str, by_position: bool) -> tuple[ImageData, list[str]]:
    """The data with the labels of a split as the model has them, and the names of the classes; see `open_for`."""
    if trained.classes and not by_position:
        try:
            data = match_classes(data, split, trained.classes)
        except InputError as error:
            raise Damaged(
                f"{trained.path}: trained on {len(trained.classes)} classes ({', '.join(trained.classes[:3])} …), and "
                f"the dataset has {len(data.classes)} ({', '.join(data.classes[:3])} …); rename its classes, or pass "
                "--classes-by position if both list the same classes in the same order."
            ) from error
    return data, check_classes(trained, data, by_position)


def check_classes(trained: Trained, data: ImageData, by_position: bool = False) -> list[str]:
    """Names by label: the model's, or else those of the data.

    Args:
        by_position: whether the names may differ.

    Raises:
        Damaged: the dataset has other classes than the model was trained on.
        InputError: the model does not name its classes, or they are matched by position, and their number differs.
    """
    theirs = list(data.classes)
    if trained.classes and trained.classes != theirs and not by_position:
        raise Damaged(
            f"{trained.path}: trained on {len(trained.classes)} classes, {trained.classes[:3]} …, and the dataset has "
            f"{len(theirs)}, {theirs[:3]} …; pass --classes-by position if both list the same classes in the same "
            "order."
        )
    with torch.no_grad():
        logits = trained.net(torch.zeros(1, 3, trained.data.size, trained.data.size))
    if logits.shape[1] != len(theirs):
        raise InputError(
            f"{trained.path}: the model predicts {logits.shape[1]} classes, but the dataset has {len(theirs)}; name "
            "the dataset that it was trained on with --source and --data."
        )
    if by_position and trained.classes and trained.classes != theirs:
        to_stderr(
            f"classes are matched by position: {theirs[0]!r} is taken for {trained.classes[0]!r}, {theirs[-1]!r} for "
            f"{trained.classes[-1]!r}; scores mean nothing if the orders differ."
        )
    return trained.classes or theirs


def outcomes_of(
    trained: Trained, data: ImageData, split: str, batch: int, device: torch.device, rank: int = 0, world: int = 1
) -> tuple[Outcomes, float]:
    """Outcomes of all images, and images per second; collective if `world` is more than 1."""
    workers = 0 if device.type == "cpu" else min(8, machine.cores() // machine.local_processes(world))
    batches = evaluation_batches(
        data.samples(split),
        batch,
        rank=rank,
        num_processes=world,
        device=device,
        mean=trained.mean,
        std=trained.std,
        decoder=data.decoder(split),
        workers=workers,
        max_corrupt=trained.data.max_corrupt,
    )
    with trained.autocast(device):
        return outcomes(trained.net.to(device), batches, rank, world)


def report_text(result: dict, most_classes: int = 20) -> str:
    """The result as text: totals, the table of classes, the most frequent confusions."""
    order = range(len(result["classes"]))
    if len(result["classes"]) > most_classes:
        order = sorted(order, key=lambda i: result["f1"][i])[:most_classes]
    names = ("precision", "recall", "f1")
    lines = [("class", "precision", "recall", "F1", "images")]
    lines += [
        (result["classes"][i], *(f"{100 * result[key][i]:.2f}" for key in names), str(result["support"][i]))
        for i in order
    ]
    for mean in ("macro", "weighted"):
        values = (f"{100 * result[f'{mean}_{key}']:.2f}" for key in names)
        lines.append((f"{mean} mean", *values, str(result["samples"])))
    density = "" if result["density"] is None else f", density {result['density']:.4f}"
    head = (
        f"{result['ticket']} on {result['split']} ({result['samples']:,} images){density}\n"
        f"top1 {result['top1']:.2f}  top5 {result['top5']:.2f}  loss {result['loss']:.4f}  "
        f"macro F1 {100 * result['macro_f1']:.2f}  calibration error {100 * result['ece']:.2f}\n"
        f"{result['images_per_s']:,.0f} images/s, {result['device']}, {result['processes']} process(es)\n"
    )
    is_short = len(order) < len(result["f1"])
    note = f"\nthe {most_classes} classes with the lowest F1; --json FILE has all" if is_short else ""
    return f"{head}\n{aligned(lines, num_left=1)}{note}\n\n{_confusions_text(result)}"


def _confusions_text(result: dict) -> str:
    names, found = result["classes"], most_confused(result["confusion"])
    if not found:
        return "no confusions"
    return "most confused: " + ", ".join(f"{names[a]} predicted as {names[b]} ({n})" for n, a, b in found)


def write_csv(path: Path, result: dict) -> None:
    """One row per class: its scores, its images and how many were predicted as each class; then the means."""
    names = ("precision", "recall", "f1")
    rows = [["class", *names, "images", *(f"taken for {name}" for name in result["classes"])]]
    for i, name in enumerate(result["classes"]):
        rows.append([name, *(result[key][i] for key in names), result["support"][i], *result["confusion"][i]])
    for mean in ("macro", "weighted"):
        taken = (sum(column) for column in zip(*result["confusion"], strict=True))
        rows.append([f"{mean} mean", *(result[f"{mean}_{key}"] for key in names), result["samples"], *taken])
    files.write_csv(path, rows)
