"""Runs of the project for step benchmarks: built from a recipe, fed with the benchmark's images."""

import io
from contextlib import redirect_stderr, redirect_stdout

from vit_rsst import loop
from vit_rsst.assembly.build import build
from vit_rsst.data.tables import Split
from vit_rsst.recipe.schema import Recipe
from vit_rsst.run.folder import RunFolder
from vit_rsst.run.heartbeat import Heartbeat
from vit_rsst.run.ranks import Ranks
from vit_rsst.run.signals import StopFlag
from vit_rsst.run.state import Run
from vit_rsst.train import make_accelerator


def begin_run(recipe: Recipe, split: Split, round: int) -> Run:
    """A run at the start of a round; an epoch has as many steps as `split` has global batches."""
    folder = RunFolder(recipe.run_folder)
    with redirect_stdout(io.StringIO()):
        accelerator = make_accelerator(recipe)
        ranks = Ranks(0, 1, Heartbeat(0, 1, 3600.0, folder.logs / "stacks-0.txt", None, print))
        if accelerator.num_processes > 1:
            ranks = Ranks.join(3600.0, folder.logs, print)
        run, lock = build(recipe, accelerator, folder, StopFlag(), ranks)
        run.loader.split = split
        run.progress.steps_per_epoch = min(
            recipe.train.steps_per_epoch or len(split), len(split) // recipe.train.global_batch
        )
        run.progress.round = round
        run.controller.begin_round(round)
    if lock is not None:
        lock.release()
    return run


def train_epoch(run: Run) -> None:
    """An epoch of the project's loop, without its console output."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        loop.train_epoch(run)
