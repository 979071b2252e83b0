"""How long saving a resume point of vit_base blocks the loop, and how much the writer thread slows it down.

Weights and both moments of AdamW, one gigabyte, are saved with `Checkpointer.save` and, for comparison, with a plain
`safetensors.torch.save_file`, which neither hashes nor syncs to disk. The loop is blocked only while tensors are copied
to host memory. While the thread hashes, writes and syncs, steps of a small model continue and are timed.

Both alternate in one process, in random order; a ratio compares the two within one alternation. Its median and 95 %
interval are printed; the bound is missed if the whole interval is above it.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import torch
from _common import environment, interval, parse_args, report, show_progress
from safetensors.torch import save_file

from vit_rsst.models import zoo
from vit_rsst.run.checkpoint import Checkpointer, ResumePoint
from vit_rsst.training import optim

HOLD_BOUND = 1.5
"""Time that a save blocks the loop, relative to a plain save_file of the same bytes."""
MEMORY_BOUND = 1.1
"""Peak memory of a save, relative to the size of the resume point: one copy."""

ALTERNATIONS, QUICK_ALTERNATIONS, WARMUPS = 10, 2, 1


def make_point() -> ResumePoint:
    """The resume point of a vit_base run after one AdamW step."""
    torch.manual_seed(0)
    net = zoo.create(*zoo.describe("vit_base", {}, 100))
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return ResumePoint(1, {"model": net.state_dict(), "optimizer": optim.state_tensors(optimizer, names)}, {})


def make_step() -> Callable[[], None]:
    """A training step of a few milliseconds."""
    net = zoo.create(*zoo.describe("vit_tiny", {"depth": 2}, 10))
    optimizer, images = torch.optim.SGD(net.parameters(), lr=1e-3), torch.randn(8, 3, 32, 32)

    def step() -> None:
        net(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class PeakMemory:
    """Peak increase in this process's memory inside the context, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self.extra, self._ended = 0, threading.Event()
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.extra = max(self.extra, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def measure_save(point: ResumePoint, folder: Path, step: Callable[[], None]) -> dict[str, float]:
    """Seconds that the loop was blocked, of the whole save, and of concurrent steps (median and longest)."""
    checkpointer, begin = Checkpointer(folder, keep=1), time.perf_counter()
    held = timed(lambda: checkpointer.save(point))
    steps = []
    while checkpointer.is_busy:
        steps.append(timed(step))
    checkpointer.wait()
    return {
        "held": held,
        "whole": time.perf_counter() - begin,
        "step": float(np.median(steps)),
        "longest_step": max(steps),
    }


def measure(point: ResumePoint, num_alternations: int, folder: Path) -> list[dict[str, float]]:
    """One record per alternation."""
    step, rng, records = make_step(), np.random.default_rng(0), []
    tensors = {f"{part}/{name}": t for part, all_of in point.tensors.items() for name, t in all_of.items()}
    for number in range(WARMUPS + num_alternations):
        record = {"quiet_step": float(np.median([timed(step) for _ in range(30)]))}
        for name in rng.permutation(["plain", "ours"]):
            if name == "plain":
                record["plain"] = timed(lambda: save_file(tensors, folder / "plain.safetensors"))
            else:
                record |= measure_save(point, folder / "ours", step)
        if number >= WARMUPS:
            records.append(record)
        show_progress(f"{number + 1}/{WARMUPS + num_alternations} alternations")
    return records


def main() -> int:
    args = parse_args(__doc__)
    point = make_point()
    num_bytes = sum(t.numel() * t.element_size() for part in point.tensors.values() for t in part.values())
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # /tmp may be memory
        with PeakMemory() as memory:  # first, since later saves reuse memory held by the allocator
            measure_save(point, Path(name) / "ours", lambda: time.sleep(0.01))
        records = measure(point, QUICK_ALTERNATIONS if args.quick else ALTERNATIONS, Path(name))
    series = {key: np.array([record[key] for record in records]) for key in records[0]}
    held, slowed = interval(series["held"] / series["plain"]), interval(series["step"] / series["quiet_step"])
    copies = memory.extra / num_bytes
    missed = []
    if held.exceeds(HOLD_BOUND):
        missed.append(f"a save blocks the loop for {held} times a plain save_file, bound {HOLD_BOUND}")
    if copies > MEMORY_BOUND:
        missed.append(f"a save takes {copies:.2f} times the size of the resume point, bound {MEMORY_BOUND}")
    result = {
        "environment": environment(torch.device("cpu")),
        "bytes": num_bytes,
        "alternations": len(records),
        "seconds": {key: round(float(np.median(values)), 4) for key, values in series.items()},
        "held_to_plain": asdict(held),
        "step_while_writing_to_quiet": asdict(slowed),
        "copies_in_memory": round(copies, 3),
        "missed": missed,
    }
    seconds = {key: f"{float(np.median(values)):.3f}" for key, values in series.items()}
    rows = [
        ("plain save_file", seconds["plain"], "1", ""),
        ("loop blocked", seconds["held"], str(held), str(HOLD_BOUND)),
        ("whole save, in the thread", seconds["whole"], str(interval(series["whole"] / series["plain"])), ""),
        ("step during a save, to one without", seconds["step"], str(slowed), ""),
        ("longest step during a save", f"{series['longest_step'].max():.3f}", "", ""),
        ("memory, in copies of the resume point", "", f"{copies:.3f}", str(MEMORY_BOUND)),
    ]
    headers = (f"saving, {num_bytes / 2**30:.2f} GiB", "seconds", "ratio  [95 %]", "bound")
    return report(args, result, headers, rows)


if __name__ == "__main__":
    sys.exit(main())
