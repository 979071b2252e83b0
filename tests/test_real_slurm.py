"""Jobs under a real SLURM, whose daemons the tests start: signals at awkward moments, lost nodes, requeueing.

They need slurm-wlm and munge, root, and two names in /etc/hosts; `real_slurm.lacking` says which is missing.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import real_slurm
import tiny
from real_slurm import Slurm
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(bool(real_slurm.lacking()), reason=f"no SLURM here: {real_slurm.lacking()}"),
]

PLUGIN = """\
import os, time
from pathlib import Path
from vit_rsst import loop
from vit_rsst.assembly import data, parts
from vit_rsst.run import checkpoint

place, flag = os.environ.get("PLACE", ""), Path(os.environ.get("FLAG", "/nonexistent/flag"))
data.EVALUATION_BATCH = 20


def pause(here):
    if here == place and os.environ.get("RANK", "0") == "0" and not flag.exists():
        flag.write_text("here")  # the test now sends its signal
        time.sleep(6)


def before(owner, name, where):
    function = getattr(owner, name)

    def paused(*arguments, **options):
        pause(where(*arguments) if callable(where) else where)
        return function(*arguments, **options)

    setattr(owner, name, paused)


evaluation_batches = data.evaluation_batches

def batches(*samples, **options):
    for batch in evaluation_batches(*samples, **options):
        pause("evaluation")
        yield batch

data.evaluation_batches = batches
before(parts, "build_model", "start")
before(loop, "train_step", lambda run, _: f"step {run.progress.global_step}")
before(checkpoint, "_write_files", "save")
"""
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    with real_slurm.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def write_recipe(folder: Path) -> Path:
    (folder / "pauses.py").write_text(PLUGIN, encoding="utf-8")
    text = tiny.RECIPE.replace("steps_per_epoch: 3", "steps_per_epoch: 20, save_every_steps: 7, rank_timeout: 60")
    return tiny.write_recipe(folder, f"{text}plugins: [pauses]\n")


def submit(slurm: Slurm, recipe: Path, nodes: int, place: str = "") -> int:
    options = (f"--nodes={nodes}", "--signal=USR1@180")
    path = os.pathsep.join((str(recipe.parent), str(tiny.REPOSITORY)))
    variables = {"PLACE": place, "FLAG": str(recipe.parent / "flag"), "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
    script = "one_node.sh" if nodes == 1 else "multi_node.sh"
    return slurm.submit(script, recipe, options=options, PROCESSES_PER_NODE="1", **variables)


def wait_for(path: Path, slurm: Slurm, job: int, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, slurm.log(job)
        time.sleep(0.05)


def is_interpreter(words: list[str] | None, recipe: Path) -> bool:
    """Whether a command line is that of a trainer of this recipe or its launcher, not of the shell around it."""
    return bool(words) and "python" in words[0] and "vit_rsst.train" in words and str(recipe) in words


def tickets(recipe: Path) -> dict[str, dict[str, bytes]]:
    paths = sorted((recipe.parent / "runs" / "tiny" / "tickets").glob("*.safetensors"))
    return {path.name: {name: t.numpy().tobytes() for name, t in load_file(path).items()} for path in paths}


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory) -> dict[int, dict]:
    """Number of nodes → tickets of a job that nothing disturbs."""
    found = {}
    for nodes in (1, 2):
        recipe = write_recipe(tmp_path_factory.mktemp(f"undisturbed{nodes}"))
        job = submit(slurm, recipe, nodes)
        assert slurm.wait(job, *ENDS)["JobState"] == "COMPLETED", slurm.log(job)
        found[nodes] = tickets(recipe)
        assert len(found[nodes]) == 3
    return found


def check_finished(slurm: Slurm, job: int, recipe: Path, expected: dict, restarts: int) -> None:
    found = slurm.wait(job, *ENDS)
    assert found["JobState"] == "COMPLETED", slurm.log(job)
    assert int(found["Restarts"]) == restarts
    assert tiny.status(recipe.parent / "runs" / "tiny")["state"] == "finished"
    assert tickets(recipe) == expected


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("place", ["launch", "start", "step 31", "evaluation", "save"])
def test_usr1_requeues_the_job_until_the_run_is_finished(slurm, undisturbed, tmp_path, nodes, place):
    recipe = write_recipe(tmp_path)
    job = submit(slurm, recipe, nodes, place)
    if place == "launch":  # the interpreters are starting, and no handler is installed
        slurm.wait(job, "RUNNING")
        while not any(is_interpreter(process.info["cmdline"], recipe) for process in psutil.process_iter(["cmdline"])):
            time.sleep(0.02)
    else:
        wait_for(tmp_path / "flag", slurm, job)
    slurm.run("scancel", "--signal=USR1", job)
    check_finished(slurm, job, recipe, undisturbed[nodes], restarts=1)
    assert "stopped cleanly; requeueing" in slurm.log(job)


@pytest.mark.parametrize("nodes", [1, 2])
def test_scancel_ends_a_job_for_good_and_the_same_command_resumes(slurm, undisturbed, tmp_path, nodes):
    recipe = write_recipe(tmp_path)
    job = submit(slurm, recipe, nodes, "step 31")
    wait_for(tmp_path / "flag", slurm, job)
    slurm.run("scancel", job)
    assert slurm.wait(job, *ENDS)["JobState"] == "CANCELLED"
    again = submit(slurm, recipe, nodes)
    check_finished(slurm, again, recipe, undisturbed[nodes], restarts=0)
    assert "resumed at round" in slurm.log(again)


def test_a_node_that_fails_requeues_the_job_which_resumes(slurm, undisturbed, tmp_path):
    recipe = write_recipe(tmp_path)
    job = submit(slurm, recipe, 2, "step 31")
    wait_for(tmp_path / "flag", slurm, job)
    lost = real_slurm.NODES[1]
    slurm.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    time.sleep(2)
    slurm.run("scontrol", "update", f"nodename={lost}", "state=resume", check=False)  # it may have returned by itself
    check_finished(slurm, job, recipe, undisturbed[2], restarts=1)
    assert "resumed at round" in slurm.log(job)


def test_a_step_daemon_that_is_killed_ends_the_job_and_the_same_command_resumes(slurm, undisturbed, tmp_path):
    recipe = write_recipe(tmp_path)
    job = submit(slurm, recipe, 2, "step 31")
    wait_for(tmp_path / "flag", slurm, job)
    steps = [p for p in psutil.process_iter(["cmdline"]) if f"[{job}.0]" in " ".join(p.info["cmdline"] or ())]
    assert steps, "slurmstepd shows the step in its title"
    steps[-1].send_signal(signal.SIGKILL)
    found = slurm.wait(job, *ENDS, "PENDING", seconds=480)  # srun waits five minutes for the node without a daemon
    if found["JobState"] == "PENDING":
        check_finished(slurm, job, recipe, undisturbed[2], restarts=1)
    else:
        job = submit(slurm, recipe, 2)
        check_finished(slurm, job, recipe, undisturbed[2], restarts=0)
    assert "resumed at round" in slurm.log(job)
