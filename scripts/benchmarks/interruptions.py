"""Interrupts real runs at every kind of moment and compares the result with an uninterrupted run, bit for bit.

Every meaningful cell of {in memory, map-style, stream} × {1, 2 ranks} × {0, 2 workers} × {six moments} × {SIGKILL,
SIGTERM} trains, is interrupted once and resumes; so do a run of 2 ranks with mixing, erasing, a balanced sampler, EMA,
a teacher and best-epoch selection, runs of 3 and 4 ranks with a model that fills two DDP buckets, and runs of 2 and 3
ranks whose weights FSDP2 shards, also within a save and at drawn steps. Batches, tickets, accuracies, epoch metrics and
the last resume point (weights, optimizer, masks) must then equal those of the uninterrupted run. Two canaries show that
the comparison can fail: `_accelerate_canary.py`, which resumes as Accelerate documents it, runs the one-rank cells, and
a run of 3 ranks leaves DDP's buckets unsettled. `interruptions.py KIND…`, such as `sharded`, tests only these.
"""

import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import _accelerate_canary
from safetensors import safe_open

from vit_rsst.data.workers import IMPORTS

EQUAL = "equal to the last bit"
REQUIRED_SHARE = 1.0  # of the cells survive

HERE = Path(__file__).resolve().parent
SECONDS = 240
ON_GPUS = os.environ.get("VIT_RSST_RANKS") == "cuda"
"""Ranks train on GPUs, over NCCL, with deterministic kernels; from NCCL 2.30 on, several of them may share one."""
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
STEPS = 4  # per epoch; round 0 has 2 epochs, rounds 1 and 2 have 3 each
MOMENTS = {
    "mid-epoch": ("step", 6),
    "epoch end": ("epoch", 12),
    "evaluation": ("evaluation", 12),
    "penalty window": ("step", 11),
    "after removal": ("step", 15),
    "first step of a round": ("step", 9),
}
"""Moment → the event that the plugin waits for, and its global step. The window of round 1 is steps 9 to 14."""
SEEDS = range(4)
OF_SHARDS = {
    "gathering of a save": ("gather", 10),
    "writing of a save": ("write", 10),
    # A signal after step 21 may be heard too late to stop a run of 32 steps: ranks agree every ten steps.
    **{f"drawn step {step}": ("step", step) for step in sorted(random.Random(i).randrange(1, 22) for i in SEEDS)},
}
"""More moments of runs whose weights are sharded, which all ranks save together."""


@dataclass(frozen=True)
class Setting:
    """How a run reads its data, and with how many processes."""

    kind: str
    ranks: int
    workers: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.ranks} rank(s), {self.workers} workers"


RECIPE = """\
name: run
data: {{source: folder, path: {data}, image_size: 16, val_fraction: 0.1, {access}}}
model:
  name: vit_tiny
  args: {{img_size: 16, patch_size: 8, embed_dim: {width}, depth: 1, num_heads: 3, mlp_ratio: 1.0, drop_rate: 0.1}}
optim: {{lr: 3e-3}}
train:
  {{epochs: 2, round_epochs: 3, global_batch: {batch}, batch_per_device: {share}, steps_per_epoch: 4,
   save_every_steps: 2{more}}}
pruning: {{method: {{name: rsst, remove_at: 0.5}}, schedule: {{rounds: 2, final_sparsity: 0.9}}{rewind}}}
output_dir: {folder}
plugins: [_interrupt]
"""
ACCESS = {
    "in memory": "in_memory: true",
    "two buckets": "in_memory: true",
    "sharded": "in_memory: true",
    "map-style": "in_memory: false, augment: {{crop: resized}}, workers: {workers}",
    "stream": "streaming: true, shuffle_buffer: 100, augment: {{crop: resized}}, workers: {workers}",
    "techniques": "in_memory: false, augment: {{preset: strong, aug_repeats: 2}}, imbalance: {{kind: step, ratio: 3}}, "
    "sampler: class_balanced, workers: {workers}",
}
TECHNIQUES = ", ema_decay: 0.9, keep_best: true, label_smoothing: 0.1, distill: {teacher: dense}"
RANKS = {"two buckets": (3, 4), "sharded": (2, 3), "techniques": (2,)}
"""Kind of setting → numbers of processes; others: 1 and 2. The sum of two ranks does not depend on the order."""
WORKERS = {"map-style": (0, 2), "stream": (0, 2), "techniques": (2,)}
"""Kind of setting → numbers of decoding processes; others: none, for there is nothing to decode."""
SIZES = {
    Setting("two buckets", 3, 0): (288, 24, 8),  # the first of DDP's buckets holds 1 MiB
    Setting("two buckets", 4, 0): (288, 24, 3),
    Setting("sharded", 2, 0): (27, 24, 6),  # units lie on two ranks
    Setting("sharded", 3, 0): (27, 24, 4),
}
"""Width of the model, images per step, and images per rank and pass."""


