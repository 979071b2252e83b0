"""Shared by the benchmarks: arguments, alternating timing, intervals, tables, environment records.

Each benchmark declares its bounds as constants at the top, prints its table last and exits with 1 if it misses a bound:
`sys.exit(report(…))`. Contenders are compared by alternating them in one process, never across runs.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vit_rsst.timing import device_name

PACKAGES = ("torch", "timm", "accelerate", "numpy")


@dataclass(frozen=True)
class Interval:
    """A median and the ends of its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f}  [{self.low:.3f}, {self.high:.3f}]"

    def exceeds(self, bound: float) -> bool:
        """Whether the bound is missed with confidence: the whole interval is above it."""
        return self.low > bound


def parse_args(doc: str, names: str = "") -> argparse.Namespace:
    """Parses `--json FILE` and `--quick`; the first line of the benchmark's docstring is the description.

    Args:
        names: what the benchmark can be limited to by naming some, such as FAMILY; empty: nothing.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--quick", action="store_true", help="few alternations: a smoke test, numbers are meaningless")
    if names:
        parser.add_argument("names", nargs="*", metavar=names, help="test only these; default: all")
    return parser.parse_args()


def alternate(
    contenders: Mapping[str, Callable[[], None]],
    num_alternations: int,
    num_warmups: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Times every contender once per alternation, in random order.

    Args:
        contenders: name → a short block of work, the same amount for each.
        num_warmups: additional alternations at the start that are not counted.

    Returns:
        name → seconds, shape (num_alternations,); equal indices were measured next to each other.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rng, names = np.random.default_rng(0), list(contenders)
    seconds = {name: np.empty(num_warmups + num_alternations) for name in names}
    for i in range(num_warmups + num_alternations):
        for name in rng.permutation(names):
            synchronize()
            start = time.perf_counter()
            contenders[name]()
            synchronize()
            seconds[name][i] = time.perf_counter() - start
        show_progress(f"{i + 1}/{num_warmups + num_alternations} alternations")
    return {name: values[num_warmups:] for name, values in seconds.items()}


def interval(values: np.ndarray, draws: int = 10_000) -> Interval:
    """The median of paired ratios, with its 95 % percentile-bootstrap interval."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def show_progress(text: str) -> None:
    """Updates a status line on a terminal; prints nothing to a log."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def environment(device: torch.device) -> dict:
    """Where the numbers were measured: device, versions, command, threads; no absolute paths or host names."""
    return {
        "device": f"{device.type}: {device_name(device)}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command(sys.argv),
    }


def command(argv: Sequence[str]) -> str:
    """The command line of a benchmark; of absolute paths only the last part, as the others are of one machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv[1:]]
    return shlex.join(["python", f"scripts/benchmarks/{Path(argv[0]).name}", *words])


def report(args: argparse.Namespace, result: dict, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Prints the environment, missed bounds and the table; writes the JSON. Returns the exit code.

    Args:
        result: plain data for the JSON; `environment` and `missed` (sentences) are printed too.
    """
    show_progress("")
    where, missed = result["environment"], result["missed"]
    print(
        f"{where['device']}, {where['threads']} threads; torch {where['versions']['torch']}, commit {where['commit']}"
    )
    print("\n".join(f"MISSED: {sentence}" for sentence in missed) if missed else "all bounds held")
    print(f"\n{table(headers, rows)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if missed else 0


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first left-aligned, the others right-aligned."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    cells = [
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))] for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in [cells[0], ["-" * w for w in widths], *cells[1:]])


def _commit() -> str:
    """The commit of the checkout, with `-dirty` if tracked files have changed."""
    git = [
        "git",
        "--no-optional-locks",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"
