"""From run folders to report.html and report.md."""

from collections.abc import Sequence
from pathlib import Path

from vit_rsst.errors import InputError
from vit_rsst.report import compare, document, history, story

COMPARISON = "comparison"
"""Folder of a report over several runs that is given no other."""


def report(
    runs: Sequence[Path], out: Path | None = None, is_timed: bool = False, guard: story.Guard = story.plainly
) -> Path:
    """Writes the report of one run into its folder, or that of several runs, compared, into `comparison`.

    Args:
        out: folder for it instead; it need not be there.
        is_timed: measure latency, which takes seconds.
        guard: around each figure of one run.

    Returns:
        The page.

    Raises:
        InputError: a folder that is no run, or the same one twice.
        MissingRequirement: matplotlib or jinja2 is not installed, or the folder cannot be written.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("RUN: the same run is named twice; name each once.")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; name a folder.")
    told = [history.read(run) for run in runs]
    if len(told) == 1:
        return document.write(story.tell(told[0], is_timed, guard), out or runs[0])
    return document.write(compare.compare(told, is_timed), out or Path(COMPARISON))
