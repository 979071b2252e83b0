"""Ranks that are stopped, killed or hang for real: who it was is named, everyone ends, the same command resumes."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import faulty
import pytest
import tiny
import torch
from safetensors.torch import load_file

from vit_rsst.run.checkpoint import Checkpointer
from vit_rsst.run.folder import RunFolder
from vit_rsst.run.heartbeat import Beat, Heartbeat, is_waiting, verdict
from vit_rsst.train import record_loss

LIMIT = 4
PLUGIN = """\
import ctypes, os, signal, time
from vit_rsst import loop
from vit_rsst.assembly import data, parts
from vit_rsst.pruning import controller
from vit_rsst.run import checkpoint, resume

what, rank, place = os.environ.get("FAULT", "none:0:none").split(":")
data.EVALUATION_BATCH = 20


def strike(here):
    if here == place and os.environ.get("RANK", "0") == rank:
        with open(os.environ["STRUCK"], "w") as file:
            file.write("struck")
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "block":
            ctypes.CDLL(None).sleep(600)  # in C, without the lock of the interpreter
        elif what == "hold":
            ctypes.PyDLL(None).sleep(600)  # in C, with it
    if here == "writing" and what == "slow":
        time.sleep(float(rank))


def before(owner, name, where):
    function = getattr(owner, name)

    def struck(*arguments, **options):
        strike(where(*arguments) if callable(where) else where)
        return function(*arguments, **options)

    setattr(owner, name, struck)


evaluation_batches = data.evaluation_batches

def batches(*samples, **options):
    for batch in evaluation_batches(*samples, **options):
        strike("evaluation")
        yield batch

