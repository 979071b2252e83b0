"""Runs a grid of experiments from a study file, resumes where it stopped, and compares the finished runs.

vit-rsst study FILE [key=value …] [--jobs N] [--dry-run] [--csv FILE] [--markdown FILE]

Each run is an ordinary run folder, <output_dir>/<study>/<arm>-<point>-s<seed>, trained in its own process; finished
runs are not trained again. `study_file.py` shows a study file. Exit code 0: all runs are finished.
"""

import argparse
from pathlib import Path

from vit_rsst import files
from vit_rsst.errors import RunError
from vit_rsst.experiments import study_file, tables
from vit_rsst.experiments.running import Crew
from vit_rsst.experiments.study_file import PlannedRun, Study
from vit_rsst.files import output_file, write_result
from vit_rsst.text import aligned, duration
from vit_rsst.tickets.rounds import load_rows


def run_study(arguments: argparse.Namespace) -> None:
    """Trains every unfinished run, then prints the table, also when stopped or failed.

    Raises:
        RunError: a run did not finish.
    """
    study = study_file.read(Path(arguments.file), arguments.overrides)
    arguments.csv, arguments.markdown = output_file(arguments.csv), output_file(arguments.markdown)
    if arguments.dry_run:
        print(plan_text(study, arguments.jobs))
        return
    crew = Crew(arguments.jobs)
    try:
        crew.train(study.runs, lambda run, event: print(event_text(study, run, event), flush=True))
    finally:
        conclude(study, crew, arguments)
    if crew.failed:
        left = len(crew.failed)
        raise RunError(
            f"{left} of {len(study.runs)} runs did not finish (see above); run the same command to retry them."
        )


def conclude(study: Study, crew: Crew, arguments: argparse.Namespace) -> None:
    """Writes the requested files, then prints the table and the failures."""
    text = tables.summary(study)
    failures = [f"{name}: {why}" for name, why in crew.failed.items()]
    write_result(arguments.markdown, files.write_text, text + "\n")
    rows = tables.rows(study, crew.failed)
    write_result(arguments.csv, files.write_csv, [rows[0].keys(), *(row.values() for row in rows)])
    print("\n".join(["", text, *(["", "did not finish:", *failures] if failures else [])]), flush=True)


def event_text(study: Study, run: PlannedRun, event: str) -> str:
    """One line: finished runs so far, the run, and what happened to it."""
    done = sum(other.is_finished for other in study.runs)
    line = f"[{done}/{len(study.runs)}] {run.name}  {event}"
    if event == "finished":
        last = load_rows(run.folder)[-1]
        line += f"  density {last.density:.3f}  val {last.val_top1:.2f}  test {last.test_top1:.2f}"
    return line


def plan_text(study: Study, jobs: int) -> str:
    """The runs, the epochs each will train, and the time left, estimated from finished runs."""
    lines = [("run", "epochs", "rounds", "state")]
    for run in study.runs:
        state = "finished" if run.is_finished else "to resume" if run.folder.exists() else "new"
        rounds = " + ".join(map(str, run.recipe.round_epochs))
        lines.append((run.name, str(sum(run.recipe.round_epochs)), rounds, state))
    left = sum(sum(run.recipe.round_epochs) for run in study.runs if not run.is_finished)
    total = sum(sum(run.recipe.round_epochs) for run in study.runs)
    seconds = seconds_per_epoch(study)
    time = "unknown until a run has finished" if seconds is None else duration(left * seconds / jobs)
    total_text = f"{len(study.runs)} runs in {study.folder}, {total:,} epochs, {left:,} left to train"
    return f"{aligned(lines, num_left=1)}\n\n{total_text}; estimated time: {time}, {jobs} at a time"


def seconds_per_epoch(study: Study) -> float | None:
    """Mean over finished runs, evaluation included; None without any."""
    rows = [row for run in study.runs if run.is_finished for row in load_rows(run.folder)]
    epochs = sum(row.epochs for row in rows)
    return sum(row.seconds for row in rows) / epochs if epochs else None
