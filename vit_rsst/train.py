"""Entry point of `accelerate launch -m vit_rsst.train RECIPE [key=value …]`: parse, assemble, call `loop.train`.

The recipe is checked before any heavy import, so a mistake costs a second and no rank waits.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vit_rsst.arguments import Parser
from vit_rsst.errors import Damaged, InputError, RunError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

    from vit_rsst.recipe.schema import Recipe
    from vit_rsst.report.watching import Watcher
    from vit_rsst.run.state import Run


INTERRUPTED, CUT_SHORT = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as in a shell

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
"""Environment variable set by the launcher → what it asks for."""


def add_arguments(parser: Parser) -> None:
    """The arguments of training, for this entry and for `vit-rsst train`."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="recipe file, or the name of a recipe shipped with the package"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=(), help="recipe fields to override")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit; create nothing")
    parser.add_argument(
        "--restart", action="store_true", help="start over; an existing run folder is kept as NAME.old-N"
    )
    parser.add_argument(
        "--allow-world-size-change",
        action="store_true",
        help="resume mid-epoch with a different number of processes (no longer bit-exact)",
    )
    parser.add_argument("--allow-data-change", action="store_true", help="resume although the dataset has changed")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and trains; returns the exit code."""
    parser = Parser(prog="vit_rsst.train", description="Train and prune from a recipe.")
    add_arguments(parser)
    return guarded(lambda: train(parser.parse(argv)))


def guarded(call: Callable[..., None], *arguments: object) -> int:
    """Calls it; an error that the user can act on is printed without a traceback and becomes the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a table is worth more than its dashes where the locale has none
        sys.stdout.reconfigure(errors="replace")
    try:
        call(*arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_SHORT
    except RunError as error:
        if os.environ.get("RANK", "0") == "0" or getattr(error, "is_of_this_rank_alone", False):
            print(f"{'' if error.exit_code == 75 else 'error: '}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:  # the second one: the first stops the run with a resume point
        return INTERRUPTED
    return 0


def train(arguments: argparse.Namespace) -> None:
    from vit_rsst.recipe.loading import find, load

    recipe = load(find(arguments.recipe), arguments.overrides)
    if arguments.dry_run:
        from vit_rsst.assembly.planning import plan_text

        if os.environ.get("RANK", "0") == "0":
            print(plan_text(recipe, int(os.environ.get("WORLD_SIZE", "1"))))
        return
    run_recipe(recipe, arguments.restart, arguments.allow_world_size_change, arguments.allow_data_change)


def run_recipe(
    recipe: "Recipe", restart: bool = False, allow_world_size_change: bool = False, allow_data_change: bool = False
) -> None:
    """Trains a recipe, resuming where an earlier run of it stopped."""
    from vit_rsst.assembly.build import build
    from vit_rsst.run.folder import RunFolder
    from vit_rsst.run.signals import StopFlag
    from vit_rsst.tickets.rounds import load_rows, table

    minutes = recipe.train.max_minutes
    stop = StopFlag(deadline=time.monotonic() + 60 * minutes if minutes else None)
    stop.install()
    folder = RunFolder(recipe.run_folder)
    if os.environ.get("RANK", "0") == "0":
        folder.check_place()
    accelerator = make_accelerator(recipe)
    if not restart:
        folder.check(recipe)
    if not restart and folder.status().get("state") == "finished":
        if accelerator.is_main_process:
            print(f"{folder.path} is already finished; use --restart to start over.\n\n{table(load_rows(folder.path))}")
        return
    run, lock = build(recipe, accelerator, folder, stop, restart)
    with contextlib.ExitStack() as ending:
        if lock is not None:
            ending.callback(lock.release)
        ending.callback(run.tracker.finish)
        watcher = make_watcher(run, recipe)
        train_to_the_end(run, recipe, allow_world_size_change, allow_data_change)
        accelerator.end_training()  # not after an error: another rank may be gone
        if watcher is not None and (page := watcher.finish()) is not None:  # drawn last: no rank waits for it
            print(f"  {page}      figures and findings", flush=True)


def train_to_the_end(run: "Run", recipe: "Recipe", allow_world_size_change: bool, allow_data_change: bool) -> None:
    """Resumes from the newest resume point, trains and reports the outcome; records the reason if it fails."""
    from vit_rsst import loop
    from vit_rsst.run import watchdog
    from vit_rsst.run.explanations import explained
    from vit_rsst.run.resume import resume_if_possible

    try:
        resume_if_possible(run, allow_world_size_change, allow_data_change)
        if run.accelerator.is_main_process:
            run.folder.record(recipe, run.environment)
        watchdog.limit_waiting(recipe.train.rank_timeout)
        run.stop.is_training = True
        loop.train(run)
        finish(run, recipe)
    except BaseException as error:
        known = explained(error, run, recipe)
        fail(run, known)
        raise known from error
    finally:
        run.watchdog.close()
        run.console.close()


def make_watcher(run: "Run", recipe: "Recipe") -> "Watcher | None":
    """The watcher that draws figures on the main process; None if there are none to draw."""
    if not (recipe.tracking.figures and run.accelerator.is_main_process):
        return None
    from vit_rsst.report import watching

    if not watching.is_possible():
        run.console.line("  no figures and no report; pip install 'vit_rsst[report]' enables them")
        return None
    run.watch = watching.Watcher(run.folder.path, run.tracker, run.accelerator.device)
    return run.watch


def make_accelerator(recipe: "Recipe") -> "Accelerator":
    """The Accelerator, with the recipe's precision and the accumulation implied by its global batch.

    Raises:
        InputError: the launcher started a different number of processes than Accelerate sees.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    from vit_rsst.data.loaders import Dealing
    from vit_rsst.training import switches

    switches.set_precision_(recipe.train.precision, bool(recipe.train.deterministic))
    state = start_processes()
    dealing = Dealing.of(recipe.train.global_batch, recipe.train.batch_per_device, state.num_processes)
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # always set by the launcher; `no` by default
    if asked not in ("no", recipe.train.mixed_precision) and state.is_main_process:
        print(
            f"warning: the launcher requests mixed precision {asked!r}; the recipe's train.precision "
            f"{recipe.train.precision!r} is used instead.",
            file=sys.stderr,
        )
    # Without sync_with_dataloader only micro-batches are counted: an epoch is whole windows by construction.
    accumulation = GradientAccumulationPlugin(num_steps=dealing.accumulation, sync_with_dataloader=False)
    return Accelerator(mixed_precision=recipe.train.mixed_precision, gradient_accumulation_plugin=accumulation)


def start_processes() -> "PartialState":
    """This process among those the launcher started, and its device.

    Raises:
        InputError: the launcher requests something unsupported, or Accelerate sees a different number of processes.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from vit_rsst.run.watchdog import PREPARATION

    for variable, name in SHARDED.items():
        if parse_flag_from_env(variable):
            raise InputError(
                f"the launcher requests {name}, which shards the weights; masks, tickets and resume points need them "
                "whole on every process. Use a configuration with distributed_type: MULTI_GPU or 'NO', such as "
                "accelerate_configs/gpu_8x_bf16.yaml."
            )
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PREPARATION)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != state.num_processes:
        raise InputError(
            f"the launcher started {world} processes and Accelerate sees {state.num_processes}, so each would train "
            "on its own. For several CPU processes set ACCELERATE_USE_CPU=true and use a configuration with "
            "distributed_type: MULTI_GPU, such as accelerate_configs/cpu_2proc.yaml."
        )
    return state


def finish(run: "Run", recipe: "Recipe") -> None:
    """Prints the results and what to do next."""
    from vit_rsst.tickets.rounds import load_rows, ticket_path

    if not run.accelerator.is_main_process:
        return
    rows = load_rows(run.folder.path)
    run.folder.write_status("finished", exit_code=0)
    run.console.rounds(rows)
    last = ticket_path(run.folder.path, rows[-1].round)
    run.console.line(
        f"The last ticket holds {rows[-1].density:.2%} of the prunable weights: {last}\n"
        f"  vit-rsst evaluate {last}      test scores by class\n"
        f"  {run.folder.path}/rounds.csv, metrics.jsonl      every number of this run"
    )


def fail(run: "Run", error: BaseException) -> None:
    """Records the reason in status.json, once; when all ranks fail alike, rank 0 does.

    A run that is refused before it starts leaves its folder untouched.
    """
    from vit_rsst.run.explanations import LostRank

    if isinstance(error, InputError) and not run.stop.is_training:
        return
    if not run.accelerator.is_main_process or isinstance(error, LostRank):
        time.sleep(1.0)
        if run.folder.status().get("state") != "running":
            return
        error.is_of_this_rank_alone = True
    code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    with contextlib.suppress(OSError):  # on a full disk, the error itself has to do
        p = run.progress
        where = {"round": p.round, "epoch": p.epoch, "step": p.global_step} if run.stop.is_training else {}
        state = "stopped" if code == 75 else "failed"
        run.folder.write_status(state, code, str(error) or type(error).__name__, **where)
        if not isinstance(error, Damaged):
            run.tracker.log("warning", run.progress.global_step, {"text": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    sys.exit(main())
