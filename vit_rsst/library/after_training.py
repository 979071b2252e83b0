"""`vit-rsst prune`: what `vit_rsst.prune` removes from a trained model, with scores before and after, as tickets.

`prepare` opens and checks everything; no image is decoded, and nothing written, before `run`.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vit_rsst import files
from vit_rsst.analysis.counts import count
from vit_rsst.analysis.subject import Subject
from vit_rsst.assembly.calibration import CALIBRATION_BATCH
from vit_rsst.assembly.data import evaluation_batch
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import Batch, evaluation_batches, placed
from vit_rsst.data.sources import open_data
from vit_rsst.data.tables import Split
from vit_rsst.errors import Damaged, InputError, MissingRequirement
from vit_rsst.evaluation.evaluate import labelled, open_model, outcomes_of
from vit_rsst.export import deployed
from vit_rsst.export.exporting import check_vacant, export
from vit_rsst.library.files import described
from vit_rsst.library.removals import Removals, removal_section
from vit_rsst.pruning.criteria import CRITERIA, OF_IMAGES
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.oneshot import OneShot
from vit_rsst.pruning.patterns import pattern
from vit_rsst.recipe.calls import in_words_of
from vit_rsst.recipe.schema import Pruning
from vit_rsst.report import canvas, fronts
from vit_rsst.seeds import derived_seed
from vit_rsst.text import duration
from vit_rsst.tickets import ticket_file
from vit_rsst.tickets.trained import Trained

CALIBRATION_IMAGES = 512
OPTIONS = {
    "pruning.schedule": "--sparsity",
    "pruning.schedule.budget": "--flops and --parameters",
    "pruning.schedule.budget.flops": "--flops",
    "pruning.schedule.budget.params": "--parameters",
    "pruning.granularity": "--granularity",
    "pruning.criterion": "--criterion",
    "pruning.scope": "--scope",
    "pruning.min_neurons": "--min-neurons",
    "pruning.max_layer_sparsity": "--max-layer-sparsity",
    "pruning.compensate": "--compensate",
    "pruning.calibration_images": "--calibration-images",
    "pruning.include": "--include",
    "pruning.protect": "--protect",
}
"""Recipe field → option of the command line."""
TICKET, FIGURE, RESULT = "ticket.safetensors", "front.svg", "result.json"


@dataclass(frozen=True)
class Goal:
    """How much is to leave.

    Attributes:
        of: `sparsity`, `flops` or `parameters`; of the last two, `value` is the share left. Empty: N:M says it.
    """

    of: str = ""
    value: Any = None

    @property
    def words(self) -> dict[str, Any]:
        """As keywords of `prune`."""
        if self.of == "sparsity":
            return {"final_sparsity": self.value}
        return {"budget": {"params" if self.of == "parameters" else self.of: self.value}} if self.of else {}

    @property
    def name(self) -> str:
        """Of a point of a sweep, and of its folder."""
        return f"{self.of}_{self.value:g}"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        what: ticket, run folder, exported folder of weights, or timm model with published weights.
        folder: of the results; new or empty.
        goals: several for a sweep, from the mildest on.
        words: keywords of `prune` beside the goal; those that are None have their defaults.
        calibration_images: None: as many as are the default, if any are needed.
        split: that scores the model before and after; None: it is not scored.
        source, data: of the images, if the model does not name them, or they have moved.
        by_position: match classes by position instead of by name.
        is_sweep: whether each goal gets a folder, and all of them a figure.
    """

    what: str
    folder: Path
    goals: Sequence[Goal]
    words: Mapping[str, Any]
    calibration_images: int | None = None
    split: str | None = "test"
    source: str | None = None
    data: str | None = None
    by_position: bool = False
    is_sweep: bool = False


@dataclass(frozen=True)
class Prepared:
    """A removal that has been checked as far as it can be without looking at an image.

    Attributes:
        section: of the first goal.
        header: of the tickets, but for their density.
        calibration, scored: the data with the labels of train and of the split that scores as the model has them; None
            where no such images are needed.
    """

    asked: Asked
    trained: Trained
    removals: Removals
    section: Pruning
    header: dict[str, str]
    calibration: ImageData | None
    scored: ImageData | None
    device: torch.device

    @property
    def has_units(self) -> bool:
        return bool(self.removals.target.groups)

    @property
    def num_calibration(self) -> int:
        """Calibration images asked for; 0: none are needed."""
        return (self.asked.calibration_images or CALIBRATION_IMAGES) if self.calibration else 0

    def flops(self, state: dict) -> int:
        """Of the slim model where units leave, else without those of zeros."""
        return state["flops"]["slim" if self.has_units else "effective"]

    def parameters(self, state: dict) -> int:
        """Likewise."""
        return state["parameters"]["slim" if self.has_units else "alive"]

    @cached_property
    def images(self) -> Split:
        """The calibration images, balanced over classes, decoded.

        Raises:
            InputError: none can be decoded.
        """
        seed = derived_seed(self.trained.seed, "calibration")
        found = self.calibration.balanced("train", self.num_calibration, seed)
        if not len(found):
            raise InputError("--data: there are no training images to calibrate on; name a folder that has some.")
        return placed(found, self.device)

    def batches(self) -> Iterator[Batch]:
        """The calibration images and labels as the model takes them."""
        return evaluation_batches(
            self.images, CALIBRATION_BATCH, rank=0, num_processes=1, device=self.device,
            mean=self.trained.mean, std=self.trained.std,
        )  # fmt: skip


