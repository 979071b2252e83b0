"""The best epoch of a round: its accuracy, optionally its weights, and the epochs since."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Best:
    """Tracks validation accuracy over the epochs of a round, after its last removal.

    Attributes:
        patience: epochs without improvement after which to end the round; None: never.
        keeps: whether to keep the weights of the best epoch.
        top1: of the best epoch, in percent; −inf before the first.
        waited: epochs since the best.
        ended_after: epochs after which the round was ended early; None: it was not.
        weights: of the best epoch, on the host.
    """

    patience: int | None = None
    keeps: bool = False
    top1: float = -math.inf
    waited: int = 0
    ended_after: int | None = None
    weights: Mapping[str, Tensor] | None = None

    def restart(self) -> None:
        """Resets for a new round."""
        self.top1, self.waited, self.ended_after, self.weights = -math.inf, 0, None, None

    def note(self, top1: float, epoch: int, weights: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Counts one epoch; returns whether patience has run out.

        Args:
            epoch: epochs completed in the round.
            weights: returns a copy of the weights; called if this epoch is the best and its weights are kept.
        """
        if top1 > self.top1:
            self.top1, self.waited = top1, 0
            self.weights = weights() if self.keeps else None
        else:
            self.waited += 1
        if self.patience is None or self.waited < self.patience:
            return False
        self.ended_after = epoch
        return True

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and plain numbers."""
        top1 = self.top1 if math.isfinite(self.top1) else None
        return dict(self.weights or {}), {"top1": top1, "waited": self.waited, "ended_after": self.ended_after}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        """Inverse of `state_dict`."""
        self.top1 = -math.inf if numbers["top1"] is None else numbers["top1"]
        self.waited, self.ended_after, self.weights = numbers["waited"], numbers["ended_after"], tensors or None