SETTINGS = [
    Setting(kind, ranks, workers)
    for kind in ACCESS
    for ranks in RANKS.get(kind, (1, 2))
    for workers in WORKERS.get(kind, (0,))
]


@dataclass(frozen=True)
class Cell:
    setting: Setting
    moment: str
    signal: str

    def __str__(self) -> str:
        return f"{self.setting}, {self.moment}, SIG{self.signal}"


def moments(setting: Setting) -> Mapping[str, tuple[str, int]]:
    """Those at which a setting is interrupted."""
    return MOMENTS | OF_SHARDS if setting.kind == "sharded" else MOMENTS


CELLS = [
    Cell(setting, moment, name) for setting in SETTINGS for moment in moments(setting) for name in ("KILL", "TERM")
]


class Bench:
    """Runs cells in their own folder; each setting is trained once without interruption."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = write_digits(folder / "data")
        self._undisturbed: dict[Setting, dict] = {}
        self.settles = True  # whether runs settle DDP's buckets before the first step
        # Forking from a process that has imported everything starts in one second instead of eight.
        self.context = multiprocessing.get_context("spawn" if ON_GPUS else "forkserver")  # CUDA does not survive a fork
        self.context.set_forkserver_preload(["vit_rsst.assembly.build", "vit_rsst.loop", "sklearn.datasets", *IMPORTS])

    def undisturbed(self, setting: Setting) -> dict:
        if setting not in self._undisturbed:
            folder = Path(tempfile.mkdtemp(prefix="undisturbed-", dir=self.folder))
            codes = self.train(setting, folder)
            assert set(codes) == {0}, f"the undisturbed run failed: {log_of(folder)}"
            self._undisturbed[setting] = outcome(folder)
        return self._undisturbed[setting]

    def survives(self, cell: Cell) -> tuple[bool, str]:
        """Whether the interrupted run ends like the undisturbed one; if not, what differs."""
        expected = self.undisturbed(cell.setting)
        folder = self.folder / "cell"
        shutil.rmtree(folder, ignore_errors=True)
        event, step = moments(cell.setting)[cell.moment]
        rank = 0 if event == "write" else cell.setting.ranks - 1  # rank 0 alone writes
        codes = self.train(cell.setting, folder, f"{event}:{cell.signal}:{rank}", step)
        if 0 in codes:
            return False, f"it was not interrupted: exit codes {codes}"
        if cell.signal == "TERM" and set(codes) != {75}:
            return False, f"exit codes {codes} instead of 75: {log_of(folder)}"
        codes = self.train(cell.setting, folder)
        if set(codes) != {0}:
            return False, f"it did not resume: exit codes {codes}: {log_of(folder)}"
        found = outcome(folder)
        different = [name for name in expected if found.get(name) != expected[name]]
        return not different, f"{', '.join(different)} differ" if different else EQUAL

    def train(self, setting: Setting, folder: Path, interrupt: str = "", step: int = -1) -> list[int]:
        """Trains with the setting's number of processes, and kills all if one dies; returns their exit codes."""
        folder.mkdir(exist_ok=True)
        access = ACCESS[setting.kind].format(workers=setting.workers)
        recipe = folder / "recipe.yaml"
        is_sharded = setting.kind == "sharded"
        more = TECHNIQUES if is_sharded or setting.kind == "techniques" else ""
        more += ", deterministic: true" if ON_GPUS else ""
        sizes = dict(zip(("width", "batch", "share"), SIZES.get(setting, (24, 32, 8)), strict=True))
        rewind = ", rewind: 'epoch:1'" if is_sharded else ""
        text = RECIPE.format(data=self.data, folder=folder, access=access, more=more, rewind=rewind, **sizes)
        recipe.write_text(text, encoding="utf-8")
        common = {"INTERRUPT": interrupt, "STEP": str(step), "BATCHES": f"{folder}/batches-"}
        common |= {"SETTLES": str(self.settles), **(FSDP2 if is_sharded else {})}
        processes = []
        port = free_port()
        for rank in range(setting.ranks):
            local = rank % num_gpus() if ON_GPUS else rank  # Accelerate takes it for the number of a GPU
            ranked = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": setting.ranks, "LOCAL_WORLD_SIZE": setting.ranks}
            launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | (ranked if setting.ranks > 1 else {})
            variables = common | {name: str(value) for name, value in launched.items()}
            arguments = (str(recipe), variables, str(folder / f"log-{rank}"))
            processes.append(self.context.Process(target=train_here, args=arguments))
            processes[-1].start()
        end_together(processes)
        return [process.exitcode for process in processes]

    def canary_survives(self, cell: Cell) -> bool:
        """Whether a run resumed by Accelerate alone equals its undisturbed run in batches and weights."""
        import torch

        found = []
        for moments in (("",), (cell.moment, "")):
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            for moment in moments:
                number = getattr(signal, f"SIG{cell.signal}")
                arguments = (folder, cell.setting.kind, cell.setting.workers, moment, number)
                process = self.context.Process(target=_accelerate_canary.train, args=arguments)
                process.start()
                end_together([process])
            seen = dict(map(json.loads, (folder / "seen").read_text().splitlines()))
            found.append((seen, torch.load(folder / "weights.pt") if (folder / "weights.pt").exists() else None))
        return found[0] == found[1]


