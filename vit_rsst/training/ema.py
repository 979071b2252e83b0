"""Exponential moving average (EMA) of the weights: what is evaluated and saved. Pruned weights are zero in it too."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vit_rsst import shards


class Ema:
    """Exponential moving average of all floating-point parameters and buffers of a model.

    The decay warms up as (1 + t) / (10 + t) over the steps t since the last restart, so that the start of a short round
    does not dominate its average.

    Attributes:
        tensors: the average by name, on the weights' device and sharded like them.
        steps: since the last restart.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        live = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        # Tied weights count once.
        self._live = {name: value for name, value in live.items() if name == _first_name(live, value)}
        self.tensors = {name: value.detach().clone() for name, value in self._live.items()}

    def restart_(self) -> None:
        """Restarts from the current weights."""
        self.steps = 0
        torch._foreach_copy_(*self._pairs())

    @torch.no_grad()
    def update_(self) -> None:
        """Averages in the current weights; skipped steps, which left them unchanged, count too."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(*self._pairs(), 1.0 - decay)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """What this rank holds of the average and of the weights."""
        return shards.locals_of(self.tensors.values()), shards.locals_of(self._live.values())

    @torch.no_grad()
    def follow_(self, unaveraged: Mapping[str, Tensor]) -> None:
        """Copies the current weights where they are not averaged.

        Args:
            unaveraged: weight name → bool tensor of its shape.
        """
        for name, elements in unaveraged.items():
            average, live = shards.local(self.tensors[name]), shards.local(self._live[name])
            torch.where(shards.local(elements), live, average, out=average)

    def zero_(self, removed: Mapping[str, Tensor]) -> None:
        """Zeroes the removed elements (bool, by name)."""
        for name, elements in removed.items():
            shards.local(self.tensors[name]).masked_fill_(shards.local(elements), 0.0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Swaps the average in for the weights inside the context."""
        self._swap_()
        try:
            yield
        finally:
            self._swap_()

    @torch.no_grad()
    def _swap_(self) -> None:
        for average, value in zip(*self._pairs(), strict=True):
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)

    def load_(self, tensors: Mapping[str, shards.Source], steps: int) -> None:
        """Restores an earlier state, from whole tensors."""
        self.steps = steps
        for name, value in self.tensors.items():
            shards.load_(value, tensors[name])


def _first_name(tensors: Mapping[str, Tensor], wanted: Tensor) -> str:
    """First name of those that share memory, compared by storage: `meta` tensors have no data pointer."""
    return next(name for name, tensor in tensors.items() if _memory(tensor) == _memory(wanted))


def _memory(tensor: Tensor) -> tuple[int, int]:
    tensor = shards.local(tensor)
    return tensor.untyped_storage()._cdata, tensor.storage_offset()
