"""What int8 costs in accuracy and gains in speed under onnxruntime, for dense and slim models.

Accuracy: a small ViT is trained on part of CIFAR-10 and loses 60 % of its heads and neurons; the dense and the slim
model are exported with `--int8`, as a user would, and scored on all 10,000 test images beside their tickets in float32.

Speed: a ViT-S at 224 px with random weights, dense and without half of its heads and neurons, in float32 and in int8
(calibrated on CIFAR-10 images), all in onnxruntime on two threads. They alternate in one process, in random order; a
ratio compares two runs of one alternation, dense fp32 over contender, and its median and 95 % interval are printed. The
bound is missed if the whole interval is below it at both batch sizes.

    python scripts/benchmarks/deployment.py --data FOLDER      (without --data: from the Hub)

--run names a run that has been trained already, as `trained` would.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from _common import Interval, alternate, environment, interval, report
from inference import make_networks

from vit_rsst import cli
from vit_rsst.data.loaders import evaluation_batches
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data
from vit_rsst.export import onnx_file
from vit_rsst.export.work import CALIBRATION_IMAGES, Options, Work
from vit_rsst.models.anatomy import prunable_weights
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.recipe.loading import builtin_folder
from vit_rsst.tickets.rounds import ticket_path
from vit_rsst.tickets.trained import Trained, open_trained
from vit_rsst.training.counters import score

LOSS_BOUND = 1.0
"""Most points of test top-1 that int8 may cost."""
SPEED_BOUND = 3.0
"""Least speed-up of slim int8 over dense fp32, at one of the batch sizes."""

SIZE, BATCHES, QUICK_BATCHES = 224, (1, 32), (1, 2)
ALTERNATIONS, QUICK_ALTERNATIONS = {1: 30, 2: 3, 32: 10}, 3
CALLS = {1: 10}
THREADS = 2
DENSE = "dense, fp32"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--quick", action="store_true", help="a smoke test: short training, checks no bounds")
    parser.add_argument("--data", metavar="FOLDER", help="CIFAR-10 as parquet; default: from the Hub")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="the trained run; default: train it now")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        accuracy = accuracies(args, Path(folder))
        speed = speeds(args, Path(folder))
    missed = [] if args.quick else [*lost_accuracy(accuracy), *slow(speed)]
    result = {
        "environment": environment(torch.device("cpu")) | {"onnxruntime": onnxruntime.__version__},
        "load": {"before": load_before, "after": os.getloadavg()[0]},
        "accuracy": accuracy,
        "speed": speed,
        "missed": missed,
    }
    return report(args, result, ("deployment", "fp32 / ms", "int8 / times as fast", "bound"), rows(accuracy, speed))


# -- accuracy


def accuracies(args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Test top-1 and loss of the dense and the slim model, in float32 and int8."""
    run = args.run or trained(args, folder)
    found = {}
    for name, round in (("dense", 0), ("slim", 1)):
        ticket = ticket_path(run, round)
        argv = ["export", str(ticket), "--to", "onnx", "--int8", str(folder / name)]
        if code := cli.main(argv + (["--data", args.data] if args.data else [])):
            sys.exit(code)
        model = open_trained(ticket)
        int8 = onnx_file.Session(folder / name / onnx_file.FILE)
        data = open_data(replace(model.data, path=args.data or model.data.path), model.seed)
        shown = {"rank": 0, "num_processes": 1, "device": torch.device("cpu"), "mean": model.mean, "std": model.std}
        fp32, quantised = (
            score(net, evaluation_batches(data.test, 100, **shown), torch.device("cpu")) for net in (model.net, int8)
        )
        size = {"ticket": ticket.stat().st_size, "int8": (folder / name / onnx_file.FILE).stat().st_size}
        found[name] = {"fp32": fp32, "int8": quantised, "images": len(data.test), "bytes": size}
    return found


def trained(args: argparse.Namespace, folder: Path) -> Path:
    """Trains the dense round and one round without 60 % of the units; returns the run folder."""
    argv = ["train", str(builtin_folder() / "cifar10" / "cpu_units_imp.yaml"), f"output_dir={folder}", "name=run"]
    argv += ["train.epochs=12", "train.round_epochs=6", "pruning.schedule.rounds=1"]
    argv += [f"data.path={args.data}"] if args.data else []
    if args.quick:
        argv += ["train.epochs=2", "train.round_epochs=1", "optim.warmup_epochs=0", "train.steps_per_epoch=20"]
    if code := cli.main(argv):
        sys.exit(code)
    return folder / "run"


