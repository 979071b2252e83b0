"""Losses and gradient norms copied from the device one logging interval late, so that no step waits for them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """The numbers of one step.

    Attributes:
        step: optimizer steps so far, including this one.
        place: its round, epoch and step.
        metrics: host-side metrics if the step is to be logged; None: it is not.
        loss, grad_norm: `grad_norm` is NaN or infinite if the step was skipped.
    """

    step: int
    place: Mapping[str, int]
    metrics: Mapping[str, float] | None
    loss: float = math.nan
    grad_norm: float = math.nan

    @property
    def was_skipped(self) -> bool:
        return not math.isfinite(self.grad_norm)


@dataclass
class Readings:
    """Buffers the numbers of steps until they are on the host.

    `turn` ends an interval: it starts copying its numbers and returns those of the previous interval, whose copy is
    complete by then. `flush` waits for all.
    """

    _open: list[tuple[Reading, Tensor, Tensor]] = field(default_factory=list)
    _copied: list[Reading] = field(default_factory=list)
    _host: Tensor | None = None
    _arrived: torch.cuda.Event | None = None
    last_loss: float = math.nan

    def note(self, reading: Reading, loss: Tensor, grad_norm: Tensor) -> None:
        """Adds a step's numbers, which stay on the device."""
        self._open.append((reading, loss, grad_norm))

    def turn(self) -> list[Reading]:
        """The steps of the previous interval, in order."""
        found = self._read()
        if self._open:
            numbers = torch.stack([number for _, *pair in self._open for number in pair]).float().view(-1, 2)
            self._copied = [reading for reading, _, _ in self._open]
            self._open.clear()
            if numbers.device.type == "cuda":
                self._host = torch.empty(numbers.shape, pin_memory=True)
                self._host.copy_(numbers, non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record()
            else:
                self._host = numbers
        return found

    def flush(self) -> list[Reading]:
        """All steps noted so far, in order."""
        return self.turn() + self._read()

    def _read(self) -> list[Reading]:
        if self._host is None:
            return []
        if self._arrived is not None:
            self._arrived.synchronize()
        rows, self._host, self._arrived = self._host.tolist(), None, None
        self.last_loss = rows[-1][0]
        return [
            Reading(reading.step, reading.place, reading.metrics, loss, norm)
            for reading, (loss, norm) in zip(self._copied, rows, strict=True)
        ]
