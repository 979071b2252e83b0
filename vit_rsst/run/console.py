"""What the user sees during a run: a progress bar on a terminal, plain lines in a log file."""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tqdm import tqdm

from vit_rsst.progress import Progress
from vit_rsst.text import duration
from vit_rsst.tickets.rounds import RoundRow, table


@dataclass
class Console:
    """Prints on the main process; silent on all others.

    Attributes:
        is_main: whether this process prints.
        progress: position of the run.
        images_per_step: the global batch, for throughput.
    """

    is_main: bool
    progress: Progress
    images_per_step: int
    _bar: tqdm | None = None
    _began: float = field(default_factory=time.monotonic)
    _steps: int = 0
    _last_line: float = 0.0

    def line(self, text: str) -> None:
        """Prints one event, above the progress bar if there is one."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def step(self, loss: float) -> None:
        """Moves the bar after an optimizer step; without a terminal, prints a line a minute.

        Args:
            loss: the last one that was read; NaN before there is one.
        """
        if not self.is_main:
            return
        p = self.progress
        if self._bar is None:
            self._began = time.monotonic()
            hidden = not sys.stderr.isatty()
            self._bar = tqdm(total=p.total_steps, initial=p.global_step - 1, unit="step", leave=False, disable=hidden)
        self._steps += 1
        rate = self.images_per_second
        shown = "" if math.isnan(loss) else f"loss {loss:.3f}, "
        if not self._bar.disable:
            self._bar.set_description(f"round {p.round}/{len(p.round_epochs) - 1} epoch {p.epoch}", refresh=False)
            self._bar.set_postfix_str(f"{shown}{rate:,.0f} images/s", refresh=False)
            self._bar.update(p.global_step - self._bar.n)  # a round that ends early skips steps
        elif time.monotonic() - max(self._last_line, self._began) > 60:
            self._last_line = time.monotonic()
            left = (p.total_steps - p.global_step) * self.images_per_step / max(rate, 1e-9)
            self.line(f"  step {p.global_step}/{p.total_steps}  {shown}{rate:,.0f} images/s, {duration(left)} left")

    @property
    def images_per_second(self) -> float:
        """Mean since this process started training, evaluation included."""
        return self._steps * self.images_per_step / max(time.monotonic() - self._began, 1e-9)

    def epoch(self, metrics: Mapping[str, float]) -> None:
        """Prints the summary line of an epoch."""
        p = self.progress
        parts = [
            f"round {p.round}/{len(p.round_epochs) - 1}  epoch {p.epoch}/{p.round_epochs[p.round]}",
            f"loss {metrics['train/loss']:.4f}",
            f"top1 {metrics['val/top1']:.2f}",
            f"density {metrics['prune/density']:.3f}",
            f"lr {metrics['train/lr']:.1e}",
        ]
        if "prune/penalty" in metrics:
            parts.append(
                f"penalty {metrics['prune/penalty']:.2f}  condemned left {metrics['prune/condemned_left']:.4f}"
            )
        self.line("  ".join(parts))

    def rounds(self, rows: list[RoundRow]) -> None:
        """Prints the table of all rounds so far."""
        self.line("\n" + table(rows) + "\n")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
