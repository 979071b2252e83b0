"""Text for terminals and logs: tables, durations, sizes. A Chinese character is two cells wide."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence


def terminal_width() -> int | None:
    """Cells in a line of the terminal, or COLUMNS; None for a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None


def width_of(text: str) -> int:
    """Cells of a terminal: two for Chinese, Japanese and Korean characters, none for combining ones."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def clipped(text: str, width: int) -> str:
    """The text in at most `width` cells, with an ellipsis inside: names often differ at the end."""
    if width_of(text) <= width:
        return text
    first, last = (width - 1) // 3, 0
    while first and width_of(text[:first]) > (width - 1) // 3:
        first -= 1
    while width_of(text[:first]) + width_of(text[len(text) - last - 1 :]) < width:
        last += 1
    return f"{text[:first]}…{text[len(text) - last :]}"


def padded(text: str, width: int, is_left: bool = False) -> str:
    """The text filled up with spaces to `width` cells."""
    space = " " * (width - width_of(text))
    return f"{text}{space}" if is_left else f"{space}{text}"


def aligned(lines: Sequence[Sequence[str]], num_left: int = 0) -> str:
    """A table, two spaces between columns: the first `num_left` are left-aligned, the others right-aligned."""
    widths = [max(map(width_of, column)) for column in zip(*lines, strict=True)]
    rows = [
        [padded(cell, w, i < num_left) for i, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def duration(seconds: float) -> str:
    """`43s`, `12m05s` or `3h20m`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def size(num_bytes: float) -> str:
    """`812 B`, `3.4 KiB`, `1.2 MiB` …"""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
