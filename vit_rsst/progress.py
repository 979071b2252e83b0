"""Position in a run: round, epoch, step. The only place that converts epochs and fractions to steps."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Progress:
    """Counts optimizer steps within epochs within rounds.

    Attributes:
        steps_per_epoch: optimizer steps per epoch, the same on every rank.
        round_epochs: epochs of round 0, 1, …; 0 for round 0 if it starts from a trained model.
        round: index of the current round.
        epoch: epochs completed in this round.
        step: steps completed in this epoch.
    """

    steps_per_epoch: int
    round_epochs: tuple[int, ...]
    round: int = 0
    epoch: int = 0
    step: int = 0

    def remaining_rounds(self) -> Iterator[int]:
        """Yields the current and all later rounds; advances when the caller asks for the next one."""
        while self.round < len(self.round_epochs):
            yield self.round
            self.round, self.epoch, self.step = self.round + 1, 0, 0

    def remaining_epochs(self) -> Iterator[int]:
        """Yields the current and all later epochs of this round; the caller moves on with `advance`."""
        while self.epoch < self.round_epochs[self.round]:
            yield self.epoch

    def advance(self) -> None:
        """Counts one optimizer step."""
        self.step += 1
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0

    def end_round(self) -> None:
        """Skips the rest of the current round; its steps count as done."""
        self.epoch, self.step = self.round_epochs[self.round], 0

    @property
    def round_steps(self) -> int:
        """Steps in the current round."""
        return self.round_epochs[self.round] * self.steps_per_epoch

    @property
    def round_step(self) -> int:
        """Steps completed in the current round."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def global_epoch(self) -> int:
        """Epochs completed since the start of the run."""
        return sum(self.round_epochs[: self.round]) + self.epoch

    @property
    def global_step(self) -> int:
        """Steps completed since the start of the run."""
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
    """Number of steps at a fraction of `num_steps`, rounded to nearest."""
    return round(fraction * num_steps)
