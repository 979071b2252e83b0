"""Tunes fields of a recipe: many trials, each an ordinary run, the next one drawn by what the others reached.

vit-rsst search RECIPE --trials N --field 'optim.lr=loguniform(1e-4,1e-2)' [--field …] [--metric val/top1] [--prune]
               [key=value …]

The trials lie in <output_dir>/<name>-search/, with their numbers in search.db; the same command goes on until N trials
have ended. Needs optuna: pip install 'vit_rsst[hpo]'.
"""

import argparse
import shlex

from vit_rsst.errors import RunError
from vit_rsst.experiments import space
from vit_rsst.experiments.searching import Search
from vit_rsst.recipe import loading
from vit_rsst.text import aligned


def run_search(arguments: argparse.Namespace) -> None:
    """Runs the trials that are missing, then shows all of them, also when stopped.

    Raises:
        InputError: a field is wrong, or the folder holds another search.
        RunError: no trial has finished.
    """
    base = loading.find(arguments.recipe)
    loading.load(base, arguments.overrides)
    fields = [space.parse(text) for text in arguments.fields]
    space.check(fields, base, arguments.overrides)
    search = Search(base, tuple(arguments.overrides), tuple(fields), arguments.metric, arguments.prune)
    with search.opened():
        try:
            search.run(arguments.trials, lambda line: print(line, flush=True))
        finally:
            print(f"\n{aligned(search.table())}", flush=True)
        best = search.best_overrides()
    if best is None:
        raise RunError(f"no trial has finished; {search.folder / 'output'} holds what the trainers said.")
    print("\nthe best one again, under a name of its own:\n  " + shlex.join(["vit-rsst", "train", str(base), *best]))
