"""A run folder as plain data, whatever the state of the run: in progress, failed, or killed mid-line."""

import fcntl
import json
import math
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vit_rsst import files
from vit_rsst.errors import InputError
from vit_rsst.recipe import strict_yaml
from vit_rsst.report import shapes
from vit_rsst.run.folder import RunFolder
from vit_rsst.tickets import rounds
from vit_rsst.tickets.rounds import RoundRow

SCORES = "test_outcomes.json"
"""In `figures/`: outcomes of the last ticket on the test images."""


@dataclass(frozen=True)
class History:
    """A run, read from its folder.

    Attributes:
        recipe, environment, status: as written; empty if missing.
        events: readable lines of metrics.jsonl.
        rows: one per finished round.
        pruning: the `RoundResult` of each of these.
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
        return str(self.recipe.get("name") or self.path.name)

    @cached_property
    def state(self) -> str:
        """As written; `lost` if it says running but no process is, `unknown` if nothing is written."""
        state = self.status.get("state", "unknown")
        return "lost" if state == "running" and self._is_lost() else state

    def _is_lost(self) -> bool:
        """Whether it ran on this machine and no process holds its lock."""
        if self.environment.get("host") != socket.gethostname():
            return False
        with suppress(OSError), open(self.path / ".lock", "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            fcntl.flock(lock, fcntl.LOCK_UN)
            return True
        return False

    @cached_property
    def epochs(self) -> list[dict]:
        """Epoch events in order, with a `global_epoch` from 1."""
        found = {event["step"]: event for event in self._of("epoch")}
        return [found[step] | {"global_epoch": i} for i, step in enumerate(sorted(found), 1)]

    @cached_property
    def steps(self) -> list[dict]:
        found = {event["step"]: event for event in self._of("step")}
        return [found[step] for step in sorted(found)]

    @property
    def steps_taken(self) -> int:
        """Optimizer steps, without those skipped by rounds that ended early."""
        steps = int(self.status.get("step", 0))
        if not self.epochs:
            return steps
        of_an_epoch = self.epochs[0]["step"]
        return len(self.epochs) * of_an_epoch + steps % of_an_epoch

    @cached_property
    def weights(self) -> list[dict]:
        """Weight histograms, the last of each moment: a resumed run repeats its first."""
        found = {(event["round"], event["epoch"]): event for event in self._of("weights")}
        return [found[key] for key in sorted(found)]

    @property
    def warnings(self) -> list[dict]:
        return self._of("warning")

    @cached_property
    def scores(self) -> dict:
        """Test outcomes: `classes`, `confusion`, `ticket`, `density`; empty if there are none."""
        return shapes.scores(files.read_json(self.path / "figures" / SCORES))

    def _of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event.get("event") == kind]


def read(path: Path) -> History:
    """Reads a run folder.

    Raises:
        InputError: it is not a run folder.
    """
    recipe, status = _recipe(path), shapes.status(RunFolder(path).status())
    if not recipe and not is_run(path):
        raise InputError(f"{path}: not a run folder: it has neither recipe.yaml nor status.json.")
    results = [files.read_json(file) for file in rounds.of_rounds(path, ".json")]
    results = [result for result in results if shapes.row(result.get("row"))]
    return History(
        path,
        recipe,
        shapes.environment(files.read_json(path / "environment.json")),
        status,
        _events(path / "metrics.jsonl"),
        [shapes.row(result["row"]) for result in results],
        [shapes.pruning(result.get("pruning")) for result in results],
    )


def is_run(path: Path) -> bool:
    """Whether it is a run folder: it has a status, or tickets beside a recipe; a recipe alone may lie anywhere."""
    return bool(RunFolder(path).status()) or ((path / "tickets").is_dir() and (path / "recipe.yaml").is_file())


def _recipe(path: Path) -> dict:
    with suppress(OSError, ValueError):
        return strict_yaml.parse((path / "recipe.yaml").read_text(encoding="utf-8")).tree
    return {}


def number(event: Mapping, key: str) -> float:
    """A metric of an event; NaN if missing, infinities as logged."""
    with suppress(TypeError, ValueError):
        return float(event.get(key, math.nan))
    return math.nan


def _events(path: Path) -> list[dict]:
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # a line truncated by a kill
                found.append(shapes.event(json.loads(line)))
    return [event for event in found if event is not None]


def at(tree: Mapping, path: str, default: object = "?") -> object:
    """`at(recipe, "model.name")`; the default if missing, as in older runs."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return default if tree is None else tree


def common_split(rows: Iterable[RoundRow]) -> str:
    """The split on which tickets can be compared: `validation` until every one has a `test` score."""
    return "validation" if any(row.test_top1 is None for row in rows) else "test"


def top1(row: RoundRow, split: str) -> float:
    """Top-1 of a ticket on a split from `common_split`."""
    return row.test_top1 if split == "test" else row.val_top1
