"""`vit-rsst runs`: the runs of a folder in a table no wider than the terminal."""

import datetime
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vit_rsst.errors import InputError
from vit_rsst.recipe import loading
from vit_rsst.report import history
from vit_rsst.report.history import History, at
from vit_rsst.text import clipped, padded, size, width_of

COLORS = {"finished": "32", "running": "36", "stopped": "33", "failed": "31", "lost": "31"}
BAR = 8
COLUMNS = ("run", "state", "progress", "round", "density", "best val", "test", "method", "size", "updated")
LEAST_NEEDED = {
    "updated": 28,
    "method": 28,
    "round": 28,
    "density": 28,
    "test": 28,
    "bar": 20,
    "size": 16,
    "progress": 16,
}
"""What to drop in a narrow terminal, in this order, until names have this many cells; `bar` is the progress bar."""


@dataclass(frozen=True)
class Listed:
    """One line.

    Attributes:
        state: see `History.state`.
        progress: share of all epochs; None if this version cannot read the recipe.
        density: of the last ticket.
        best: highest validation top-1 of any ticket.
        test: test top-1 of the last ticket.
    """

    run: str
    state: str
    progress: float | None
    round: int
    density: float | None
    best: float | None
    test: float | None
    method: str
    size: int
    updated: str


def find(folder: Path) -> Iterator[Path]:
    """The folder itself if it is a run, else run folders up to two levels below it."""
    if history.is_run(folder):
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.is_symlink():
            continue
        inside = [path] if history.is_run(path) else sorted(p for p in path.iterdir() if p.is_dir())
        yield from (p for p in inside if history.is_run(p))


def listed(path: Path, root: Path) -> Listed:
    run = history.read(path)
    rows = run.rows
    return Listed(
        run=str(path.relative_to(root)) if path != root else path.name,
        state=run.state,
        progress=progress(run),
        round=int(run.status.get("round") or 0),
        density=rows[-1].density if rows else None,
        best=max((row.val_top1 for row in rows), default=None),
        test=rows[-1].test_top1 if rows else None,
        method=str(at(run.recipe, "pruning.method.name")),
        size=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        updated=str(run.status.get("updated", "")),
    )


def progress(run: History) -> float | None:
    """Share of all epochs done; None if unknown."""
    if run.state == "finished":
        return 1.0
    if run.state == "unknown":
        return None
    try:
        epochs = loading.load(run.path / "recipe.yaml").round_epochs
    except (InputError, OSError):  # from another version, or with a plugin that is missing here
        return None
    round, epoch = (int(run.status.get(key) or 0) for key in ("round", "epoch"))
    return min((sum(epochs[:round]) + epoch) / max(sum(epochs), 1), 1.0)


def cells(item: Listed, now: datetime.datetime) -> dict[str, str]:
    done = "–" if item.progress is None else f"{bar(item.progress)} {item.progress:4.0%}"
    return {
        "run": re.sub(r"[\x00-\x1f\x7f]", "?", item.run),  # no control characters
        "state": item.state,
        "progress": done,
        "round": str(item.round),
        "density": "–" if item.density is None else f"{item.density:.4f}",
        "best val": "–" if item.best is None else f"{item.best:.2f}",
        "test": "–" if item.test is None else f"{item.test:.2f}",
        "method": item.method,
        "size": size(item.size),
        "updated": ago(item.updated, now),
    }


def bar(share: float) -> str:
    """A bar of eight cells."""
    full = int(share * BAR + 1e-9)
    return "█" * full + "░" * (BAR - full)


def ago(when: str, now: datetime.datetime) -> str:
    """`3 min ago`; the date after a week."""
    with suppress(ValueError):
        then = datetime.datetime.fromisoformat(when)
        seconds = max((now - then).total_seconds(), 0.0)
        for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h"), (604_800, 86_400, "days")):
            if seconds < limit:
                return f"{seconds / unit:.0f} {name} ago"
        return then.date().isoformat()
    return "–"


def table(items: Sequence[Listed], now: datetime.datetime, width: int | None, is_colored: bool) -> str:
    """The runs as text.

    Args:
        width: of the terminal in cells; None for no limit.
    """
    heads, rows = {column: column for column in COLUMNS}, [cells(item, now) for item in items]
    widths = {column: max(width_of(row[column]) for row in (heads, *rows)) for column in COLUMNS}
    if width is not None:
        fit(widths, width)
    if widths.get("progress") == len("progress"):
        rows = [row | {"progress": row["progress"].split()[-1]} for row in rows]
    lines = [_line(row, widths, is_colored and row is not heads) for row in (heads, *rows)]
    return "\n".join(lines)


def fit(widths: dict[str, int], width: int) -> None:
    """Drops columns and clips names, in place, until a line has at most `width` cells."""

    def others() -> int:
        return sum(w + 2 for column, w in widths.items() if column != "run")

    for column, readable in LEAST_NEEDED.items():
        if others() + min(widths["run"], readable) <= width:
            break
        if column == "bar":
            widths["progress"] = len("progress")
        else:
            del widths[column]
    widths["run"] = max(min(widths["run"], width - others()), 8)


def _line(row: dict[str, str], widths: dict[str, int], is_colored: bool) -> str:
    parts = []
    for column, width in widths.items():
        text = padded(clipped(row[column], width), width, is_left=column in ("run", "state", "method"))
        if is_colored and column == "state" and row["state"] in COLORS:
            text = f"\x1b[{COLORS[row['state']]}m{text}\x1b[0m"
        parts.append(text)
    return "  ".join(parts).rstrip()


def wants_color(is_terminal: bool) -> bool:
    """On a terminal, unless NO_COLOR says no; FORCE_COLOR says yes anywhere (no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (is_terminal and os.environ.get("TERM") != "dumb")


def as_data(items: Sequence[Listed]) -> dict:
    return {"runs": [asdict(item) for item in items]}
