"""A clean stop: a signal or a time limit sets a flag, all ranks agree on it at the same step, and the loop leaves a
resume point."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vit_rsst.errors import Stopped

AGREE_EVERY, AGREE_SECONDS = 10, 10.0
"""Most steps and about most seconds between two agreements of several ranks; each costs one tiny all-reduce."""
PATIENCE = 5.0
"""Seconds that the main thread has to answer a signal before it counts as blocked."""

LAUNCHED = "ACCELERATE_MIXED_PRECISION"
"""Set by `accelerate launch` alone; without a launcher, a parent that ends is no reason to stop (nohup)."""
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class StopFlag:
    """Why the run should stop, once it should.

    Attributes:
        reason: empty until the run should stop.
        deadline: `time.monotonic` at which time is up; None for no limit.
        is_training: until then there is nothing to save, and a signal stops the preparations at once.
        when_blocked: called with a signal's name, in another thread, when the main thread does not answer it: it waits
            in C, as in a collective, where Python handles no signal.

    A second SIGINT ends the process at once. `accelerate launch` with one process does not forward SIGTERM and leaves
    the trainer orphaned, so a launcher that is gone counts as SIGTERM.
    """

    reason: str = ""
    deadline: float | None = None
    is_training: bool = False
    when_blocked: Callable[[str], None] = lambda name: None
    _launcher: int | None = field(default_factory=lambda: os.getppid() if LAUNCHED in os.environ else None)
    _pipe: tuple[int, int] | None = None
    _agreed_at: tuple[int, float] | None = None
    _agree_at: int = 0

    def install(self) -> None:
        """Handles SIGTERM, SIGINT and SIGUSR1; imports nothing heavy, so that it can come first."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._stand_in, args=(self._pipe[0],), daemon=True).start()
        for number in NUMBERS:
            signal.signal(number, self._on_signal)

    def close(self) -> None:
        """Ends the thread that stands in for the main one."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])
            self._pipe = None

    def _on_signal(self, number: int, frame: object) -> None:
        if self.reason:  # SLURM and the launcher each send one, and the first is being answered
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.reason = signal.Signals(number).name
        if not self.is_training:
            raise Stopped(before_first_step(self.reason))

    def _stand_in(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            time.sleep(PATIENCE)
            asked = [number for number in numbers if number in NUMBERS]
            if asked and not self.reason and self._pipe is not None:
                self.when_blocked(signal.Signals(asked[0]).name)
        os.close(pipe)

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop."""
        if not self.reason and self._launcher not in (None, os.getppid()):
            self.reason = "loss of the launcher"
        if not self.reason and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = "train.max_minutes"
        return bool(self.reason)

    def agreed(self, step: int) -> bool:
        """Whether any rank was asked to stop; collective, with the same answer on every rank."""
        import torch
        from accelerate import PartialState
        from accelerate.utils import reduce

        asked, state = self.is_asked(), PartialState()
        if state.num_processes == 1:
            return asked
        if step < self._agree_at:
            return False
        now = time.monotonic()
        last_step, last = self._agreed_at or (step - 1, now - AGREE_SECONDS)
        mine = [float(asked), (now - last) / max(step - last_step, 1) / state.num_processes]
        ranks_asked, seconds = reduce(torch.tensor(mine, device=state.device), "sum").tolist()
        # The same sums on every rank, and so the same step.
        self._agreed_at, self._agree_at = (step, now), step + next_agreement(seconds)
        if ranks_asked and not asked:
            self.reason = "a request on another rank"
        return bool(ranks_asked)


def next_agreement(seconds: float) -> int:
    """Steps until the ranks agree again, when a step takes so long."""
    return max(min(AGREE_EVERY, int(AGREE_SECONDS / max(seconds, 1e-9))), 1)


def before_first_step(reason: str) -> str:
    return f"stopped by {reason} before the first step; run the same command to start again."
