"""Cores and memory of the job, not of the machine: affinity and the limits of its control groups (cgroup v1 and v2)."""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_IN_HEAP = -1, -3, 32 * 2**20
"""Options of glibc's mallopt, and the largest value of the second."""


def cores() -> int:
    """Cores that this process may use: its affinity, less where a control group has a quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for group in groups("cpu") if (quota := _quota(group)) is not None]
    return max(min([allowed, *(int(quota) for quota in quotas)]), 1)


def available_memory() -> int:
    """Bytes that this process may still take: what the machine has free, less where a control group has a limit."""
    left = [_left(group) for group in groups("memory")]
    return max(min([psutil.virtual_memory().available, *(number for number in left if number is not None)]), 0)


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory that a training step on the CPU frees for the next one.

    By itself it gives the end of its heap back when about 64 MiB there are free, often several times a step, and the
    kernel has to clear every page again: up to 15 % of a step of a small ViT. Nothing happens with another allocator,
    or where the environment configures glibc's.
    """
    configured = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_"}
    if not sys.platform.startswith("linux") or configured & os.environ.keys():
        return
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)


def local_processes(world: int) -> int:
    """Processes of the run on this machine, which share its cores and memory.

    Args:
        world: processes of the run, taken for those of this machine where no launcher says otherwise.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own up to the root; none without them."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:  # `0::/path` is v2, `4:memory:/path` is v1
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        folder = root / path.lstrip("/")
        # A container sees its own group at the root, though the line may name the path on the host.
        for group in (folder, *folder.parents):
            if group.is_dir():
                yield group
            if group == root:
                break


def _quota(group: Path) -> float | None:
    """Cores' worth of time that a group gets."""
    if (found := _words(group / "cpu.max")) and found[0] != "max":
        return float(found[0]) / float(found[1])
    quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
    return float(quota[0]) / float(period[0]) if quota and period and float(quota[0]) > 0 else None


def _left(group: Path) -> int | None:
    """Bytes below the limit of a group; what the page cache could give back counts as free."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, used = _words(group / limit), _words(group / usage)
        if most and used and most[0].isdigit():
            words = _words(group / "memory.stat")
            stat = dict(zip(words[::2], words[1::2], strict=False))
            return int(most[0]) - int(used[0]) + int(stat.get(cache, 0))
    return None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:
        return []