def train_here(recipe: str, variables: dict[str, str], log: str) -> None:
    """Body of a training process, like `python -m vit_rsst.train`."""
    placed = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"} if ON_GPUS else ON_CPU
    os.environ.update(variables | placed | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.path.insert(0, str(HERE))
    import torch

    from vit_rsst import train

    torch.set_num_threads(1)
    sys.exit(train.main([recipe]))


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def end_together(processes: list) -> None:
    deadline = time.monotonic() + SECONDS
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0, 75) for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.01)
    for process in processes:
        process.join()


def outcome(folder: Path) -> dict:
    """Everything a run writes, without times."""
    run = folder / "run"
    with open(run / "rounds.csv") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {
        "batches": {path.name: batches(path) for path in sorted(folder.glob("batches-*"))},
        "tickets": {path.name: tensors(path) for path in sorted((run / "tickets").glob("*.safetensors"))},
        "accuracies": rows,
        "epoch metrics": [timeless(line) for line in lines if line["event"] == "epoch"],
        "step metrics": [timeless(line) for line in lines if line["event"] == "step"],
        "weights": tensors(last / "model.safetensors"),
        "optimizer": tensors(last / "optimizer.safetensors"),
        "masks": tensors(last / "controller.safetensors"),
    }


def timeless(line: dict) -> dict:
    return {key: value for key, value in line.items() if not key.startswith("time/")}


