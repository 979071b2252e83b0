"""The project on a GPU: correctness, training speed, inference speed, and complete runs.

Five independent parts, of a few minutes each:

a  the tests marked `gpu` (tests/test_gpu.py), one row per test;
b  training steps of six ViTs in bf16: this project eager, in a penalty window, compiled and with CUDA graphs, against a
   bare PyTorch loop and one like timm's train.py, alternating in one process, with model FLOPs utilisation;
c  inference: slim against dense, 2:4 sparse against dense;
d  recipes/cifar100/vit_tiny_rsst_short.yaml and its controls, within a time limit;
e  the tests marked `nccl`, with two and three ranks over NCCL: lost ranks, interrupted runs, sharded weights. From
   NCCL 2.30 on the ranks may share one GPU.

Every row is written as soon as it is measured: `--json gpu.json` writes gpu-a.json and gpu-a.md, gpu-b.json and so on.
Running the same command again skips finished rows and measures the rest. An error becomes a row and does not stop other
parts. `--rehearse` runs everything in miniature, on the CPU if there is no GPU, to test it beforehand.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from _common import environment

PARTS = "abcde"
MINUTES = {"a": 2.0, "b": 4.0, "c": 1.0, "d": 9.0, "e": 4.0}
"""Part → time limit for starting new rows."""
REPOSITORY = Path(__file__).resolve().parents[2]

Row = dict[str, object]


@dataclass
class Ledger:
    """The rows of one part, in a JSON file and a Markdown table, both written after each row.

    Attributes:
        headers: field of a row → column of the table.
    """

    path: Path
    headers: Mapping[str, str]
    environment: dict
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["environment"]["device"] == self.environment["device"]:  # do not continue another card's rows
                self.rows = {name: row for name, row in found["rows"].items() if "error" not in row}

    def add(self, name: str, row: Row) -> None:
        self.rows[name] = row
        shown = ", ".join(f"{key} {text_of(value)}" for key, value in row.items() if not isinstance(value, dict | list))
        print(f"{name}: {shown}", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"environment": self.environment, "rows": self.rows}
        replace(self.path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        replace(self.path.with_suffix(".md"), self.markdown())

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Turns an exception into the row."""
        try:
            yield
        except Exception as error:  # a failed measurement must not stop the others
            traceback.print_exc()
            self.add(name, {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:300]})

    def markdown(self) -> str:
        where = self.environment
        lines = [["", *self.headers.values()], ["---"] * (len(self.headers) + 1)]
        for name, row in self.rows.items():
            cells = [text_of(row.get(key, "")) for key in self.headers]
            lines.append([name, *([row["error"].replace("\n", " ")] if "error" in row else cells)])
        head = f"{where['device']}; torch {where['versions']['torch']}; commit {where['commit']}; {where['date']}"
        return head + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def text_of(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return str(value)


def replace(path: Path, text: str) -> None:
    """Writes a file atomically."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


# -- a


@dataclass
class Watching:
    """A pytest plugin: adds a row per test, and stops when the time is up."""

    ledger: Ledger
    time_left: Callable[[], float]

    def pytest_runtest_setup(self, item: object) -> None:
        if self.time_left() <= 0:
            item.session.shouldstop = "the time is up"

    def pytest_runtest_logreport(self, report: object) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.split("::", 1)[1]
            numbers = "; ".join(f"{key} {value}" for key, value in report.user_properties)
            row = {"outcome": report.outcome, "seconds": report.duration, "numbers": numbers}
            if report.outcome == "failed":
                row["error"] = report.longrepr.reprcrash.message[:300]
            self.ledger.add(name, row)


def tests(ledger: Ledger, time_left: Callable[[], float], args: argparse.Namespace) -> None:
    if args.rehearse:
        os.environ["VIT_RSST_REHEARSE"] = "1"
    run_tests(["tests/test_gpu.py"], ledger, time_left, ["-m", "gpu", "-p", "no:xdist"])


def run_tests(files: Sequence[str], ledger: Ledger, time_left: Callable[[], float], options: Sequence[str]) -> None:
    """Runs the tests of these files that have no row yet."""
    import pytest

    os.chdir(REPOSITORY)
    options = [*options, "-p", "no:cacheprovider", "-q", "--tb=short", *files]
    options += [f"--deselect={file}::{name}" for file in files for name in ledger.rows]
    code = pytest.main(options, plugins=[Watching(ledger, time_left)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED, 2):
        raise RuntimeError(f"pytest exited with {int(code)}")


# -- b and c: in separate modules, since they import the project


def steps(ledger: Ledger, time_left: Callable[[], float], args: argparse.Namespace) -> None:
    import _gpu_steps

    for case in _gpu_steps.cases(args.rehearse):
        if not any(fnmatch(str(case), pattern) for pattern in args.only):
            continue
        if time_left() <= 0:
            return
        if not any(name.startswith(f"{case}: ") for name in ledger.rows):
            with ledger.guarded(str(case)):
                _gpu_steps.measure(case, ledger, args.rehearse)


def inference(ledger: Ledger, time_left: Callable[[], float], args: argparse.Namespace) -> None:
    import _gpu_inference

    for name, measure in _gpu_inference.cases(args.rehearse).items():
        if time_left() <= 0:
            return
        if not any(row.startswith(f"{name}: ") for row in ledger.rows):
            with ledger.guarded(name):
                measure(ledger)


# -- d

METHODS = ("rsst", "imp", "gmp", "dense")
"""Methods to run with the same recipe and number of epochs; the first is the recipe's own."""

MINIATURE = {
    "data.source": "digits",
    "data.augment": "{preset: strong, auto_augment: null}",
    "model.args": "{embed_dim: 24, depth: 2, num_heads: 3}",
    "train.epochs": 2,
    "train.round_epochs": 1,
    "train.global_batch": 64,
    "train.steps_per_epoch": 2,
    "train.precision": "no",
    "optim.warmup_epochs": 0,
}


def runs(ledger: Ledger, time_left: Callable[[], float], args: argparse.Namespace) -> None:
    """Starts `--jobs` runs at a time; one that runs out of time saves a resume point and resumes next time."""
    open_runs = [name for name in METHODS if ledger.rows.get(name, {}).get("state") != "finished"]
    for i in range(0, len(open_runs), args.jobs):
        if time_left() <= 0.5:
            return
        together = open_runs[i : i + args.jobs]
        began = time.monotonic()
        processes = {name: start_run(name, max(time_left() - 0.3, 0.1), args) for name in together}
        for name, process in processes.items():
            with ledger.guarded(name):
                process.wait()
                ledger.add(name, read_run(args.runs / name, process.returncode) | {"seconds": time.monotonic() - began})


def start_run(name: str, minutes: float, args: argparse.Namespace) -> subprocess.Popen:
    from vit_rsst.recipe.loading import load

    path = REPOSITORY / "recipes" / "cifar100" / "vit_tiny_rsst_short.yaml"
    recipe = load(path)
    overrides = {
        "name": name,
        "output_dir": args.runs,
        "data.workers": max((os.cpu_count() or 1) // args.jobs - 1, 1),
        "train.max_minutes": round(minutes, 2),
        "train.epochs": max(recipe.train.epochs // args.shorten, 1),
        "train.round_epochs": max(recipe.train.round_epochs // args.shorten, 1),
        "optim.warmup_epochs": recipe.optim.warmup_epochs / args.shorten,
        "tracking.with": "[]",
        "tracking.figures": "false",
        "pruning.method": name,
    }
    if args.data:
        overrides["data.path"] = args.data.resolve()
    if args.rehearse:
        overrides |= MINIATURE
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "vit_rsst.train", str(path), *(f"{key}={value}" for key, value in overrides.items())],
        env=os.environ | {"PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
    )


def read_run(folder: Path, code: int) -> Row:
    """Progress of a run and the scores of its rounds."""
    from vit_rsst.tickets.rounds import load_rows

    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    rows = load_rows(folder)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [event["time/images_per_s"] for event in events if "time/images_per_s" in event]
    last = rows[-1] if rows else None
    return {
        "state": status["state"],
        "exit_code": code,
        "epochs": sum("val/top1" in event for event in events),
        "images_per_s": sorted(rates)[len(rates) // 2] if rates else "",
        "density": last.density if last else "",
        "val_top1": last.val_top1 if last else "",
        "test_top1": last.test_top1 if last and last.test_top1 is not None else "",
        "rounds": [vars(row) for row in rows],
    }


# -- e

RANKED = ("tests/test_heartbeat.py", "tests/test_interruptions.py", "tests/test_sharded.py")


def ranks(ledger: Ledger, time_left: Callable[[], float], args: argparse.Namespace) -> None:
    """Each test starts two or three processes; as many tests run at a time as there are pairs of cores."""
    if not args.rehearse:
        os.environ["VIT_RSST_RANKS"] = "cuda"
    together = max((os.cpu_count() or 1) // 2, 1)
    run_tests(RANKED, ledger, time_left, ["-m", "nccl", "-n", str(together), "--dist", "load"])


@dataclass(frozen=True)
class Part:
    measure: Callable[[Ledger, Callable[[], float], argparse.Namespace], None]
    headers: Mapping[str, str]


BY_LETTER = {
    "a": Part(tests, {"outcome": "outcome", "seconds": "s", "numbers": "numbers"}),
    "b": Part(
        steps,
        {
            "images_per_s": "images/s",
            "ms": "ms/step",
            "ratio": "step / bare loop [95 %]",
            "mfu": "MFU",
            "peak_gib": "peak GiB",
        },
    ),
    "c": Part(
        inference, {"ms": "ms", "images_per_s": "images/s", "speed": "speed-up over dense [95 %]", "error": "error"}
    ),
    "d": Part(
        runs,
        {
            "state": "state",
            "epochs": "epochs",
            "seconds": "s",
            "images_per_s": "images/s",
            "density": "density",
            "val_top1": "val top-1",
            "test_top1": "test top-1",
        },
    ),
    "e": Part(ranks, {"outcome": "outcome", "seconds": "s", "numbers": "what happened"}),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), help="run only this part; default: all five, one process each")
    parser.add_argument("--minutes", type=float, help="start no new row after this time; default: depends on the part")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="rows go to FILE-a.json, FILE-a.md …")
    parser.add_argument("--rehearse", action="store_true", help="run everything in miniature, as a smoke test")
    parser.add_argument("--only", nargs="+", default=["*"], help="part b: only matching cases, such as 'vit_base*'")
    parser.add_argument("--data", type=Path, help="part d: a folder with the parquet files of CIFAR-100; not rehearsed")
    parser.add_argument("--runs", type=Path, help="part d: folder for the runs; default: next to the rows")
    parser.add_argument("--shorten", type=int, default=1, help="part d: divide all epochs by this number")
    parser.add_argument("--jobs", type=int, default=1, help="part d: concurrent runs")
    args = parser.parse_args(argv)
    args.runs = args.runs or args.json.parent / "gpu-runs"
    if args.rehearse and args.data:
        parser.error("--data: has no effect with --rehearse, which trains on the digits; omit it")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if not (args.rehearse or torch.cuda.is_available()):
        print("gpu.py: torch finds no GPU; --rehearse runs everything in miniature on the CPU", file=sys.stderr)
        return 2
    if args.part is None:
        given = sys.argv[1:] if argv is None else list(argv)
        codes = [subprocess.call([sys.executable, __file__, *given, "--part", part]) for part in PARTS]
        return max(codes)
    return run_part(args)


def run_part(args: argparse.Namespace) -> int:
    part, device = BY_LETTER[args.part], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = args.json.with_name(f"{args.json.stem}-{args.part}.json")
    ledger = Ledger(path, part.headers, environment(device))
    end = time.monotonic() + 60 * (args.minutes if args.minutes is not None else MINUTES[args.part])
    with ledger.guarded(f"part {args.part}"):
        part.measure(ledger, lambda: (end - time.monotonic()) / 60, args)
    print(f"\n{ledger.markdown()}")
    failed = [name for name, row in ledger.rows.items() if "error" in row or row.get("outcome") == "FAILED"]
    print(f"failed: {', '.join(failed)}" if failed else f"part {args.part}: nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
