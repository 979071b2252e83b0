"""How long `vit-rsst prune` takes on two cores for a ViT-S at 224 px, and its memory: one removal, and a sweep of five.

The model has random weights, which takes as long as with trained ones. Half of the single weights leave, by magnitude,
and the others are fitted to 512 real images; both models are scored on the images of the last two files. Each removal
is a process of its own, whose peak memory and processor time are those that the system reports.

`--data FOLDER` holds at least four parquet files with the columns of ImageNet-1k.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from _common import environment, report

import vit_rsst
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data

ONE_MINUTES, SWEEP_MINUTES = 6.0, 12.0
"""Bounds on the time from start to end."""
MEMORY_BOUND = 6.0
"""GiB."""
SWEEP = "0.3,0.4,0.5,0.6,0.7"
THREADS = 2


def make_ticket(folder: Path, data: Path, model: str) -> Path:
    """The dense model, which names its data: the last two files score, the one before them validates."""
    files = [path.name for path in sorted(data.glob("*.parquet"))]
    splits = {"train": files[:-3], "val": files[-3:-2], "test": files[-2:]}
    (folder / "data").mkdir()
    for split, names in splits.items():
        for name in names:
            shutil.copy(data / name, folder / "data" / f"{split}-{name.removeprefix('train-')}")
    options = {"source": "folder", "path": str(folder / "data"), "image_size": 224, "crop_pct": 0.875}
    options["splits"] = {split: f"{split}-*" for split in splits}
    classes = open_data(DataOptions(**options), 0).classes
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=len(classes))
    return vit_rsst.save(net, folder / "dense.safetensors", data={**options, "classes": classes})


def measured(ticket: Path, out: Path, images: int, *argv: str) -> dict[str, float]:
    """Minutes, minutes of processor time, and GiB at the peak of one `vit-rsst prune`."""
    command = [sys.executable, "-m", "vit_rsst.cli", "prune", str(ticket), str(out), *argv]
    command += ["--compensate", "least_squares", "--calibration-images", str(images)]
    begin = time.perf_counter()
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)}) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit code {process.returncode}")
    return {
        "minutes": (time.perf_counter() - begin) / 60,
        "cpu_minutes": (usage.ru_utime + usage.ru_stime) / 60,
        "gib": usage.ru_maxrss / 2**20,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="parquet files of ImageNet-1k")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--quick", action="store_true", help="a ViT-Ti, 16 images, a sweep of two: meaningless")
    args = parser.parse_args()
    model = "vit_tiny_patch16_224" if args.quick else "vit_small_patch16_224"
    images, sweep = (16, "0.3,0.5") if args.quick else (512, SWEEP)
    found, missed, rows = {}, [], []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        ticket = make_ticket(Path(name), args.data, model)
        for what, argv, bound in (
            ("one removal", ("--sparsity", "0.5"), ONE_MINUTES),
            (f"a sweep of {sweep.count(',') + 1}", ("--sweep", sweep), SWEEP_MINUTES),
        ):
            one = found[what] = measured(ticket, Path(name) / what, images, *argv)
            if one["minutes"] > bound:
                missed.append(f"{what} takes {one['minutes']:.1f} minutes, bound {bound:g}")
            if one["gib"] > MEMORY_BOUND:
                missed.append(f"{what} takes {one['gib']:.1f} GiB, bound {MEMORY_BOUND:g}")
            rows.append((what, *(f"{value:.2f}" for value in one.values()), f"{bound:g} min, {MEMORY_BOUND:g} GiB"))
    result = {
        "environment": environment(torch.device("cpu")),
        "threads": THREADS,
        "load": [round(value, 1) for value in os.getloadavg()],
        "model": model,
        "images": images,
        "sweep": sweep,
        "found": {what: {key: round(value, 3) for key, value in one.items()} for what, one in found.items()},
        "missed": missed,
    }
    return report(args, result, (f"{model}, {images} images", "minutes", "CPU minutes", "GiB", "bound"), rows)


if __name__ == "__main__":
    sys.exit(main())
