"""Which faults a run survives: injects each fault of the table below into real processes and files, and reports.

Every fault has tests marked with its number, `@pytest.mark.fault("F4")`; this script runs them and prints a line for
each: the fault, what was done and what happened, the seconds. A fault is survived if it has tests and all of them pass;
the bound is that all are survived. --quick skips slow tests, and faults that have no others.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from _common import environment, parse_args, report, show_progress

TESTS = Path(__file__).resolve().parents[2] / "tests"
FAULTS = {
    "F1": "SIGTERM mid-epoch",
    "F2": "SIGUSR1, as sent by SLURM",
    "F3": "a second SIGINT",
    "F4": "SIGKILL while saving a resume point",
    "F5": "the launcher is killed",
    "F6": "the disk is full",
    "F7": "the output folder cannot be written",
    "F8": "a truncated file",
    "F9": "a flipped bit",
    "F10": "a pickle instead of weights",
    "F11": "paths that lead elsewhere",
    "F12": "wrong keys, types, duplicates",
    "F13": "missing or ambiguous columns",
    "F14": "labels out of range",
    "F15": "too little data",
    "F16": "corrupt images",
    "F17": "streams that end unevenly",
    "F18": "NaN or Inf, on one of two ranks",
    "F19": "out of memory",
    "F20": "a rank dies",
    "F21": "a rank hangs",
    "F22": "a decompression bomb",
    "F23": "a different number of processes",
    "F24": "a resume point or ticket of another model",
    "F25": "an unreachable sparsity",
    "F26": "a layer pruned to nothing",
    "F27": "wandb missing, unreachable, dying",
    "F28": "the Hub offline, gated, failing",
    "F29": "two runs in one folder",
    "F30": "another version, recipe, data",
    "+ locale, paths, HOME": "plain locale, odd paths, no HOME",
    "+ clock": "a clock that jumps",
}


@dataclass(eq=False)  # pytest keeps its plugins in a set
class Witness:
    """A pytest plugin that records the outcome of the tests of each fault.

    Attributes:
        cases: fault → (what was done and what happened, outcome, seconds) of each test.
    """

    cases: dict[str, list[tuple[str, str, float]]] = field(default_factory=lambda: {name: [] for name in FAULTS})
    faults_of: dict[str, list[str]] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.faults_of[item.nodeid] = [mark.args[0] for mark in item.iter_markers("fault")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
            happened = dict(report.user_properties).get("happened", name)
            why = "" if report.passed or report.skipped else str(report.longrepr).strip().splitlines()[-1]
            for fault in self.faults_of[report.nodeid]:
                self.cases[fault].append((why or happened, report.outcome, report.duration))
            show_progress(name)


def rows(cases: dict[str, list[tuple[str, str, float]]]) -> list[tuple[str, str, str, str]]:
    """One line per test; identical ones of a fault are merged."""
    lines = []
    for fault, about in FAULTS.items():
        counted: dict[tuple[str, str], list[float]] = {}
        for happened, outcome, seconds in cases[fault]:
            counted.setdefault((happened.partition("[")[0], outcome), []).append(seconds)
        for (happened, outcome), seconds in counted.items():
            times = f" ({len(seconds)} cases)" if len(seconds) > 1 else ""
            lines.append((f"{fault}  {about}", outcome, f"{sum(seconds):.1f}", f"{happened}{times}"))
    return lines


def main() -> int:
    args = parse_args(__doc__)
    witness = Witness()
    marked = "fault and not slow" if args.quick else "fault"
    pytest.main(["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-m", marked, str(TESTS)], [witness])
    tried = {fault: cases for fault, cases in witness.cases.items() if cases or not args.quick}
    lost = [
        f"{fault}, {FAULTS[fault]}: {'it has no test' if not cases else 'a test failed'}"
        for fault, cases in tried.items()
        if not any(outcome == "passed" for _, outcome, _ in cases) or any(o == "failed" for _, o, _ in cases)
    ]
    result = {
        "environment": environment(torch.device("cpu")),
        "survived": len(tried) - len(lost),
        "tried": len(tried),
        "missed": lost,
        "faults": {fault: {"about": FAULTS[fault], "cases": cases} for fault, cases in tried.items()},
    }
    code = report(args, result, ("fault", "outcome", "seconds", "what was done and happened"), rows(witness.cases))
    print(f"\nsurvived {result['survived']} of {result['tried']}")
    return code


if __name__ == "__main__":
    sys.exit(main())
