"""Tunes recipe fields over many trials: each an ordinary run, sampled from the results of the earlier ones.

vit-rsst search RECIPE --trials N --field 'optim.lr=loguniform(1e-4,1e-2)' [--field …] [--metric val/top1] [--prune]
               [key=value …]

Trials lie in <output_dir>/<name>-search/, their results in search.db; the same command resumes until N trials have
ended. Needs optuna: pip install 'vit_rsst[hpo]'.
"""

import argparse
import shlex

from vit_rsst.errors import RunError
from vit_rsst.experiments import space
from vit_rsst.experiments.searching import Search
from vit_rsst.recipe import loading
from vit_rsst.text import aligned


def run_search(arguments: argparse.Namespace) -> None:
    """Runs the missing trials, then prints all of them, also when stopped.

    Raises:
        InputError: a field is invalid, or the folder holds a different search.
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
            print(f"\n{aligned(search.table(), num_left=1)}", flush=True)
        best = search.best_overrides()
    if best is None:
        raise RunError(f"no trial has finished; see the logs in {search.folder / 'output'}.")
    print(
        "\nTo train the best trial again under its own name:\n  " + shlex.join(["vit-rsst", "train", str(base), *best])
    )
