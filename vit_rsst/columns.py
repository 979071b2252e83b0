"""Text in the columns of a terminal, where a Chinese character takes two."""

import unicodedata
from collections.abc import Sequence


def width_of(text: str) -> int:
    """Columns of a terminal: two for Chinese, Japanese and Korean characters, none for combining ones."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def clipped(text: str, width: int) -> str:
    """The text in at most so many columns; an ellipsis where something is missing: names often differ at their ends."""
    if width_of(text) <= width:
        return text
    first, last = (width - 1) // 3, 0
    while first and width_of(text[:first]) > (width - 1) // 3:
        first -= 1
    while width_of(text[:first]) + width_of(text[len(text) - last - 1 :]) < width:
        last += 1
    return f"{text[:first]}…{text[len(text) - last :]}"


def padded(text: str, width: int, is_left: bool = False) -> str:
    """The text with spaces up to so many columns."""
    space = " " * (width - width_of(text))
    return f"{text}{space}" if is_left else f"{space}{text}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, right-aligned, two spaces apart; the first line is the head."""
    widths = [max(map(width_of, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(padded(cell, w) for cell, w in zip(line, widths, strict=True)) for line in lines)
