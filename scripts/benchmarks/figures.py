"""Overhead of figures and the report in the quick start, during and after the run.

Trains digits/quickstart once with its figures, and compares the time in the drawing hook and in the final drawing with
the rest of the run. --quick trains two rounds of two epochs, where the overhead exceeds any bound and none is checked.
"""

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from typing import ClassVar

import torch
from _common import environment, parse_args, report

from vit_rsst import train
from vit_rsst.report import watching

SHARE_BOUND = 0.05
"""Time of figures and report, relative to the rest of the run."""

SHORT = ("train.epochs=2", "train.round_epochs=2", "pruning.schedule.rounds=1", "optim.warmup_epochs=0")


class Timed(watching.Watcher):
    """Measures the seconds of each part."""

    seconds: ClassVar = {"while it trains": 0.0, "last figures and report": 0.0}

    def __call__(self, *arguments: object) -> None:
        self._count("while it trains", lambda: super(Timed, self).__call__(*arguments))

    def finish(self) -> object:
        return self._count("last figures and report", super().finish)

    def _count(self, part: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        try:
            return call()
        finally:
            self.seconds[part] += time.perf_counter() - start


def main() -> int:
    args = parse_args(__doc__)
    watching.Watcher = Timed
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        start = time.perf_counter()
        code = train.main(["digits/quickstart", f"output_dir={folder}", *(SHORT if args.quick else ())])
        total = time.perf_counter() - start
    if code:
        sys.exit(f"the quick start ended with {code}:\n{out.getvalue()}")
    drawing = sum(Timed.seconds.values())
    share = drawing / (total - drawing)
    is_missed = share > SHARE_BOUND and not args.quick
    missed = [f"figures and report add {share:.1%}, bound {SHARE_BOUND:.0%}"] if is_missed else []
    result = {
        "environment": environment(torch.device("cpu")),
        "seconds": {"all": round(total, 2)} | {part: round(value, 2) for part, value in Timed.seconds.items()},
        "share": round(share, 4),
        "missed": missed,
    }
    rows = [(part, f"{value:.1f}", f"{value / (total - drawing):.1%}") for part, value in Timed.seconds.items()]
    rows.append(("both", f"{drawing:.1f}", f"{share:.1%}, bound {SHARE_BOUND:.0%}"))
    return report(args, result, ("quick start", "seconds", "of the rest of the run"), rows)


if __name__ == "__main__":
    sys.exit(main())
