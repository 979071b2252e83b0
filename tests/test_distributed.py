"""Two and three real processes under `accelerate launch`, on the CPU: two processes compute what one does."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from vit_rsst.assembly import calibration, data

pytestmark = pytest.mark.distributed

TIME_LIMIT = 120
STEPS = 10
RECIPE = (
    tiny.RECIPE.replace("steps_per_epoch: 3", f"steps_per_epoch: {STEPS}, batch_per_device: 8") + "plugins: [stopper]\n"
)
TOTAL = 3 * 2 * STEPS

STOPPER = """\
import os, signal
from vit_rsst.run import console
from vit_rsst.assembly import calibration, data

data.EVALUATION_BATCH = 50  # so that both ranks have some of the 144 and 360 images
calibration.CALIBRATION_BATCH = 32  # 150 images: three batches for one rank, and a whole and a ragged one for the other

step_of = console.Console.step

def step(self, loss):
    step_of(self, loss)
    if (os.environ["RANK"], str(self.progress.global_step)) == ("1", os.environ.get("STOP_AT")):
        os.kill(os.getpid(), signal.SIGTERM)

if "STOP_AT" in os.environ:
    console.Console.step = step
"""
"""A plugin of the recipe: small evaluation batches, and a signal to rank 1, which does not write."""


@dataclass(frozen=True)
class Job:
    """Result of a launch of two processes."""

    code: int
    out: str
    err: str
    run: Path

    @property
    def report(self) -> str:
        return f"exit code {self.code}\n{self.out[-3000:]}\n{self.err[-3000:]}"


def launch(folder: Path, text: str = RECIPE, processes: int = 2, **variables: str) -> Job:
    """Trains a recipe in `folder` with several processes; kills the whole group when it takes too long."""
    (folder / "stopper.py").write_text(STOPPER, encoding="utf-8")
    recipe = tiny.write_recipe(folder, text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Several processes are started for --multi_gpu alone; ACCELERATE_USE_CPU puts them on the CPU.
    options = {"num_processes": processes, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    options["main_process_port"] = port
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += [f"--{name}={value}" for name, value in options.items()]
    path = {"PYTHONPATH": os.pathsep.join((str(folder), str(tiny.REPOSITORY)))}
    process = subprocess.Popen(
        [*launcher, "-m", "vit_rsst.train", str(recipe)],
        env=tiny.environment(**path, **variables),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still running after {TIME_LIMIT} s\n{out[-2000:]}\n{err[-2000:]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Job(process.returncode, out, err, folder / "runs" / "tiny")


def rounds(run: Path) -> list[dict[str, str]]:
    with open(run / "rounds.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def reports(run: Path) -> list[dict]:
    return [json.loads(path.read_text())["pruning"] for path in sorted((run / "tickets").glob("round_*.json"))]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Job:
    """A run of two processes, two micro-batches a step on each."""
    job = launch(tmp_path_factory.mktemp("two"), ACCELERATE_USE_CPU="true")
    assert job.code == 0, job.report
    return job


def alone(folder: Path, text: str = RECIPE) -> Path:
    """The run of the same recipe in one process."""
    (folder / "stopper.py").write_text(STOPPER, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for module, name in (
            (data, "EVALUATION_BATCH"),
            (calibration, "CALIBRATION_BATCH"),
        ):  # which the plugin changes
            patch.setattr(module, name, getattr(module, name))
        assert tiny.command("train", tiny.write_recipe(folder, text)) == 0
    sys.modules.pop("stopper")
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Four micro-batches a step."""
    return alone(tmp_path_factory.mktemp("one"))


def test_two_processes_finish_a_run_and_one_of_them_writes(two):
    assert tiny.status(two.run) | {"updated": ""} == {
        "state": "finished", "round": 2, "epoch": 2, "step": TOTAL, "exit_code": 0, "reason": "", "updated": "",
    }  # fmt: skip
    assert json.loads((two.run / "environment.json").read_text())["processes"] == 2
    assert "32 = 8 a device × 2 processes × 2 accumulated" in two.out
    for line in ("round 0/2  epoch 1/2", "round 2/2  epoch 2/2", "The last ticket holds"):
        assert two.out.count(line) == 1, two.out
    steps = [event["step"] for event in tiny.events(two.run) if event["event"] == "step"]
    assert steps == list(range(1, TOTAL + 1))


def test_the_ranks_agree_on_every_mask(two, one):
    found, alone = reports(two.run), reports(one)
    assert len(found) == len(alone) == 3
    for report, single in zip(found, alone, strict=True):
        first, second = report["mask_fingerprints"]
        assert first == second
        assert len(single["mask_fingerprints"]) == 1
        assert report["density"] == single["density"]
        assert report["density_asked"] == single["density_asked"]
    assert len({report["mask_fingerprints"][0] for report in found}) == 3
    assert [r["density"] for r in found] == [
        round(d * tiny.NUM_PRUNABLE) / tiny.NUM_PRUNABLE for d in (1, 0.1**0.5, 0.1)
    ]


@pytest.mark.parametrize("criterion", ["saliency", "activation_l2", "obs"])
@pytest.mark.slow
def test_statistics_of_ragged_batches_choose_the_units_that_one_process_chooses(one, tmp_path, criterion):
    pruning = (
        f"{{method: imp, granularity: head+neuron, criterion: {criterion}, calibration_images: 150, min_neurons: 2, "
    )
    pruning += "schedule: {rounds: 1, final_sparsity: 0.6}}"
    text = RECIPE.split("pruning:", maxsplit=1)[0].replace("epochs: 2", "epochs: 1")
    start = f"start_from: {one / 'tickets' / 'round_00.safetensors'}, args:"  # the same weights in both
    text = text.replace("args:", start) + f"plugins: [stopper]\npruning: {pruning}\n"
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    job = launch(tmp_path / "two", text, ACCELERATE_USE_CPU="true")
    assert job.code == 0, job.report
    found, single = reports(job.run)[1], reports(alone(tmp_path / "one", text))[1]
    assert found["mask_fingerprints"] == single["mask_fingerprints"] * 2
    assert found["density"] == single["density"] < 0.5
    assert found["units"] == single["units"]


