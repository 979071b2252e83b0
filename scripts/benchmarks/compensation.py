"""One-shot removal with and without compensation: test top-1 by criterion, and imp's what-if gaps.

Dense models of several seeds are trained on part of CIFAR-10 (the recipe cifar10/cpu_dense). From each, elements,
2:4 patterns, half of the neurons of all MLPs or a third of the heads are removed at once by each criterion, without
further training; with compensation, what stays is fitted by least squares on the same 512 training images that the
criteria see. Top-1 is over all 10,000 test images. `activation_l2` is Wanda's rule for elements; `taylor` scores units
only, and for elements `saliency` takes its place. Then imp of the study
sparse_from_start_cifar10_cpu runs with and without compensation.

    python scripts/benchmarks/compensation.py --data FOLDER [--models FOLDER]      (without --data: from the Hub)
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from _common import environment, report, show_progress

import vit_rsst
from vit_rsst.assembly.calibration import CALIBRATION_BATCH
from vit_rsst.assembly.data import evaluation_batch
from vit_rsst.data.loaders import evaluation_batches
from vit_rsst.data.sources import open_data
from vit_rsst.recipe.loading import builtin_folder
from vit_rsst.tickets.trained import open_trained
from vit_rsst.training.counters import score

REGAINED = 0.5
"""Least share of magnitude's loss of top-1 that compensation takes away, at element sparsity 0.7 and at 2:4."""
GAP = 0.5
"""Most of imp's mean what-if gap that compensation leaves."""
LEAST_NOISE = 0.3
"""Points of top-1: obs with compensation is nowhere behind another criterion with it by more than this, or, if that is
more, by twice the standard error of their paired differences over seeds. On 10,000 images a top-1 has one of 0.5."""

SEEDS, QUICK_SEEDS = 3, 1
IMAGES = 512
REMOVALS: dict[str, dict] = {
    "elements, 0.5": {"sparsity": 0.5},
    "elements, 0.7": {"sparsity": 0.7},
    "elements, 0.8": {"sparsity": 0.8},
    "2:4": {"granularity": "2:4"},
    "half of the neurons": {"sparsity": 0.5, "granularity": "neuron"},
    "a third of the heads": {"sparsity": 1 / 3, "granularity": "head"},
}
BOUNDED = ("elements, 0.7", "2:4")
CRITERIA = ("magnitude", "activation_l2", "taylor", "obs")
WAYS = ("none", "least_squares")
IMP = ("pruning.method=imp", "data.train_samples=4000", "train.epochs=12", "train.round_epochs=4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs, few removals: checks no bounds")
    parser.add_argument("--data", metavar="FOLDER", help="CIFAR-10 as parquet; default: from the Hub")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="keep the runs, and use those that are here")
    args = parser.parse_args()
    found, gaps = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.models or Path(temporary)
        for seed in range(QUICK_SEEDS if args.quick else SEEDS):
            ticket = trained(f"seed-{seed}", "cpu_dense", seed, args, folder, ["train.round_epochs=1"])
            removals = BOUNDED if args.quick else tuple(REMOVALS)
            found += list(measure(ticket / "tickets" / "round_00.safetensors", removals, seed, args.data))
            for way in WAYS:
                more = [*IMP, f"pruning.compensate={way}", f"pruning.calibration_images={IMAGES}"]
                run = trained(f"imp-{way}-{seed}", "study", seed, args, folder, more)
                gaps += list(gaps_of(run, way, seed))
    missed = [] if args.quick else list(misses(found, gaps))
    result = {"environment": environment(torch.device("cpu")), "removals": found, "gaps": gaps}
    return report(args, result | {"missed": missed}, ("removed", "by", "masked", "fitted"), list(rows(found, gaps)))


def trained(name: str, recipe: str, seed: int, args: argparse.Namespace, folder: Path, more: list[str]) -> Path:
    """Trains a run, unless it is there; returns its folder."""
    show_progress(f"training {name}")
    argv = [sys.executable, "-m", "vit_rsst.cli", "train", str(builtin_folder() / "cifar10" / f"{recipe}.yaml")]
    argv += [
        f"seed={seed}",
        f"name={name}",
        f"output_dir={folder}",
        *more,
        *([f"data.path={args.data}"] if args.data else []),
    ]
    argv += ["train.epochs=2", "optim.warmup_epochs=0", "train.steps_per_epoch=20"] if args.quick else []
    argv += ["train.round_epochs=1"] if args.quick and recipe == "study" else []
    if code := subprocess.run(argv, stdout=subprocess.DEVNULL).returncode:
        sys.exit(code)
    return folder / name


