"""Ranks that die or hang: the others end, the stacks of a rank that stands still are written down."""

import datetime
import faulthandler
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

PREPARATION = datetime.timedelta(hours=2)
"""How long a rank waits for another before the first step: one of them may be preparing the data for all."""

SIGNS = ("gloo", "nccl", "process group", "processgroup", "connection closed by peer", "timed out waiting")
"""What torch writes, in lower case, when a collective fails because another rank is gone."""


def limit_waiting(seconds: float) -> None:
    """From now on, a collective that waits longer than this for another rank fails."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds))


def is_of_a_lost_rank(error: BaseException) -> bool:
    """Whether an error means that another rank died or hangs."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@dataclass
class Watchdog:
    """Writes the stacks of all threads to a file when the loop stands still, so that a hang can be understood.

    Attributes:
        path: of the file; it is empty as long as all is well.
        seconds: without a beat.
    """

    path: Path
    seconds: float
    _file: TextIO | None = None

    def beat(self) -> None:
        """Says that the loop moves."""
        if self._file is None:
            with suppress(OSError):
                self._file = self.path.open("w", encoding="utf-8")
        if self._file is not None:
            faulthandler.dump_traceback_later(self.seconds, file=self._file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None