@pytest.mark.slow
def test_several_processes_move_the_mask_as_one_does(tmp_path):
    """By the gradient of the global batch: on 1, 2 and 3 processes of 6, 3 and 2 micro-batches."""
    text = RECIPE.replace("{name: rsst, remove_at: 0.8}", "{name: rigl, window: [0, 0.2], interval: 4}")
    text, found = text.replace("global_batch: 32", "global_batch: 48"), {}
    for processes in (2, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        job = launch(folder, text, processes, ACCELERATE_USE_CPU="true")
        assert job.code == 0, job.report
        [found[processes]] = reports(job.run)
    (tmp_path / "1").mkdir()
    [single] = reports(alone(tmp_path / "1", text))
    for processes, report in found.items():
        assert report["mask_fingerprints"] == single["mask_fingerprints"] * processes
        assert report["layers"] == single["layers"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_fit_what_stays_as_one_does(tmp_path, processes):
    """The last of three ranks has a part of 150 calibration images; weights are compared at the end of each epoch."""
    text = RECIPE.replace("{name: rsst, remove_at: 0.8}", "imp\n  compensate: least_squares\n  calibration_images: 150")
    text = text.replace("global_batch: 32", "global_batch: 48")
    (tmp_path / "one").mkdir()
    job = launch(tmp_path, text, processes, ACCELERATE_USE_CPU="true")
    assert job.code == 0, job.report
    ours, theirs = (reports(run)[1] for run in (job.run, alone(tmp_path / "one", text)))
    assert ours["mask_fingerprints"] == theirs["mask_fingerprints"] * processes
    assert ours["what_if_loss_gap"] == pytest.approx(theirs["what_if_loss_gap"], abs=0.01)


def test_two_processes_take_the_steps_of_one_on_the_same_global_batches(two, one):
    ours, theirs = tiny.events(two.run), tiny.events(one)
    assert [(e["event"], e["step"]) for e in ours] == [(e["event"], e["step"]) for e in theirs]
    rates = [[e["train/lr"] for e in events if e["event"] == "step"] for events in (ours, theirs)]
    assert rates[0] == rates[1]
    norms = [[e["train/grad_norm"] for e in events if e["event"] == "step"] for events in (ours, theirs)]
    assert norms[0][:5] == pytest.approx(norms[1][:5], rel=1e-4), "the gradient is that of the global batch"
    first = [next(e for e in events if e["event"] == "epoch") for events in (ours, theirs)]
    assert first[0]["train/loss"] == pytest.approx(first[1]["train/loss"], rel=1e-4)
    assert first[0]["train/top1"] == pytest.approx(first[1]["train/top1"], abs=100 * 2 / (32 * STEPS))
    assert first[0]["val/loss"] == pytest.approx(first[1]["val/loss"], rel=1e-3)


def test_two_processes_end_where_one_does(two, one):
    for mine, single in zip(rounds(two.run), rounds(one), strict=True):
        assert float(mine["val_top1"]) == pytest.approx(float(single["val_top1"]), abs=4)
        assert float(mine["val_loss"]) == pytest.approx(float(single["val_loss"]), abs=0.1)
        assert float(mine["test_top1"]) == pytest.approx(float(single["test_top1"]), abs=4)
        assert mine["ticket_bytes"] == single["ticket_bytes"]


def test_evaluation_over_two_processes_counts_every_sample_once(two, capsys):
    row = rounds(two.run)[-1]
    assert tiny.command("evaluate", two.run) == 0
    told = capsys.readouterr().out
    assert f"top1 {float(row['test_top1']):.2f}" in told
    assert f"loss {float(row['test_loss']):.4f}" in told


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_and_the_same_command_resumes(two, tmp_path):
    stopped = launch(tmp_path, ACCELERATE_USE_CPU="true", STOP_AT="23")
    assert stopped.code != 0, stopped.report
    found = tiny.status(stopped.run)
    assert (found["state"], found["exit_code"]) == ("stopped", 75), stopped.report
    assert 23 <= found["step"] <= 33
    assert f"stopped by a request on another rank at step {found['step']}" in stopped.err

    resumed = launch(tmp_path, ACCELERATE_USE_CPU="true")
    assert resumed.code == 0, resumed.report
    assert f"step {found['step']} of {TOTAL}" in resumed.out
    for path in sorted((two.run / "tickets").glob("*.safetensors")):
        undisturbed, again = load_file(path), load_file(resumed.run / "tickets" / path.name)
        assert undisturbed.keys() == again.keys()
        for name, tensor in undisturbed.items():
            assert tensor.flatten().tolist() == again[name].flatten().tolist(), (path.name, name)
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in rounds(r)] for r in (two.run, resumed.run)]
    assert timeless[0] == timeless[1]


def test_two_unconnected_processes_are_rejected(tmp_path):
    """Without GPUs, MULTI_GPU starts two processes that each consider themselves the only one."""
    job = launch(tmp_path)
    assert job.code != 0
    assert "the launcher started 2 processes and Accelerate sees 1" in job.err, job.report
    assert "ACCELERATE_USE_CPU=true" in job.err
    assert "exitcode  : 2 " in job.err, "the launcher reports the exit code of its children"
    assert job.err.count("error: the launcher started") == 1
    assert not (tmp_path / "runs").exists()