data.evaluation_batches = batches
before(parts, "build_model", "building")
before(loop, "train_step", lambda run, _: f"step {run.progress.global_step}")
before(controller, "agreed", "selection")
before(resume, "gather_", "save")
before(checkpoint, "_write_files", "writing")
"""
"""FAULT=what:rank:place, such as stop:1:evaluation, or slow:SECONDS: for each save; STRUCK is a file that is made."""


def start(folder: Path, fault: str, ranks: int, limit: float = LIMIT) -> tuple[list, Path]:
    (folder / "strikes.py").write_text(PLUGIN, encoding="utf-8")
    text = tiny.RECIPE.replace("global_batch: 32", f"global_batch: 24, save_every_steps: 2, rank_timeout: {limit}")
    recipe = tiny.write_recipe(folder, f"{text}plugins: [strikes]\n")
    log = folder / "log"
    struck = {"STRUCK": str(folder / "struck")}
    return faulty.start("train", recipe, ranks=ranks, log=log, FAULT=fault, **struck), log


def end_after_strike(folder: Path, processes: list, target: int, log: Path) -> float:
    """Seconds from the strike until all other ranks have ended; then ends the target."""
    while not (folder / "struck").exists():
        if not any(process.is_alive() for process in processes) and not (folder / "struck").exists():
            pytest.fail(f"all ended before it: {[process.exitcode for process in processes]}\n{log.read_text()}")
        time.sleep(0.02)
    began = time.monotonic()
    for rank, process in enumerate(processes):
        if rank != target:
            process.join(max(began + 60 - time.monotonic(), 0.1))
    seconds = time.monotonic() - began
    processes[target].kill()
    faulty.ended(processes, log)
    return seconds


FAULTS = [
    ("stop", 1, "step 0"), ("kill", 1, "step 0"),
    ("stop", 1, "step 4"), ("kill", 1, "step 4"), ("block", 1, "step 4"), ("hold", 1, "step 4"),
    ("stop", 1, "evaluation"), ("kill", 1, "evaluation"), ("block", 1, "evaluation"),
    ("stop", 1, "selection"), ("block", 1, "selection"),
    ("stop", 1, "save"), ("block", 1, "save"),
    ("stop", 0, "step 4"), ("kill", 0, "step 4"), ("block", 0, "step 4"),
    ("stop", 0, "writing"), ("kill", 0, "writing"),
]  # fmt: skip
ALWAYS = [("block", 1, "evaluation")]
ON_GPUS = [case for case in FAULTS if case[2] in ("step 4", "evaluation") and case[0] != "hold"]


def marks(case: tuple) -> list:
    return [*([] if case in ALWAYS else [pytest.mark.slow]), *([pytest.mark.nccl] if case in ON_GPUS else [])]


@pytest.mark.distributed
@pytest.mark.fault("F20")
@pytest.mark.fault("F21")
@pytest.mark.parametrize(
    ("what", "target", "place"),
    [pytest.param(*case, marks=marks(case)) for case in FAULTS],
)
def test_a_rank_that_is_lost_is_named_and_everyone_ends(tmp_path, record_property, what, target, place):
    processes, log = start(tmp_path, f"{what}:{target}:{place}", ranks=3)
    victim = processes[target].pid
    seconds = end_after_strike(tmp_path, processes, target, log)
    told, run = log.read_text(), tmp_path / "runs" / "tiny"
    assert seconds < LIMIT + 10, told
    others = [process.exitcode for rank, process in enumerate(processes) if rank != target]
    assert others == [3, 3], told
    found = tiny.status(run)
    assert (found["state"], found["exit_code"]) == ("failed", 3)
    assert f"rank {target} on {os.uname().nodename} (process {victim})" in found["reason"], told
    assert "run the same command to resume" in found["reason"]
    if what != "kill":  # a connection that closes is an error at once, with a traceback of its own
        stacks = [run / "logs" / f"stacks-{rank}.txt" for rank in range(3) if rank != target]
        assert all("train.py" in path.read_text() for path in stacks)
    if what in ("block", "hold"):
        assert "strikes.py" in (run / "logs" / f"stacks-{target}.txt").read_text(), "the stacks of the one that hangs"
    record_property("happened", f"rank {target} of 3, {what} in {place}: named, all ended within {seconds:.0f} s")
    (tmp_path / "struck").unlink()
    again, log = start(tmp_path, "none:0:none", ranks=3)
    assert faulty.ended(again, log).codes == [0, 0, 0], log.read_text()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.fault("F21")
def test_a_rank_that_is_lost_before_there_is_a_run_folder_is_named_too(tmp_path, record_property):
    processes, log = start(tmp_path, "stop:0:building", ranks=3)
    victim = processes[0].pid
    seconds = end_after_strike(tmp_path, processes, 0, log)
    told = log.read_text()
    assert seconds < LIMIT + 10, told
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 3, 3], told
    assert f"error: rank 0 on {os.uname().nodename} (process {victim})" in told
    assert not (tmp_path / "runs").exists()
    record_property("happened", f"rank 0 of 3, stop before there is a folder: named, all ended within {seconds:.0f} s")


def test_a_loss_is_said_by_every_rank_until_one_has_recorded_it(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        record_loss("rank 1 is gone", folder, "2026-01-01T00:00:00+00:00")
        assert capsys.readouterr().err == "error: rank 1 is gone\n"
    assert not folder.path.exists(), "a run that has not begun leaves none"
    folder.path.mkdir()
    for said in ("error: rank 1 is gone\n", ""):
        record_loss("rank 1 is gone", folder, "2026-01-01T00:00:00+00:00")
        assert capsys.readouterr().err == said
    assert folder.status()["exit_code"] == 3
    record_loss("rank 2 is gone", folder, "2999-01-01T00:00:00+00:00")
    assert "rank 2" in capsys.readouterr().err, "what an earlier attempt recorded is not of this loss"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stops", [False, True])
def test_a_disk_three_times_slower_than_the_limit_loses_neither_rank_nor_point(tmp_path, stops):
    processes, log = start(tmp_path, f"slow:{3 * LIMIT}:", ranks=3)
    run = tmp_path / "runs" / "tiny"
    if stops:
        faulty.wait_for_step(run, 4, processes)
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
    ended = faulty.ended(processes, log)
    assert ended.codes == [75 if stops else 0] * 3, ended.log
    steps = [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").glob("step-*"))]
    assert all((run / "logs" / f"stacks-{rank}.txt").read_text() == "" for rank in range(3))
    assert Checkpointer(run / "checkpoints").load().step == steps[-1], "the newest is complete"
    paths = sorted((run / "tickets").glob("*.safetensors"))
    tickets = [load_file(path) for path in paths]
    if stops:
        assert steps[-1] == tiny.status(run)["step"], "the last save is waited for"
    else:
        assert "is still being written" in ended.log
        assert len(paths) == 3
        paths[-1].unlink()
        RunFolder(run).write_status("running")  # as if it had been lost after its last save
    again, log = start(tmp_path, "none:0:none", ranks=3)
    assert faulty.ended(again, log).codes == [0, 0, 0], log.read_text()
    assert "resumed at round" in log.read_text()
    assert tiny.status(run)["state"] == "finished"
    for path, ticket in zip(paths, tickets, strict=True):
        assert all(torch.equal(value, ticket[name]) for name, value in load_file(path).items())


# -- who is lost


def beats(**changed: dict) -> list[Beat]:
    return [Beat(rank, f"host{rank}", 100 + rank, **changed.get(f"r{rank}", {})) for rank in range(3)]


QUIET = {0: 0.1, 1: 0.2, 2: 0.3}


def test_nobody_is_lost_while_all_beat_and_move():
    assert verdict(beats(), QUIET, 10) == ""
    assert verdict(beats(r0={"still": 9.9}, r1={"place": 3}), QUIET, 10) == ""


def test_a_silent_rank_is_named_with_its_host_and_place():
    found = verdict(beats(r2={"doing": "forward", "step": 7}), QUIET | {2: 11.0}, 10)
    assert found.startswith("rank 2 on host2 (process 102) has shown no sign of life for 11 s (forward, step 7)")


def test_of_all_that_stand_still_the_one_furthest_behind_is_named():
    waiting = {"still": 12.0, "place": 5}
    assert "rank 1" in verdict(beats(r0=waiting, r1={"still": 12.0, "place": 4}, r2=waiting), QUIET, 10)
    assert "rank 0" not in verdict(beats(r0=waiting, r1={"still": 12.0, "place": 4}, r2=waiting), QUIET, 10)


def test_a_rank_that_waits_in_a_collective_is_not_the_one_that_hangs():
    waits = {"still": 12.0, "waits": True}
    found = verdict(beats(r0=waits, r1={"still": 12.0}, r2=waits), QUIET, 10)
    assert found.startswith("rank 1 ")
    assert "rank 0" not in found
    assert verdict(beats(r0=waits, r1={"still": 3.0}, r2=waits), QUIET, 10) == "", "the others wait for a slow one"


def test_when_all_wait_for_each_other_all_are_named():
    found = verdict(beats(**{f"r{rank}": {"still": 12.0, "waits": True} for rank in range(3)}), QUIET, 10)
    assert [f"rank {rank} " in found for rank in range(3)] == [True] * 3


def test_a_rank_that_failed_is_named_with_its_reason_and_one_that_finished_is_not():
    ended = {"ended": "out of memory", "exit_code": 3}
    assert verdict(beats(r1=ended), QUIET | {1: 6.0}, 10) == "rank 1 on host1 (process 101) ended: out of memory"
    assert verdict(beats(r1={"ended": "finished", "exit_code": 0}), QUIET | {1: 600.0}, 10) == ""


def test_a_rank_that_never_beats_is_lost_too(tmp_path):
    heartbeat = Heartbeat(0, 3, 10.0, tmp_path / "stacks", lambda: None, lambda text: None)
    heartbeat._answered = time.monotonic() + 10
    assert heartbeat._found(time.monotonic() + 9) == ""
    assert "rank 2 on a machine not heard of" in heartbeat._found(time.monotonic() + 11)


def test_a_pause_of_the_whole_job_is_forgiven(tmp_path):
    heartbeat = Heartbeat(0, 3, 10.0, tmp_path / "stacks", lambda: None, lambda text: None)
    heartbeat.step_done(1)
    heartbeat._heard = {beat.rank: (beat, time.monotonic()) for beat in beats()}
    assert heartbeat._found(time.monotonic() + 50)
    heartbeat._forgive(50)
    assert heartbeat._found(time.monotonic() + 50) == ""
    assert heartbeat._still == pytest.approx(-50, abs=1)


def test_nothing_counts_before_the_first_step_or_in_long_work(tmp_path):
    heartbeat = Heartbeat(0, 1, 10.0, tmp_path / "stacks", lambda: None, lambda text: None)
    heartbeat._moved -= 100
    assert heartbeat._still == 0
    heartbeat.step_done(1)
    heartbeat._moved -= 100
    assert heartbeat._still > 99
    with heartbeat.long_work("writing"):
        heartbeat._moved -= 100
        assert heartbeat._still == 0
    assert heartbeat._still < 1


def test_a_collective_is_recognised_by_its_frame():
    assert not is_waiting(None)
    names = {"_sync_buffers": "found"}
    exec("import sys\ndef _sync_buffers(): return sys._getframe()", names)
    assert is_waiting(names["_sync_buffers"]())


def test_the_threads_of_a_run_end_with_it(tmp_path):
    before = set(threading.enumerate())
    assert tiny.command("train", tiny.write_recipe(tmp_path), "train.epochs=1", "train.round_epochs=1") == 0
    assert json.loads((tmp_path / "runs" / "tiny" / "status.json").read_text())["state"] == "finished"
    ours = ("_exchange", "_watch", "_stand_in")
    started = [t for t in set(threading.enumerate()) - before if any(name in t.name for name in ours)]
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)
