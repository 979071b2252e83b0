"""Validation of what a run folder holds; anything of another shape counts as missing.

A folder may have been edited by hand, written by another version or truncated by a full disk.
"""

from collections.abc import Mapping

from vit_rsst.tickets.rounds import COLUMNS, RoundRow

MAYBE_EMPTY = ("test_top1", "test_loss", "what_if_gap")
"""Columns of a row that may be empty."""


def status(found: Mapping) -> dict:
    """status.json; round, epoch and step default to 0 unless it is empty."""
    status = _typed(found, state=str, updated=str, round=int, epoch=int, step=int)
    return {"round": 0, "epoch": 0, "step": 0} | status if status else {}


def environment(found: Mapping) -> dict:
    """environment.json."""
    return _typed(found, data=dict, versions=dict, command=list)


def event(found: object) -> dict | None:
    """A line of metrics.jsonl: it needs a step, and histograms if it is about weights."""
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        return None
    if found.get("event") == "weights" and not all(isinstance(found.get(part), list) for part in ("kept", "edges")):
        return None
    given = {key: value for key, value in found.items() if value is not None}
    return {"round": 0, "epoch": 0} | _typed(given, round=int, epoch=int)


def row(found: object) -> RoundRow | None:
    """The row of a round's report: a number in each column, except those that may be empty."""
    if not isinstance(found, dict):
        return None
    cells = {name: found.get(name) for name in COLUMNS}
    needed = [value for name, value in cells.items() if value is not None or name not in MAYBE_EMPTY]
    return RoundRow(**cells) if all(isinstance(value, int | float) for value in needed) else None


def pruning(found: object) -> dict:
    """The pruning part of a round's report: layers and units need their numbers."""
    report = _typed(found, layers=dict, units=dict) if isinstance(found, dict) else {}
    for part, needed in (("layers", {"density": int | float}), ("units", {"units": int, "alive": int, "kind": str})):
        items = report.get(part, {}).values()
        if not all(isinstance(i, dict) and all(isinstance(i.get(k), t) for k, t in needed.items()) for i in items):
            del report[part]
    return report


def scores(found: Mapping) -> dict:
    """Test outcomes: a square confusion matrix with one class name per row."""
    classes, confusion = found.get("classes"), found.get("confusion")
    is_square = _are(confusion, list) and all(len(row) == len(confusion) and _are(row, int) for row in confusion)
    return dict(found) if is_square and _are(classes, str) and len(classes) == len(confusion) else {}


def _typed(found: Mapping, **types: type) -> dict:
    """Without the entries of the wrong type."""
    return {key: value for key, value in found.items() if isinstance(value, types.get(key, object))}


def _are(values: object, of: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, of) for value in values)
