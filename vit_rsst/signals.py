"""A clean stop: a signal or a time limit sets a flag, all ranks agree on it at the same step, the loop leaves with a
resume point."""

import os
import signal
import time
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import reduce

AGREE_EVERY = 10
"""Steps between two agreements when there are several ranks; each costs one tiny all-reduce."""


LAUNCHED = "ACCELERATE_MIXED_PRECISION"
"""Set by `accelerate launch` and by nothing else here; without a launcher, a parent that ends means nothing (nohup)."""


@dataclass
class StopFlag:
    """Why the run should stop, once it should.

    Attributes:
        reason: empty until then.
        deadline: of `time.monotonic`, when the time is up; None: it never is.

    A second SIGINT ends the process at once. `accelerate launch` with one process does not pass SIGTERM on and leaves
    the trainer orphaned, so that a launcher that is gone counts as SIGTERM.
    """

    reason: str = ""
    deadline: float | None = None
    _launcher: int | None = field(default_factory=lambda: os.getppid() if LAUNCHED in os.environ else None)

    def install(self) -> None:
        """Takes over SIGTERM, SIGINT and SIGUSR1."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def agreed(self, step: int) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank, so it is collective."""
        if not self.reason and self._launcher not in (None, os.getppid()):
            self.reason = "the launcher is gone"
        if not self.reason and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = "train.max_minutes"
        state = PartialState()
        if state.num_processes == 1:
            return bool(self.reason)
        if step % AGREE_EVERY:
            return False
        asked = bool(reduce(torch.tensor(float(bool(self.reason)), device=state.device), "sum"))
        if asked and not self.reason:
            self.reason = "another rank was asked to stop"
        return asked
