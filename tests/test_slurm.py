"""The job scripts, with stand-ins for srun and scontrol: two "machines" are two launchers on this one."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

SRUN = """\
#!/usr/bin/env python3
# Starts the command once for each machine; passes USR1 to all that it started, as SLURM does; ends all when one fails.
import os, pathlib, psutil, signal, subprocess, sys, time
first = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--"))
pathlib.Path(os.environ["SLURM"], "srun").write_text(" ".join(sys.argv[1:]))
tasks = [
    subprocess.Popen(sys.argv[first:], env=os.environ | {"SLURM_NODEID": str(node)})
    for node in range(int(os.environ["SLURM_NNODES"]))
]
def tell(*_):
    for child in psutil.Process().children(recursive=True):
        child.send_signal(signal.SIGUSR1)

signal.signal(signal.SIGUSR1, tell)
while None in (codes := [task.poll() for task in tasks]):
    if any(codes) and "--kill-on-bad-exit=1" in sys.argv:
        time.sleep(20)
        [task.kill() for task in tasks]
    time.sleep(0.1)
sys.exit(max(code % 256 for code in codes))
"""

SCONTROL = """\
#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf '127.0.0.1\\n127.0.0.1\\n' ;;
    requeue*) echo "$2" >>"$SLURM/requeued" ;;
esac
"""


def job_id() -> int:
    """One whose port is free."""
    while True:
        number = random.randrange(10**6)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + number % 10000)):
                return number


class Cluster:
    """A folder with the two programs and one job."""

    def __init__(self, folder: Path):
        self.folder, self.id = folder, job_id()
        self.run = folder / "runs" / "tiny"
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            self.program(name, text)

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, script: str, *arguments: object, nodes: int = 1, **variables: str) -> subprocess.Popen:
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        slurm = {
            "SLURM": str(self.folder),
            "SLURM_SUBMIT_DIR": str(tiny.REPOSITORY),
            "SLURM_NNODES": str(nodes),
            "SLURM_JOB_ID": str(self.id),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "ACCELERATE_USE_CPU": "true",
        }
        command = ["bash", str(tiny.REPOSITORY / "scripts" / "slurm" / script), *map(str, arguments)]
        return subprocess.Popen(
            command, env=tiny.environment(PATH=path, **(slurm | variables)), cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def end(self, job: subprocess.Popen) -> tuple[int, str]:
        try:
            told = job.communicate(timeout=120)[0]
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
        return job.returncode, told

    def signal_at(self, step: int, job: subprocess.Popen) -> None:
        """What SLURM does some time before the job's time is up: USR1 to the tasks of its steps."""
        while not (self.run / "metrics.jsonl").exists() or len(tiny.events(self.run)) < step:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
        children = subprocess.run(
            ["pgrep", "-P", str(job.pid), "-f", "srun"], capture_output=True, text=True, check=True
        )
        os.kill(int(children.stdout.split()[0]), signal.SIGUSR1)

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


STEPS = ("train.steps_per_epoch=30", "train.rank_timeout=20")


@pytest.mark.distributed
@pytest.mark.slow
def test_a_job_on_two_machines_requeues_itself_when_its_time_is_up_and_goes_on(cluster):
    recipe = tiny.write_recipe(cluster.folder)
    job = cluster.start("multi_node.sh", recipe, *STEPS, nodes=2, PROCESSES_PER_NODE="1")
    cluster.signal_at(3, job)
    code, told = cluster.end(job)
    assert code == 75, told
    found = tiny.status(cluster.run)
    assert (found["state"], found["exit_code"]) == ("stopped", 75)
    assert cluster.requeued == [str(cluster.id)]
    asked = (cluster.folder / "srun").read_text()
    assert f"--main_process_ip 127.0.0.1 --main_process_port {20000 + cluster.id % 10000}" in asked
    assert "--num_machines 2 --num_processes 2" in asked

    code, told = cluster.end(cluster.start("multi_node.sh", recipe, *STEPS, nodes=2, PROCESSES_PER_NODE="1"))
    assert code == 0, told
    assert f"step {found['step']} of 180" in told
    assert tiny.status(cluster.run)["state"] == "finished"
    assert json.loads((cluster.run / "environment.json").read_text())["processes"] == 2
    assert len(cluster.requeued) == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_a_job_with_two_processes_on_one_machine_runs_to_its_end(cluster):
    recipe = tiny.write_recipe(cluster.folder)
    code, told = cluster.end(cluster.start("one_node.sh", recipe, PROCESSES_PER_NODE="2"))
    assert code == 0, told
    assert json.loads((cluster.run / "environment.json").read_text())["processes"] == 2
    assert not cluster.requeued


def test_a_job_with_one_process_gets_the_signal_itself(cluster):
    recipe = tiny.write_recipe(cluster.folder)
    job = cluster.start("one_node.sh", recipe, *STEPS)
    cluster.signal_at(3, job)
    code, told = cluster.end(job)
    assert code == 75, told
    assert re.search("stopped (on|by) SIGUSR1", told)
    assert tiny.status(cluster.run)["exit_code"] == 75
    assert cluster.requeued == [str(cluster.id)]


def test_a_wrong_recipe_ends_the_job_before_anything_is_launched(cluster):
    recipe = tiny.write_recipe(cluster.folder)
    code, told = cluster.end(cluster.start("one_node.sh", recipe, "train.epoch=3"))
    assert code == 2
    assert "train.epoch" in told
    assert "Traceback" not in told
    assert not (cluster.folder / "srun").exists()
    assert cluster.end(cluster.start("multi_node.sh"))[0] == 2


def test_a_job_that_fails_before_it_says_anything_is_not_requeued_for_what_an_earlier_one_said(cluster):
    recipe = tiny.write_recipe(cluster.folder)
    cluster.run.mkdir(parents=True)
    (cluster.run / "status.json").write_text('{"state": "stopped", "exit_code": 75}')
    cluster.program("srun", "#!/bin/sh\nexit 7\n")
    assert cluster.end(cluster.start("one_node.sh", recipe))[0] == 7
    assert not cluster.requeued
