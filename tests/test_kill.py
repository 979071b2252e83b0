"""Runs that are really killed: the same command then ends with the result of an undisturbed run."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

STEPS = 12  # an epoch
OVERRIDES = [
    "model.args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, mlp_ratio: 2.0, drop_path_rate: 0.1}",
    f"train.steps_per_epoch={STEPS}",
    "train.epochs=2",
    "train.round_epochs=3",
    "train.log_every_steps=1",
    "optim.warmup_epochs=1",
    "pruning.schedule.rounds=2",
    "pruning.rewind=epoch:1",
]
TOTAL = (2 + 3 + 3) * STEPS
WINDOW = range(2 * STEPS + 1, 2 * STEPS + 11)  # of round 1: the penalty acts over 0.3 of its 36 steps, then removal
RECOVERY = range(WINDOW.stop + 1, 5 * STEPS)


def command(folder: Path, *more: str) -> list[str]:
    recipe = ["-m", "vit_rsst.train", "recipes/digits/quickstart.yaml", f"output_dir={folder}", "name=run"]
    return [sys.executable, *recipe, *OVERRIDES, *more]


def start(folder: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "log", "a") as log:
        return subprocess.Popen(command(folder, *more), env=environment, stdout=log, stderr=log)


def last_step(run: Path) -> int:
    """The newest step in metrics.jsonl; the last line may be half written."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def kill_at(step: int, folder: Path, *more: str) -> None:
    """Starts the run and kills it once it has logged `step`, at whatever moment that is."""
    process = start(folder, *more)
    while last_step(folder / "run") < step:
        assert process.poll() is None, f"ended before it could be killed:\n{(folder / 'log').read_text()}"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def outcome(run: Path) -> tuple[dict, list]:
    """Bytes of every tensor of every ticket, and the accuracies of rounds.csv."""
    tensors = {}
    for path in sorted((run / "tickets").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {(path.name, name): file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
    with open(run / "rounds.csv") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    return tensors, rows


def epochs(run: Path) -> list[dict]:
    """The epoch lines of metrics.jsonl, less times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines if line["event"] == "epoch"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder).wait() == 0, (folder / "log").read_text()
    return folder / "run"


def check(moments: list[int], folder: Path, undisturbed: Path, *more: str) -> None:
    for step in moments:
        kill_at(step, folder, *more)
    assert start(folder, *more).wait() == 0, (folder / "log").read_text()
    assert outcome(folder / "run") == outcome(undisturbed)
    assert epochs(folder / "run") == epochs(undisturbed)


@pytest.mark.slow
def test_two_runs_of_one_seed_are_bit_identical(undisturbed, tmp_path):
    check([], tmp_path, undisturbed)


@pytest.mark.slow
def test_kills_inside_the_window_and_before_the_round_ends_leave_no_trace(undisturbed, tmp_path):
    moments = [STEPS + 3, WINDOW[4], RECOVERY[5], TOTAL - 2]
    check(moments, tmp_path, undisturbed, "train.save_every_steps=5")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_random_kills_each_leave_no_trace(undisturbed, tmp_path):
    draw = random.Random(20)
    moments = [draw.choice(WINDOW), draw.choice(RECOVERY), *(draw.randrange(STEPS, TOTAL) for _ in range(8))]
    for number, step in enumerate(moments):
        folder = tmp_path / str(number)
        folder.mkdir()
        check([step], folder, undisturbed)
