"""Runs trainers in parallel: each an ordinary run in its own process, all stopped cleanly together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vit_rsst import machine
from vit_rsst.errors import Stopped

POLL = 0.2
"""Seconds between two polls of the trainers."""


class Planned(Protocol):
    """A run that can be started."""

    name: str
    file: Path
    overrides: tuple[str, ...]
    folder: Path
    after: "Planned | None"
    is_finished: bool


def command(run: Planned) -> list[str]:
    return [sys.executable, "-m", "vit_rsst.train", str(run.file), *run.overrides]


@dataclass
class Crew:
    """The running trainers.

    Attributes:
        jobs: how many at a time.
        signal: the signal to stop; None so far.
        stopping: names of runs asked to save a resume point and exit.
        failed: run name → why it did not finish.
    """

    jobs: int = 1
    signal: int | None = None
    running: dict[str, tuple[Planned, subprocess.Popen]] = field(default_factory=dict)
    stopping: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)

    def train(
        self,
        runs: Sequence[Planned],
        notify: Callable[[Planned, str], None],
        is_enough: Callable[[Planned], bool] = lambda run: False,
    ) -> None:
        """Trains every unfinished run; a failing run does not stop the others.

        Args:
            notify: called with a run and `started`, `finished`, or why it failed.
            is_enough: polled for each running run; True stops it with a resume point.

        Raises:
            Stopped: on SIGTERM or SIGINT, once all trainers have saved their resume points.
        """
        waiting = [run for run in runs if not run.is_finished]
        with self._signals():
            while (waiting and self.signal is None) or self.running:
                while (run := self._next(waiting)) is not None:
                    waiting.remove(run)
                    self.start(run)
                    notify(run, "started")
                time.sleep(POLL)
                self._stop_enough(is_enough)
                for run in (*self._ended(), *self._orphans(waiting)):
                    notify(run, self.failed.get(run.name, "finished"))
        if self.signal is not None:
            raise Stopped(f"stopped by {signal.Signals(self.signal).name}; run the same command to resume.")

    def _next(self, waiting: Sequence[Planned]) -> Planned | None:
        """The first run that may start now."""
        if len(self.running) == self.jobs or self.signal is not None:
            return None
        return next((run for run in waiting if run.after is None or run.after.is_finished), None)

    def _stop_enough(self, is_enough: Callable[[Planned], bool]) -> None:
        """Asks trainers to save a resume point and exit; once each, since a second signal would cut that short."""
        for name, (run, process) in self.running.items():
            if name not in self.stopping and (self.signal is not None or is_enough(run)):
                self.stopping.add(name)
                process.terminate()

    def _ended(self) -> list[Planned]:
        found = [(run, process) for run, process in self.running.values() if process.poll() is not None]
        for run, process in found:
            del self.running[run.name]
            if process.returncode != 0 or not run.is_finished:
                self.failed[run.name] = reason(run, process.returncode)
        return [run for run, _ in found]

    def _orphans(self, waiting: list[Planned]) -> list[Planned]:
        """Drops runs that depend on one that did not finish."""
        found = [run for run in waiting if run.after is not None and run.after.name in self.failed]
        for run in found:
            waiting.remove(run)
            self.failed[run.name] = f"not started: it starts from {run.after.name}, which did not finish"
        return found

    def start(self, run: Planned) -> None:
        """Starts a trainer in its own process group: Ctrl-C reaches it once, through this process."""
        path = output_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(machine.cores() // self.jobs, 1))
        with open(path, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                command(run), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": threads}, start_new_session=True,
            )  # fmt: skip
        self.running[run.name] = (run, process)

    def _on_signal(self, number: int, frame: object) -> None:
        self.signal = number  # a trainer may be starting right now: the loop stops them all

    @contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self._on_signal) for number in numbers]
        try:
            yield
        finally:
            for _, process in self.running.values():  # after an error here: leave no trainer behind
                process.terminate()
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def output_path(run: Planned) -> Path:
    """A trainer's log: beside the run folders, since a rejected run has none."""
    return run.folder.parent / "output" / f"{run.name}.txt"


def reason(run: Planned, code: int) -> str:
    """Why a trainer exited without finishing, according to its log."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; see {output_path(run)}"
    lines = [line.strip() for line in output_path(run).read_text("utf-8", "replace").splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")
    return f"{last.removeprefix('error: ')} (exit code {code})"