def batches(path: Path) -> dict[int, set[str]]:
    """Step → hashes of its batches, over all restarts."""
    seen: dict[int, set[str]] = {}
    for line in path.read_text().splitlines():
        step, digest = json.loads(line)
        seen.setdefault(step, set()).add(digest)
    return seen


def tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - no mapping


def log_of(folder: Path) -> str:
    text = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("log-*")))
    return text.strip().splitlines()[-1] if text.strip() else "no output"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_digits(folder: Path) -> Path:
    """scikit-learn's digits as parquet shards with the Hub's columns."""
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits

    datasets.disable_progress_bars()
    folder.mkdir(parents=True)
    digits = load_digits()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for split, first, sizes in (("train", 0, (90, 140, 70, 110)), ("test", 500, (60,))):
        for number, size in enumerate(sizes):
            rows = range(first, first + size)
            images = [Image.fromarray((digits.images[i] * 15).astype("uint8")).resize((16, 16)) for i in rows]
            content = {"image": images, "label": [int(digits.target[i]) for i in rows]}
            path = folder / f"{split}-{number:05d}-of-{len(sizes):05d}.parquet"
            datasets.Dataset.from_dict(content, features=features).to_parquet(path)
            first += size
    return folder


def chosen(kinds: Sequence[str], quick: bool) -> Iterator[Cell]:
    """The cells of these kinds of settings, or of all; quick: each setting at some moments, each moment with some."""
    for place, setting in enumerate(SETTINGS):
        if kinds and setting.kind not in kinds:
            continue
        for number, cell in enumerate(cell for cell in CELLS if cell.setting == setting):
            if not quick or number % len(MOMENTS) == place % len(MOMENTS):
                yield cell


def main() -> int:
    import torch
    from _common import environment, parse_args, report, show_progress

    args = parse_args(__doc__, names="KIND")
    if unknown := [kind for kind in args.names if kind not in ACCESS]:
        sys.exit(f"unknown kind {unknown[0]!r}; expected {', '.join(ACCESS)}")
    result = {"environment": environment(torch.device("cpu")), "cells": {}, "missed": []}
    canary: dict[str, bool] = {}
    unsettled = Cell(Setting("two buckets", 3, 0), "mid-epoch", "TERM")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for cell in chosen(args.names, args.quick):
            survived, why = bench.survives(cell)
            result["cells"][str(cell)] = {"survived": survived, "why": why}
            show_progress(f"{len(result['cells'])}  {cell}: {why}")
            if not survived:
                result["missed"].append(f"{cell}: {why}")
            if cell.setting.ranks == 1 and cell.moment in _accelerate_canary.MOMENTS:
                canary[str(cell)] = bench.canary_survives(cell)
        if not args.names or unsettled.setting.kind in args.names:
            bench = Bench(Path(folder) / "unsettled")
            bench.settles = False
            result["unsettled"] = bench.survives(unsettled)[1]
            if result["unsettled"] == EQUAL:
                result["missed"].append(f"{unsettled}, buckets unsettled: {EQUAL}, so the comparison proves nothing")
    tried, survived = len(result["cells"]), sum(cell["survived"] for cell in result["cells"].values())
    result["survived"], result["tried"] = survived, tried
    result["canary"] = canary
    rows = []
    for setting in SETTINGS:
        if args.names and setting.kind not in args.names:
            continue
        of = [v["survived"] for k, v in result["cells"].items() if k.startswith(str(setting))]
        theirs = [v for k, v in canary.items() if k.startswith(str(setting))]
        rows.append([str(setting), f"{sum(of)}/{len(of)}", f"{sum(theirs)}/{len(theirs)}" if theirs else "–"])
    if "unsettled" in result:
        rows.append([f"{unsettled}, buckets unsettled", result["unsettled"], "–"])
    rows.append(["all: survived/tried", f"{survived}/{tried}", f"{sum(canary.values())}/{len(canary)}"])
    return report(args, result, ["setting", "vit_rsst", "save_state/load_state"], rows)


if __name__ == "__main__":
    sys.exit(main())
