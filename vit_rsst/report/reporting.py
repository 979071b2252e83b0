"""From run folders to report.html and report.md."""

from collections.abc import Sequence
from pathlib import Path

from vit_rsst.errors import InputError
from vit_rsst.report import compare, document, history, story

COMPARISON = "comparison"
"""Default folder of a comparison."""


def report(
    runs: Sequence[Path], out: Path | None = None, is_timed: bool = False, guard: story.Guard = story.plainly
) -> Path:
    """Writes the report of one run into its folder, or a comparison of several into `comparison`.

    Args:
        out: another folder; created if missing.
        is_timed: measure latency, which takes seconds.
        guard: called around each figure of a single run.

    Returns:
        Path of the HTML page.

    Raises:
        InputError: a folder is not a run folder, or is named twice.
        MissingRequirement: matplotlib or jinja2 is not installed, or the folder is not writable.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("RUN: the same run is given twice; name each run once.")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; name a folder.")
    histories = [history.read(run) for run in runs]
    if len(histories) == 1:
        return document.write(story.tell(histories[0], is_timed, guard), out or runs[0])
    return document.write(compare.compare(histories, is_timed), out or Path(COMPARISON))
