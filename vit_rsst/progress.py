"""Where a run stands: round, epoch, step. The only place that turns epochs and fractions into steps."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Progress:
    """Counts optimizer steps within epochs within rounds.

    Attributes:
        steps_per_epoch: optimizer steps of one epoch, the same on every rank.
        round_epochs: epochs of round 0, 1, …; round 0 may have none when it starts from a trained model.
        round: the round under way.
        epoch: epochs done in this round.
        step: steps done in this epoch.
    """

    steps_per_epoch: int
    round_epochs: tuple[int, ...]
    round: int = 0
    epoch: int = 0
    step: int = 0

    def remaining_rounds(self) -> Iterator[int]:
        """Yields the round under way and those after it, moving on when the caller asks for the next."""
        while self.round < len(self.round_epochs):
            yield self.round
            self.round, self.epoch, self.step = self.round + 1, 0, 0

    def remaining_epochs(self) -> Iterator[int]:
        """Yields the epoch under way in this round and those after it; `advance` moves them on."""
        while self.epoch < self.round_epochs[self.round]:
            yield self.epoch

    def advance(self) -> None:
        """Counts one optimizer step."""
        self.step += 1
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0

    def end_round(self) -> None:
        """Leaves out what remains of the round under way; its steps count as done."""
        self.epoch, self.step = self.round_epochs[self.round], 0

    @property
    def round_steps(self) -> int:
        """Steps of the round under way."""
        return self.round_epochs[self.round] * self.steps_per_epoch

    @property
    def round_step(self) -> int:
        """Steps done in the round under way."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def global_epoch(self) -> int:
        """Epochs done since the run began, the one under way not counted."""
        return sum(self.round_epochs[: self.round]) + self.epoch

    @property
    def global_step(self) -> int:
        """Steps done since the run began."""
        return self.global_epoch * self.steps_per_epoch + self.step

    @property
    def total_epochs(self) -> int:
        return sum(self.round_epochs)

    @property
    def total_steps(self) -> int:
        return self.total_epochs * self.steps_per_epoch

    def state_dict(self) -> dict[str, int]:
        return {"round": self.round, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.round, self.epoch, self.step = state["round"], state["epoch"], state["step"]


def at_fraction(fraction: float, num_steps: int) -> int:
    """Number of steps done at a fraction of `num_steps`, rounded to the nearest."""
    return round(fraction * num_steps)