def measure(path: Path, removals: Sequence[str], seed: int, data_path: str | None) -> Iterator[dict]:
    """Top-1 and loss of one model: whole, and after each removal."""
    model = open_trained(path)
    net, data = model.net, open_data(replace(model.data, path=data_path), seed)
    cpu = torch.device("cpu")
    shown = {"rank": 0, "num_processes": 1, "device": cpu, "mean": model.mean, "std": model.std}
    loader = list(evaluation_batches(data.balanced("train", IMAGES, seed), CALIBRATION_BATCH, **shown))
    dense = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def scored() -> dict[str, float]:
        return score(net, evaluation_batches(data.test, evaluation_batch(cpu), **shown), cpu)

    yield {"seed": seed, "removed": "nothing", "criterion": "", "compensate": "none", **scored()}
    for removed, criterion, way in product(removals, CRITERIA, WAYS):
        show_progress(f"seed {seed}: {removed} by {criterion}, {way}")
        words = REMOVALS[removed]
        is_of_units = words.get("granularity") in ("neuron", "head")
        name = "saliency" if criterion == "taylor" and not is_of_units else criterion
        images = None if (name, way) == ("magnitude", "none") else loader
        net.load_state_dict(dense)
        vit_rsst.prune(net, criterion=name, compensate=way, calibration=images, min_neurons=1, **words)
        yield {"seed": seed, "removed": removed, "criterion": criterion, "compensate": way, **scored()}


def gaps_of(run: Path, way: str, seed: int) -> Iterator[dict]:
    """What-if gap of every removal of a run, in points of validation top-1."""
    with (run / "rounds.csv").open() as file:
        for row in csv.DictReader(file):
            if row["what_if_gap"]:
                gap = float(row["what_if_gap"])
                yield {"seed": seed, "compensate": way, "round": int(row["round"]), "gap": gap}


def top1(found: list[dict], removed: str, criterion: str = "", way: str = "none") -> list[float]:
    """By seed."""
    key = (removed, criterion, way)
    return [row["top1"] for row in found if (row["removed"], row["criterion"], row["compensate"]) == key]


def misses(found: list[dict], gaps: list[dict]) -> Iterator[str]:
    whole = statistics.fmean(top1(found, "nothing"))
    for removed in BOUNDED:
        masked, fitted = (statistics.fmean(top1(found, removed, "magnitude", way)) for way in WAYS)
        if fitted - masked < REGAINED * (whole - masked):
            yield f"{removed} by magnitude: {masked:.2f}, fitted {fitted:.2f}, of {whole:.2f}"
    for removed in REMOVALS:
        ours = top1(found, removed, "obs", "least_squares")
        for criterion in CRITERIA:
            differences = [b - a for a, b in zip(ours, top1(found, removed, criterion, "least_squares"), strict=True)]
            noise = 2 * statistics.stdev(differences) / len(differences) ** 0.5
            if (behind := statistics.fmean(differences)) > max(noise, LEAST_NOISE):
                yield f"{removed}: obs is {behind:.2f} points behind {criterion}, with a noise of {noise:.2f}"
    before, after = (statistics.fmean(row["gap"] for row in gaps if row["compensate"] == way) for way in WAYS)
    if after > GAP * before:
        yield f"imp's what-if gap: {before:.2f} points, fitted {after:.2f}"


def rows(found: list[dict], gaps: list[dict]) -> Iterator[tuple[str, ...]]:
    """Mean top-1 over seeds, with the spread where there are several."""

    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread}"

    yield "nothing", "", cell(top1(found, "nothing")), ""
    removals = [removed for removed in REMOVALS if top1(found, removed, "obs")]
    for removed, criterion in product(removals, CRITERIA):
        yield removed, criterion, *(cell(top1(found, removed, criterion, way)) for way in WAYS)
    for number in dict.fromkeys(row["round"] for row in gaps):
        by_way = ([r["gap"] for r in gaps if (r["round"], r["compensate"]) == (number, way)] for way in WAYS)
        yield f"imp's what-if gap, round {number}", "magnitude", *(cell(values) for values in by_way)


if __name__ == "__main__":
    sys.exit(main())