def prepare(asked: Asked, device: torch.device) -> Prepared:
    """Opens the model and its data, and checks whether what is asked for can be done.

    Raises:
        InputError: see `vit_rsst.prune`; a folder that is not empty; a model that is slim, or has no weights to prune;
            data without training images, or of other classes.
        Damaged: the model cannot be read, or the data has classes that it does not know.
    """
    check_vacant(asked.folder)
    is_fixed = pattern(asked.words.get("granularity") or "element") is not None
    for goal in asked.goals if is_fixed else ():
        if goal.of:
            option = "sweep" if asked.is_sweep else goal.of
            raise InputError(f"--{option}: {asked.words['granularity']} says how much is removed; omit it.")
    sections = [removal_section("", {**asked.words, **goal.words}, OPTIONS) for goal in asked.goals]
    if deployed.path_of(Path(asked.what)) is not None:
        raise InputError(f"{asked.what}: a program for deployment; prune the ticket that it was exported from.")
    trained = open_model(asked.what, asked.source, asked.data)
    if "widths" in trained.header:
        raise InputError(
            f"{trained.path}: is slim already; prune the ticket that it was cut from, which has its zeros."
        )
    trained.net.to(device)
    section = sections[0]
    needs_images = CRITERIA[section.criterion].needs in OF_IMAGES or section.compensate is not None
    if asked.calibration_images is not None and not needs_images:
        raise InputError(f"--calibration-images: has no effect with {section.criterion} and no compensation; omit it.")
    with in_words_of("", OPTIONS | {"model": asked.what}):
        removals = Removals.of(trained.net, sections, tuple if needs_images else None, trained.mask)
    calibration, scored, classes = None, None, trained.classes
    if needs_images or asked.split:
        data = open_data(trained.data, trained.seed)
        if needs_images:
            calibration, classes = labelled(trained, data, "train", asked.by_position)
        if asked.split:
            scored, classes = labelled(trained, data, asked.split, asked.by_position)
    header = _header(trained, section, classes)
    return Prepared(asked, trained, removals, section, header, calibration, scored, device)


def _header(trained: Trained, section: Pruning, classes: Sequence[str]) -> dict[str, str]:
    """Of the tickets: that of the model, or what rebuilds it and prepares its images.

    Raises:
        InputError: it is not known how to rebuild it.
    """
    header, options = dict(trained.header), trained.data
    if "data" in header:
        data = json.loads(header["data"]) | {"source": options.source, "path": options.path}
    else:
        header |= described(trained.net) | {"precision": "no"}
        shown = {"image_size": options.size, "crop_pct": options.crop_share, "interpolation": options.resampling}
        data = asdict(options) | shown | {"mean": trained.mean, "std": trained.std, "classes": list(classes)}
    if "architecture" not in header:
        raise InputError(
            f"{trained.path}: neither timm nor transformers rebuilds it from what it says of itself, so a ticket of it "
            "could not be read; use vit_rsst.prune and vit_rsst.save in Python."
        )
    words = {name: getattr(section, name) for name in ("granularity", "criterion", "scope", "compensate")}
    return header | {"data": json.dumps(data), "method": "prune", "pruned": json.dumps(words)}


def run(prepared: Prepared) -> dict:
    """Removes, scores and writes; the folder appears whole, or not at all. That of a sweep grows point by point.

    Returns:
        What the files hold and what the table shows, as plain data.

    Raises:
        InputError: the inputs of a layer are not finite, or cannot be recorded.
        Damaged: the logits of the model are not finite.
        MissingRequirement: the folder cannot be written.
    """
    try:
        with _place(prepared.asked) as place:
            return _worked(prepared, place)
    except OSError as error:
        raise MissingRequirement(
            f"{prepared.asked.folder}: cannot be written ({error}); free some space, or choose another folder."
        ) from error


@contextmanager
def _place(asked: Asked) -> Iterator[Path]:
    """Where to write."""
    if not asked.is_sweep:
        with files.whole_folder(asked.folder) as temporary:
            yield temporary
        return
    asked.folder.mkdir(parents=True, exist_ok=True)
    try:
        yield asked.folder
    finally:
        with suppress(OSError):
            asked.folder.rmdir()  # empty: not a point was finished


