"""A clean stop: signals set a flag, all ranks agree on it at the same step, the loop leaves with a resume point."""

import os
import signal
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import reduce

AGREE_EVERY = 10
"""Steps between two agreements when there are several ranks; each costs one tiny all-reduce."""


@dataclass
class StopFlag:
    """Why the run should stop, once it should.

    A second SIGINT ends the process at once. `accelerate launch` with one process does not pass SIGTERM on and leaves
    the trainer orphaned, so that a parent that is gone counts as SIGTERM.
    """

    reason: str = ""
    _parent: int = field(default_factory=os.getppid)

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
        if not self.reason and os.getppid() != self._parent:
            self.reason = "the launcher is gone"
        state = PartialState()
        if state.num_processes == 1:
            return bool(self.reason)
        if step % AGREE_EVERY:
            return False
        asked = bool(reduce(torch.tensor(float(bool(self.reason)), device=state.device), "sum"))
        if asked and not self.reason:
            self.reason = "another rank was asked to stop"
        return asked
