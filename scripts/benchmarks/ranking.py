"""Whether criteria rank units better than chance: mean test loss after removing the lowest-ranked, or random, units.

Dense models of several seeds are trained on part of CIFAR-10 (the recipe cifar10/cpu_dense). From each, half of the
neurons of every MLP, or one head of the three in every block, is removed at once, without further training: the units
with the lowest scores by each criterion, and as many at random. Loss and top-1 are over all 10,000 test images.

    python scripts/benchmarks/ranking.py --data FOLDER      (without --data: from the Hub)
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from _common import environment, report
from torch import nn

from vit_rsst import cli
from vit_rsst.assembly.calibration import CALIBRATION_BATCH
from vit_rsst.assembly.data import evaluation_batch
from vit_rsst.data.loaders import evaluation_batches
from vit_rsst.data.sources import open_data
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.pruning.allocation import Allocation
from vit_rsst.pruning.calibration import collect
from vit_rsst.pruning.criteria import CRITERIA, Evidence
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.selector import Floors, Selector
from vit_rsst.recipe.loading import builtin_folder
from vit_rsst.tickets.trained import open_trained
from vit_rsst.training.counters import score

RANDOM_BOUND = 1.0
"""Maximum mean test loss of a criterion over all seeds, relative to that of random removals."""

SEEDS, QUICK_SEEDS = 3, 1
RANDOM_DRAWS = 5
CRITERIA_TRIED = ("magnitude", "activation_l1", "activation_l2", "saliency", "taylor")
REMOVALS = {"neuron": 1 / 2, "head": 2 / 3}
"""Kind of unit → fraction kept in every block."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs: a smoke test, checks no bounds")
    parser.add_argument("--data", metavar="FOLDER", help="CIFAR-10 as parquet; default: from the Hub")
    args = parser.parse_args()
    found: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(QUICK_SEEDS if args.quick else SEEDS):
            found += measure(trained(seed, args, Path(folder)), seed, args.data)
    summary = {
        (kind, name): statistics.fmean(row["loss"] for row in found if (row["kind"], row["criterion"]) == (kind, name))
        for kind, name in dict.fromkeys((row["kind"], row["criterion"]) for row in found)
    }
    missed = [
        f"{kind}s by {name}: mean loss {summary[kind, name]:.3f}, at random {summary[kind, 'random']:.3f}"
        for kind, name in summary
        if not args.quick and name in CRITERIA_TRIED and summary[kind, name] >= RANDOM_BOUND * summary[kind, "random"]
    ]
    result = {"environment": environment(torch.device("cpu")), "removals": found, "missed": missed}
    return report(args, result, ("removed", "mean loss", "losses by seed", "mean top-1"), list(rows(found, summary)))


def trained(seed: int, args: argparse.Namespace, folder: Path) -> Path:
    """Trains a dense model with this seed; returns its ticket."""
    argv = ["train", str(builtin_folder() / "cifar10" / "cpu_dense.yaml"), f"seed={seed}", f"name=seed-{seed}"]
    argv += [f"output_dir={folder}", "train.round_epochs=1", *([f"data.path={args.data}"] if args.data else [])]
    argv += ["train.epochs=2", "optim.warmup_epochs=0", "train.steps_per_epoch=20"] if args.quick else []
    if code := cli.main(argv):
        sys.exit(code)
    return folder / f"seed-{seed}" / "tickets" / "round_00.safetensors"


def measure(path: Path, seed: int, data_path: str | None) -> list[dict]:
    """Loss and top-1 of one model: unpruned, and after each removal."""
    model = open_trained(path)
    net, mean, std = model.net, model.mean, model.std
    data = open_data(replace(model.data, path=data_path), seed)
    cpu = torch.device("cpu")
    shown = {"rank": 0, "num_processes": 1, "device": cpu, "mean": mean, "std": std}

    def scored() -> dict[str, float]:
        return score(net, evaluation_batches(data.test, evaluation_batch(cpu), **shown), cpu)

    whole = scored()
    found = [{"seed": seed, "kind": "", "criterion": "nothing", **whole}]
    split = data.balanced("train", 2048, seed)
    for kind, density in REMOVALS.items():
        weights, groups = prunable_parts(net, kind)
        batches = evaluation_batches(split, CALIBRATION_BATCH, **shown)
        evidence_of_images = collect(net, batches, weights, groups, "gradients")
        selector = Selector(CRITERIA["random"], kind, groups, Allocation("layer"), Floors(min_neurons=1))
        for name, draw in [*((name, 0) for name in CRITERIA_TRIED), *(("random", i) for i in range(RANDOM_DRAWS))]:
            evidence = Evidence(weights, MaskSet.full(weights), seed * 100 + draw, evidence_of_images)
            mask = replace(selector, criterion=CRITERIA[name]).units(evidence, density)
            with removed(weights, mask):
                found.append({"seed": seed, "kind": kind, "criterion": name, **scored()})
    return found


@contextmanager
def removed(weights: dict[str, nn.Parameter], mask: MaskSet) -> Iterator[None]:
    """Masks the weights inside the context."""
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(mask[name])
        yield
        for name, weight in weights.items():
            weight.copy_(before[name])


def rows(found: list[dict], summary: dict[tuple[str, str], float]) -> Iterator[tuple[str, ...]]:
    """A row for each kind of unit and criterion; random is the mean over its draws."""
    for (kind, name), loss in summary.items():
        part = [row for row in found if (row["kind"], row["criterion"]) == (kind, name)]
        seeds = dict.fromkeys(row["seed"] for row in part)
        by_seed = [statistics.fmean(row["loss"] for row in part if row["seed"] == seed) for seed in seeds]
        what = {"neuron": "half of the neurons by ", "head": "one head of three by "}.get(kind, "") + name
        losses = "  ".join(f"{value:.3f}" for value in by_seed)
        yield what, f"{loss:.3f}", losses, f"{statistics.fmean(row['top1'] for row in part):.2f}"


if __name__ == "__main__":
    sys.exit(main())