def _worked(prepared: Prepared, place: Path) -> dict:
    asked, start = prepared.asked, time.perf_counter()
    result, batches = _before(prepared), prepared.batches if prepared.calibration else None
    for goal, found in zip(asked.goals, prepared.removals.each_(batches), strict=True):
        inside = goal.name if asked.is_sweep else ""
        with files.whole_folder(place / inside) if inside else nullcontext(place) as folder:
            point = _written(prepared, goal, found, folder)
        for name in ("ticket", "slim"):
            if name in point:
                point[name] = str(asked.folder / inside / point[name])
        result["points"].append(point)
        result["seconds"] |= {"calibration": found.seconds["calibration"], "total": time.perf_counter() - start}
        files.write_json(place / RESULT, result)
        scored = f"  top1 {point['top1']:.2f}" if asked.split else ""
        _tell(f"{inside or 'pruned'}  density {point['density']:.4f}{scored}  {duration(found.seconds['removal'])}")
    if asked.is_sweep and asked.split:
        _draw(prepared, result, place / FIGURE)
    result["seconds"]["total"] = time.perf_counter() - start
    files.write_json(place / RESULT, result)
    return result


def _before(prepared: Prepared) -> dict:
    """The result without its points."""
    asked, section, start = prepared.asked, prepared.section, time.perf_counter()
    if prepared.calibration:
        _tell(f"calibration on {len(prepared.images):,} training images")
    decoded = time.perf_counter() - start
    dense = _state(prepared, _with_others(prepared, prepared.removals.alive))
    if not np.isfinite(dense.get("loss", 0.0)):
        raise Damaged(f"{prepared.trained.path}: its logits are not finite (the weights diverged); use another model.")
    return {
        "model": asked.what,
        "asked": [goal.words for goal in asked.goals],
        "pruned": {name: getattr(section, name) for name in ("granularity", "criterion", "scope", "compensate")},
        "calibration_images": len(prepared.images) if prepared.calibration else 0,
        "split": asked.split,
        "device": str(prepared.device),
        "dense": dense,
        "points": [],
        "seconds": {"images": decoded, "calibration": 0.0},
    }


def _written(prepared: Prepared, goal: Goal, found: OneShot, folder: Path) -> dict:
    """One point: its ticket with the scores beside it, and where units are gone the slim model."""
    mask = _with_others(prepared, found.mask)
    header = prepared.header | {"density": repr(mask.density)}
    size = ticket_file.save(folder / TICKET, prepared.trained.net.state_dict(), mask, header)
    point = {
        **goal.words,
        "density_asked": found.density_asked,
        **_state(prepared, mask),
        "units": found.units,
        "compensation": str(found.compensation) if found.compensation else None,
        "fits": {name: asdict(fit) for name, fit in found.compensation.fits.items()} if found.compensation else {},
        "seconds": found.seconds["removal"],
        "ticket": TICKET,
        "ticket_bytes": size,
    }
    if prepared.asked.split == "test":  # as beside the ticket of a round, for model cards
        row = {"ticket_bytes": size, "test_top1": point["top1"], "test_loss": point["loss"]}
        files.write_json((folder / TICKET).with_suffix(".json"), {"row": row})
    if prepared.has_units:
        export(folder / TICKET, "slim", folder / "slim")
        point["slim"] = "slim"
    return point


def _with_others(prepared: Prepared, mask: MaskSet) -> MaskSet:
    """A mask of what is pruned, with the zeros that other weights have already; on the CPU."""
    others = {n: m for n, m in prepared.trained.mask.masks.items() if n not in mask.masks and not m.all()}
    return MaskSet({name: alive.cpu() for name, alive in {**mask.masks, **others}.items()})


def _state(prepared: Prepared, mask: MaskSet) -> dict:
    """Counts of the network as it is now, and its scores if it is scored."""
    trained, split = prepared.trained, prepared.asked.split
    net = trained.net.cpu()
    counted = count(Subject(prepared.asked.what, "ticket", prepared.header, net, mask, trained.data.size))
    trained.net.to(prepared.device)
    parameters, flops = counted["parameters"], counted["flops"]
    state = {
        "density": mask.density,
        "parameters": {
            "total": parameters["total"],
            "alive": parameters["total"] - mask.num_elements + mask.num_alive,
            "slim": parameters["slim"],
        },
        "flops": flops,
    }
    if split:
        found, _ = outcomes_of(trained, prepared.scored, split, evaluation_batch(prepared.device), prepared.device)
        state |= {"samples": len(found), "top1": found.top(1), "top5": found.top(5), "loss": found.loss}
    return state


def _draw(prepared: Prepared, result: dict, path: Path) -> None:
    """Top-1 against FLOPs; without matplotlib a sentence says why there is no figure."""
    states = [result["dense"], *result["points"]]
    points = [fronts.Point(prepared.flops(one) / 1e6, one["top1"], int(i > 0)) for i, one in enumerate(states)]
    labels = ["dense", *(f"{goal.value:g}" for goal in prepared.asked.goals)]
    try:
        with canvas.drawing():
            what = "slim" if prepared.has_units else "without those of zeros"
            canvas.save(fronts.tradeoff(points, labels, f"MFLOPs, {what}"), path)
    except MissingRequirement as error:
        _tell(f"no {path.name}: {error}")
    else:
        result["figure"] = str(prepared.asked.folder / path.name)


def _tell(text: str) -> None:
    """Says how far it is; the result alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)
