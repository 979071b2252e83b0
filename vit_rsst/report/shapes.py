"""What a part of a run folder has to look like to be believed; anything else is as if it were missing.

A folder may have been edited by hand, written by another version, or cut short by a full disk.
"""

from collections.abc import Mapping

from vit_rsst.tickets.rounds import COLUMNS, RoundRow

MAYBE_EMPTY = ("test_top1", "test_loss", "what_if_gap")
"""Columns of a row that may be empty."""


def status(found: Mapping) -> dict:
    """Of status.json; with a round, an epoch and a step wherever there is anything."""
    status = _typed(found, state=str, updated=str, round=int, epoch=int, step=int)
    return {"round": 0, "epoch": 0, "step": 0} | status if status else {}


def environment(found: Mapping) -> dict:
    """Of environment.json."""
    return _typed(found, data=dict, versions=dict, command=list)


def event(found: object) -> dict | None:
    """A line of metrics.jsonl: it has a step, and histograms where it tells of weights."""
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        return None
    if found.get("event") == "weights" and not all(isinstance(found.get(part), list) for part in ("kept", "edges")):
        return None
    given = {key: value for key, value in found.items() if value is not None}
    return {"round": 0, "epoch": 0} | _typed(given, round=int, epoch=int)


def row(found: object) -> RoundRow | None:
    """Of a round's report: it has a number in each column, or none where there may be none."""
    if not isinstance(found, dict):
        return None
    cells = {name: found.get(name) for name in COLUMNS}
    needed = [value for name, value in cells.items() if value is not None or name not in MAYBE_EMPTY]
    return RoundRow(**cells) if all(isinstance(value, int | float) for value in needed) else None


def pruning(found: object) -> dict:
    """Of a round's report: layers and units have their numbers."""
    report = _typed(found, layers=dict, units=dict) if isinstance(found, dict) else {}
    for part, needed in (("layers", {"density": int | float}), ("units", {"units": int, "alive": int, "kind": str})):
        items = report.get(part, {}).values()
        if not all(isinstance(i, dict) and all(isinstance(i.get(k), t) for k, t in needed.items()) for i in items):
            del report[part]
    return report


def scores(found: Mapping) -> dict:
    """Of the outcomes on the test split: a name for each row of a square confusion matrix."""
    classes, confusion = found.get("classes"), found.get("confusion")
    is_square = _are(confusion, list) and all(len(row) == len(confusion) and _are(row, int) for row in confusion)
    return dict(found) if is_square and _are(classes, str) and len(classes) == len(confusion) else {}


def _typed(found: Mapping, **types: type) -> dict:
    """Without the entries that are of other types than these."""
    return {key: value for key, value in found.items() if isinstance(value, types.get(key, object))}


def _are(values: object, of: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, of) for value in values)
