"""A clean stop: a signal or a time limit sets a flag, all ranks agree on it at the same step, and the loop leaves a
resume point."""

import os
import signal
import time
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from vit_rsst.errors import Stopped

AGREE_EVERY = 10
"""Steps between two agreements with several ranks; each costs one tiny all-reduce."""


LAUNCHED = "ACCELERATE_MIXED_PRECISION"
"""Set by `accelerate launch` alone; without a launcher, a parent that ends is no reason to stop (nohup)."""


@dataclass
class StopFlag:
    """Why the run should stop, once it should.

    Attributes:
        reason: empty until the run should stop.
        deadline: `time.monotonic` at which time is up; None for no limit.
        is_training: until then there is nothing to save, and a signal stops the preparations at once.

    A second SIGINT ends the process at once. `accelerate launch` with one process does not forward SIGTERM and leaves
    the trainer orphaned, so a launcher that is gone counts as SIGTERM.
    """

    reason: str = ""
    deadline: float | None = None
    is_training: bool = False
    _launcher: int | None = field(default_factory=lambda: os.getppid() if LAUNCHED in os.environ else None)

    def install(self) -> None:
        """Handles SIGTERM, SIGINT and SIGUSR1."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        if not self.is_training:
            raise Stopped(f"stopped by {self.reason} before the first step; run the same command to start again.")

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop."""
        if not self.reason and self._launcher not in (None, os.getppid()):
            self.reason = "the launcher is gone"
        if not self.reason and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = "train.max_minutes"
        return bool(self.reason)

    def agreed(self, step: int) -> bool:
        """Whether any rank was asked to stop; collective, with the same answer on every rank."""
        asked, state = self.is_asked(), PartialState()
        if state.num_processes == 1:
            return asked
        if step % AGREE_EVERY:
            return False
        agreed = bool(reduce(torch.tensor(float(asked), device=state.device), "sum"))
        if agreed and not asked:
            self.reason = "another rank was asked to stop"
        return agreed
