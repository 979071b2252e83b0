"""Signals outside of training, failures of a single rank, sharded weights."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from vit_rsst.assembly import planning
from vit_rsst.errors import InputError
from vit_rsst.recipe.loading import load

pytestmark = pytest.mark.distributed

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

PLUGIN = """\
import os, signal, time
import torch
from vit_rsst import loop
from vit_rsst.assembly import build, data, parts
from vit_rsst.run import console

data.EVALUATION_BATCH = 20
what, _, where = os.environ.get("FAULT", "").partition("@")
place, _, rank = where.partition("/")
step_of, evaluation_batches, score_tickets = console.Console.step, data.evaluation_batches, loop.score_tickets


def strike():
    if os.environ.get("RANK", "0") != (rank or "0"):
        return
    if what == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def step(self, loss):
    step_of(self, loss)
    if place == f"step{self.progress.global_step}":
        strike()


def batches(*samples, **options):
    for number, batch in enumerate(evaluation_batches(*samples, **options)):
        yield batch
        if place == f"batch{number}" or (place == "scoring" and scoring):
            strike()


def score(s):
    global scoring
    scoring = True
    score_tickets(s)


scoring = False
console.Console.step, data.evaluation_batches, loop.score_tickets = step, batches, score
if what == "term" and place == "start":
    build_model = parts.build_model
    parts.build_model = lambda *a: (strike(), time.sleep(5), build_model(*a))[2]
"""


def start(folder: Path, fault: str, ranks: int = 1, *overrides: str) -> subprocess.Popen:
    (folder / "striker.py").write_text(PLUGIN, encoding="utf-8")
    text = tiny.RECIPE.replace("log_every", "rank_timeout: 5, batch_per_device: 8, log_every") + "plugins: [striker]\n"
    arguments = ["-m", "vit_rsst.train", str(tiny.write_recipe(folder, text)), *overrides]
    variables = {"PYTHONPATH": os.pathsep.join((str(folder), str(tiny.REPOSITORY))), "FAULT": fault}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *arguments]
    if ranks > 1:
        variables |= {"ACCELERATE_USE_CPU": "true", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
        options = ["--num_processes", ranks, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
        options += ["--main_process_port", port, "--multi_gpu"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, options), *arguments]
    return subprocess.Popen(
        command, env=tiny.environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen, limit: float = 100) -> tuple[int, str, float]:
    """Exit code, all output, seconds; kills the group when it takes too long."""
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out + err, time.monotonic() - began


def tickets(run: Path) -> list[dict]:
    files = sorted((run / "tickets").glob("*.safetensors"))
    return [{name: t.numpy().tobytes() for name, t in load_file(path).items()} for path in files]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out, _ = ended(start(folder, ""))
    assert code == 0, out
    return folder / "runs" / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["batch0", "start", "scoring"])
def test_a_signal_is_handled_whatever_the_run_is_doing(tmp_path, undisturbed, place):
    code, out, _ = ended(start(tmp_path, f"term@{place}"))
    run = tmp_path / "runs" / "tiny"
    assert code == 75, out
    assert "Traceback" not in out
    assert re.search("stopped (on|by) SIGTERM", out)
    assert (tiny.status(run)["state"], tiny.status(run)["exit_code"]) == ("stopped", 75)
    assert (run / "checkpoints").exists() == (place != "start"), "before the first step there is nothing to save"
    code, out, _ = ended(start(tmp_path, ""))
    assert code == 0, out
    assert tickets(run) == tickets(undisturbed)


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_ends_the_evaluation_of_both(tmp_path):
    code, out, _ = ended(start(tmp_path, "term@batch0/1", 2))
    status = tiny.status(tmp_path / "runs" / "tiny")
    assert status["exit_code"] == 75, out
    assert status["step"] == 3
    assert code != 0
    assert list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step-00000003"))


@pytest.mark.slow
def test_an_error_on_one_rank_is_reported_and_ends_all_ranks(tmp_path):
    code, out, seconds = ended(start(tmp_path, "memory@step4/1", 2))
    status = tiny.status(tmp_path / "runs" / "tiny")
    assert code != 0
    assert seconds < 60
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    sentence = "out of memory with a global batch of 32 = 8 a device × 2 processes × 2 accumulated; "
    assert f"error: {sentence}set train.batch_per_device=4: 32 = 4 a device × 2 processes × 4 accumulated" in out
    assert status["reason"].startswith(sentence)


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "requests DeepSpeed, which shards the weights"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "requests Megatron-LM, which shards the weights"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 1, which flattens weights"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "sets fsdp_offload_params",
        ),
    ],
)
def test_sharding_that_masks_cannot_follow_is_refused(tmp_path, monkeypatch, capsys, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tiny.command("train", tiny.write_recipe(tmp_path)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["optim.name=sgd"], "optim.name: torch has no fused sgd for sharded weights"),
        (["optim.name=adamw", "train.compile=reduce-overhead"], "train.compile: reduce-overhead records CUDA graphs"),
        (["optim.name=adamw", "pruning={method: {name: set, interval: 2}, granularity: 2:4}"], "within windows"),
    ],
)
def test_what_does_not_work_on_shards_is_refused_by_the_plan(tmp_path, monkeypatch, capsys, overrides, said):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    recipe = load(tiny.write_recipe(tmp_path), overrides)
    with pytest.raises(InputError, match=said):
        planning.plan_text(recipe, 2)


def test_no_stacks_are_written_in_normal_operation(undisturbed):
    assert (undisturbed / "logs" / "stacks-0.txt").read_text() == ""
    assert json.loads((undisturbed / "status.json").read_text())["state"] == "finished"
