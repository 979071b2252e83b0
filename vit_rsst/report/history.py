"""What a run folder tells of its run, as plain data: also of one that goes on, failed, or was killed within a line."""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vit_rsst import results, strict_yaml
from vit_rsst.errors import InputError
from vit_rsst.results import RoundRow
from vit_rsst.run_folder import RunFolder

SCORES = "test_outcomes.json"
"""In `figures/`: what became of the test images under the last ticket."""


@dataclass(frozen=True)
class History:
    """A run as its folder tells it.

    Attributes:
        recipe, environment, status: as they were written; empty where they are not.
        events: lines of metrics.jsonl that could be read.
        rows: of the rounds that have ended.
        pruning: report of each of these.
    """

    path: Path
    recipe: Mapping
    environment: Mapping
    status: Mapping
    events: list[dict]
    rows: list[RoundRow] = field(default_factory=list)
    pruning: list[dict] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.recipe.get("name") or self.path.name

    @property
    def state(self) -> str:
        return self.status.get("state", "unknown")

    @cached_property
    def epochs(self) -> list[dict]:
        """Epoch events in order, numbered by `global_epoch` from 1."""
        found = {event["step"]: event for event in self._of("epoch")}
        return [found[step] | {"global_epoch": i} for i, step in enumerate(sorted(found), 1)]

    @cached_property
    def steps(self) -> list[dict]:
        found = {event["step"]: event for event in self._of("step")}
        return [found[step] for step in sorted(found)]

    @property
    def steps_taken(self) -> int:
        """Optimizer steps, without those that a round left out because it ended early."""
        steps = int(self.status.get("step", 0))
        if not self.epochs:
            return steps
        of_an_epoch = self.epochs[0]["step"]
        return len(self.epochs) * of_an_epoch + steps % of_an_epoch

    @cached_property
    def weights(self) -> list[dict]:
        """Histograms of the weights, the last of each moment: a resumed run writes its first one again."""
        found = {(event["round"], event["epoch"]): event for event in self._of("weights")}
        return [found[key] for key in sorted(found)]

    @property
    def warnings(self) -> list[dict]:
        return self._of("warning")

    @property
    def is_one_round(self) -> bool:
        """Whether the method has a single round, so that there are no rounds to compare."""
        return at(self.recipe, "pruning.method.name") in ("dense", "gmp", "ste", "constant")

    @cached_property
    def scores(self) -> dict:
        """Outcomes on the test split: `classes`, `confusion`, `ticket`, `density`; empty where there are none."""
        return read_json(self.path / "figures" / SCORES)

    def _of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event.get("event") == kind]


def read(path: Path) -> History:
    """Reads a run folder.

    Raises:
        InputError: it is none.
    """
    recipe = {}
    with suppress(OSError, ValueError):
        recipe = strict_yaml.parse((path / "recipe.yaml").read_text(encoding="utf-8")).tree
    status = RunFolder(path).status()
    status |= {key: 0 for key in ("round", "epoch", "step") if not isinstance(status.get(key), int)} if status else {}
    if not recipe and not status:
        raise InputError(f"{path}: this is no run folder: it has neither recipe.yaml nor status.json.")
    reports = [read_json(file) for file in results.of_rounds(path, ".json")]
    reports = [report for report in reports if _is_row(report.get("row"))]
    return History(
        path,
        recipe,
        read_json(path / "environment.json"),
        status,
        _events(path / "metrics.jsonl"),
        [RoundRow(**{name: report["row"].get(name) for name in results.COLUMNS}) for report in reports],
        [report.get("pruning", {}) for report in reports],
    )


def _is_row(row: object) -> bool:
    """Whether it has a number in each column that is never empty."""
    empty = ("test_top1", "test_loss", "what_if_gap")
    needed = [name for name in results.COLUMNS if name not in empty]
    return isinstance(row, dict) and all(isinstance(row.get(name), int | float) for name in needed)


def read_json(path: Path) -> dict:
    """A JSON object; empty where there is none."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def number(event: Mapping, key: str) -> float:
    """A metric of an event; NaN where it has none, and infinities as they were logged."""
    with suppress(TypeError, ValueError):
        return float(event.get(key, math.nan))
    return math.nan


def _events(path: Path) -> list[dict]:
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # a line cut short by a kill
                event = json.loads(line)
                if isinstance(event, dict) and isinstance(event.get("step"), int):
                    found.append(event)
    return found


def at(tree: Mapping, path: str, default: object = "?") -> object:
    """`at(recipe, "model.name")`; the default where there is none, as in older runs."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return default if tree is None else tree


def common_split(rows: Iterable[RoundRow]) -> str:
    """On which tickets can be compared: `validation` as long as one of them has not met the `test` split."""
    return "validation" if any(row.test_top1 is None for row in rows) else "test"


def top1(row: RoundRow, split: str) -> float:
    """Of a ticket on a split of `common_split`."""
    return row.test_top1 if split == "test" else row.val_top1
