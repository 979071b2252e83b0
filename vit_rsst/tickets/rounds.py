"""Round results: one row per round, stored as JSON next to the ticket, listed in rounds.csv and printed as a table."""

import json
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from vit_rsst import files
from vit_rsst.errors import InputError
from vit_rsst.text import aligned, duration, size


@dataclass(frozen=True)
class RoundRow:
    """One row of rounds.csv. Accuracies in percent, losses in nats, gaps in points; empty if not available."""

    round: int
    density_asked: float
    density: float
    val_top1: float
    val_top5: float
    val_loss: float
    test_top1: float | None
    test_loss: float | None
    what_if_gap: float | None
    epochs: int
    seconds: float
    ticket_bytes: int


COLUMNS = tuple(f.name for f in fields(RoundRow))


def ticket_path(folder: Path, round: int) -> Path:
    """Path of a round's ticket in a run folder."""
    return folder / "tickets" / f"round_{round:02d}.safetensors"


def of_rounds(folder: Path, suffix: str) -> list[Path]:
    """Round files with this suffix, in numeric order: 100 comes after 99."""
    return sorted((folder / "tickets").glob(f"round_*{suffix}"), key=lambda path: (len(path.name), path.name))


def last_ticket(folder: Path) -> Path:
    """The newest ticket of a run folder.

    Raises:
        InputError: it has none.
    """
    found = of_rounds(folder, ".safetensors")
    if not found:
        raise InputError(f"{folder}: this run folder has no ticket yet.")
    return found[-1]


def save_row(folder: Path, row: RoundRow, pruning: dict) -> None:
    """Writes the row and the `RoundResult` next to the ticket, and rewrites rounds.csv from all rows."""
    files.write_json(ticket_path(folder, row.round).with_suffix(".json"), {"row": asdict(row), "pruning": pruning})
    files.write_csv(folder / "rounds.csv", [COLUMNS, *(astuple(r) for r in load_rows(folder))])


def load_rows(folder: Path) -> list[RoundRow]:
    """All rows of a run, by round."""
    return [RoundRow(**load_result(path)["row"]) for path in of_rounds(folder, ".json")]


def forget_from(folder: Path, round: int) -> None:
    """Deletes tickets and results of `round` and later, which the resumed run will write again."""
    for path in (folder / "tickets").glob("round_*"):
        if int(path.stem.removeprefix("round_")) >= round:
            path.unlink()


def load_result(path: Path) -> dict:
    """The row and the `RoundResult` of a round, from the JSON file beside its ticket."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(rows: list[RoundRow]) -> str:
    """The rows as aligned text: density, accuracy, what-if gap, epochs, time and ticket size."""
    heads = ("round", "density", "val top-1", "test top-1", "what-if gap", "epochs", "time", "ticket")
    lines = [heads] + [
        (
            str(row.round),
            f"{row.density:.4f}",
            f"{row.val_top1:.2f}",
            "–" if row.test_top1 is None else f"{row.test_top1:.2f}",
            "–" if row.what_if_gap is None else f"{row.what_if_gap:+.2f}",
            str(row.epochs),
            duration(row.seconds),
            size(row.ticket_bytes),
        )
        for row in rows
    ]
    return aligned(lines)
