"""A real SLURM on this machine: one controller and two nodes, each a `slurmd -N`, as root, in a folder of its own.

Not a test module. Nothing is installed and /etc/hosts is not touched: `lacking` says what is missing.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiny

NODES = ("vit-node1", "vit-node2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")
CONFIGURATION = """\
ClusterName=vit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
JobRequeue=1
ReturnToService=2
KillWait=10
SlurmdTimeout=30
SchedulerParameters=sched_interval=2,batch_sched_delay=0
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str:
    """What this machine lacks; empty when it can run SLURM."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmctld and slurmd start jobs as root alone"
    try:
        for name in NODES:
            socket.gethostbyname(name)
    except OSError:
        return f"the nodes have no address: echo '127.0.0.1 {' '.join(NODES)}' >>/etc/hosts"
    return ""


PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass
class Slurm:
    """A running cluster; every call is a real command of SLURM."""

    folder: Path

    def run(self, *command: object, check: bool = True, **variables: str) -> str:
        environment = tiny.environment(SLURM_CONF=str(self.folder / "slurm.conf"), PATH=PATH, **variables)
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, cwd=tiny.REPOSITORY, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, *arguments: object, options: tuple[str, ...] = (), **variables: str) -> int:
        """Queues a job script of the repository with sbatch; its number."""
        resources = ("--cpus-per-task=1", "--gpus-per-node=0", "--time=20", f"--output={self.folder}/job-%j.out")
        path = tiny.SCRIPTS / "slurm" / script
        told = self.run("sbatch", "--parsable", *resources, *options, path, *arguments, **variables)
        return int(told.strip())

    def job(self, number: int) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, ExitCode, …"""
        words = self.run("scontrol", "--oneliner", "show", "job", number, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, number: int) -> str:
        path = self.folder / f"job-{number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, number: int, *states: str, seconds: float = 240) -> dict[str, str]:
        """Until a job is in one of the states."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number)).get("JobState") not in states:
            assert time.monotonic() < deadline, f"{job}\n{self.log(number)[-3000:]}"
            time.sleep(0.3)
        return job


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Starts the daemons and ends them, with all that they started."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    ports = [free_port() for _ in range(3)]
    nodes = [
        f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={name} Port={port} CPUs=8 RealMemory=1000"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    text = CONFIGURATION.format(
        host=socket.gethostname(), port=ports[0], folder=folder, nodes="\n".join(nodes), names=",".join(NODES)
    )
    (folder / "slurm.conf").write_text(text)
    slurm, environment = Slurm(folder), os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock", f"--key-file={key}"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    commands = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]
    daemons = []
    try:
        for command in commands:
            for name in ("spool-" + command[-1],) if command[0] == "slurmd" else ():
                (folder / name).mkdir(exist_ok=True)
            with open(folder / f"{command[0]}.out", "a") as log:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
            time.sleep(1.0)
        deadline = time.monotonic() + 60
        while slurm.run("sinfo", "--noheader", "--format=%T", check=False).split() != ["idle"]:
            assert time.monotonic() < deadline, slurm.run("sinfo", "--long", "--Node", check=False)
            time.sleep(0.5)
        yield slurm
    finally:
        slurm.run("scancel", "--user=root", check=False)
        time.sleep(1.0)
        for daemon in reversed(daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