def lost_accuracy(accuracy: dict[str, dict]) -> list[str]:
    lost = {name: found["fp32"]["top1"] - found["int8"]["top1"] for name, found in accuracy.items()}
    return [
        f"{name}: int8 loses {points:.2f} points of top-1, bound {LOSS_BOUND}"
        for name, points in lost.items()
        if points > LOSS_BOUND
    ]


# -- speed


def speeds(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Times of four files, alternating, at each batch size."""
    sessions = {}
    for name, work in works(args.data).items():
        place = folder / name.replace(", ", "-")
        place.mkdir()
        onnx_file.write(work, place)
        sessions[name] = session(place / onnx_file.FILE)
    found = []
    for batch in QUICK_BATCHES if args.quick else BATCHES:
        images = np.random.default_rng(0).standard_normal((batch, 3, SIZE, SIZE), dtype=np.float32)
        calls = CALLS.get(batch, 1)

        def block(run: onnxruntime.InferenceSession, images: np.ndarray = images, calls: int = calls) -> None:
            for _ in range(calls):
                run.run(["logits"], {"images": images})

        blocks = {name: lambda run=run, block=block: block(run) for name, run in sessions.items()}
        number = QUICK_ALTERNATIONS if args.quick else ALTERNATIONS[batch]
        seconds = alternate(blocks, number, 1, torch.device("cpu"))
        contenders = {
            name: {
                "ms": round(1000 * float(np.median(values)) / calls, 3),
                "speed": asdict(interval(seconds[DENSE] / values)),
            }
            for name, values in seconds.items()
        }
        found.append({"batch": batch, "alternations": number, "contenders": contenders})
    return found


def works(data: str | None) -> dict[str, Work]:
    """What to export: dense and slim, in float32 and int8."""
    networks, _ = make_networks(SIZE)
    options = DataOptions("cifar10", data, image_size=SIZE)
    pixels = Work(_as_trained(networks["dense"], options)).calibration  # the same for both
    found = {}
    for name, net in (("dense", networks["dense"]), ("slim", networks["masked dense"])):
        for precision in ("fp32", "int8"):
            work = Work(_as_trained(net, options), Options(precision=precision))
            work.__dict__["calibration"] = pixels
            found[f"{name}, {precision}"] = work
    assert len(pixels) == CALIBRATION_IMAGES
    return found


def _as_trained(net: torch.nn.Module, options: DataOptions) -> Trained:
    mask = MaskSet({name: weight.detach() != 0 for name, weight in prunable_weights(net).items()})
    header = {"architecture": "vit_small_patch16_224", "model_args": "{}", "seed": "0"}
    classes = [str(number) for number in range(10)]
    return Trained(net, mask, Path("random weights"), header, options, (0.5,) * 3, (0.25,) * 3, classes)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def slow(speed: list[dict]) -> list[str]:
    """A sentence if slim int8 is too slow at every batch size."""
    ratios = {case["batch"]: Interval(**case["contenders"]["slim, int8"]["speed"]) for case in speed}
    if any(ratio.high >= SPEED_BOUND for ratio in ratios.values()):
        return []
    told = ", ".join(f"{ratio} times at batch {batch}" for batch, ratio in ratios.items())
    return [f"slim int8 is {told} as fast as dense fp32, bound {SPEED_BOUND} at one of them"]


def rows(accuracy: dict[str, dict], speed: list[dict]) -> list[tuple[str, ...]]:
    found = [
        (f"top-1 on {a['images']:,} images: {name}", f"{a['fp32']['top1']:.2f}", f"{a['int8']['top1']:.2f}",
         f"-{LOSS_BOUND} points")
        for name, a in accuracy.items()
    ]  # fmt: skip
    for case in speed:
        for name, timing in case["contenders"].items():
            bound = f"{SPEED_BOUND} at one batch size" if name == "slim, int8" else ""
            found.append(
                (
                    f"{SIZE} px, batch {case['batch']}: {name}",
                    f"{timing['ms']:.2f}",
                    str(Interval(**timing["speed"])),
                    bound,
                )
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
