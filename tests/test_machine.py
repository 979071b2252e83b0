"""Cores and memory are those of the job: affinity and the limits of its control groups, in both of their versions."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import tiny

from vit_rsst import machine


@pytest.fixture
def group(tmp_path, monkeypatch) -> Callable[[str, dict[str, str]], None]:
    """Puts this process into control groups: the lines of /proc/self/cgroup, and file → content."""

    def put(lines: str, files: dict[str, str]) -> None:
        (tmp_path / "self").write_text(lines)
        for name, text in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(text)
        real = Path.read_text
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda path, *a, **k: real(tmp_path / "self" if str(path) == "/proc/self/cgroup" else path, *a, **k),
        )

    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 << 30}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    return put


V2 = "0::/slurm/job_7/step_0\n"
V1 = "4:cpu,cpuacct:/slurm/job_7\n5:memory:/slurm/job_7\n0::/\n"


def test_without_limits_the_machine_is_the_job(group):
    group("", {})
    assert (machine.cores(), machine.available_memory()) == (16, 100 << 30)


def test_the_smallest_limit_up_to_the_root_counts(group):
    files = {
        "slurm/job_7/memory.max": f"{8 << 30}\n",
        "slurm/job_7/memory.current": f"{3 << 30}\n",
        "slurm/job_7/memory.stat": f"anon 5\ninactive_file {1 << 30}\n",
        "slurm/job_7/step_0/memory.max": "max\n",
        "slurm/job_7/step_0/memory.current": f"{2 << 30}\n",
        "slurm/job_7/cpu.max": "250000 100000\n",
        "slurm/job_7/step_0/cpu.max": "max 100000\n",
    }
    group(V2, files)
    assert machine.available_memory() == 6 << 30, "8 GiB, less 3 in use of which the page cache can give back 1"
    assert machine.cores() == 2


def test_version_1_is_read_too(group):
    files = {
        "memory/slurm/job_7/memory.limit_in_bytes": f"{4 << 30}\n",
        "memory/slurm/job_7/memory.usage_in_bytes": f"{1 << 30}\n",
        "memory/slurm/job_7/memory.stat": "total_inactive_file 0\n",
        "cpu/slurm/job_7/cpu.cfs_quota_us": "400000\n",
        "cpu/slurm/job_7/cpu.cfs_period_us": "100000\n",
    }
    group(V1, files)
    assert (machine.cores(), machine.available_memory()) == (4, 3 << 30)


def test_a_container_whose_group_is_mounted_at_the_root_has_its_limit(group):
    group("0::/docker/abc\n", {"memory.max": "1000\n", "memory.current": "200\n", "cpu.max": "50000 100000\n"})
    assert (machine.cores(), machine.available_memory()) == (1, 800), "half a core is one process's worth"


def test_a_group_beyond_its_limit_has_nothing_left(group):
    group(V2, {"slurm/job_7/memory.max": "100\n", "slurm/job_7/memory.current": "150\n"})
    assert machine.available_memory() == 0


def test_affinity_is_a_limit(group, monkeypatch):
    group("", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert machine.cores() == 2


def test_the_processes_of_a_node_are_those_that_its_launcher_started(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert machine.local_processes(4) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine.local_processes(16) == 2


HELD = """
import psutil, torch
from vit_rsst import machine
if {keeps}:
    machine.keep_freed_memory()
def step():
    kept = [torch.ones(24 * 2**18) for _ in range(8)]  # 24 MiB each
torch.ones(1)
before = psutil.Process().memory_info().rss
step()  # once: glibc takes the second from its heap, of which it returns what lies above the last block in use
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
@pytest.mark.parametrize(
    ("keeps", "variables", "is_held"),
    [
        (False, {}, False),
        (True, {}, True),
        (True, {"MALLOC_TRIM_THRESHOLD_": "65536"}, False),
        (True, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=65536"}, False),
    ],
)
def test_memory_that_a_step_frees_serves_the_next_unless_the_environment_says_otherwise(keeps, variables, is_held):
    done = tiny.python("-c", HELD.format(keeps=keeps), **variables)
    held = int(done.stdout) / (8 * 24 * 2**20)
    assert held > 0.9 if is_held else held < 0.5, done.stderr
