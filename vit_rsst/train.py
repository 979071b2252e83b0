"""The entry for `accelerate launch -m vit_rsst.train RECIPE [key=value …]`: parse, assemble, call `loop.train`.

The recipe is checked before anything heavy is imported, so that a mistake costs a second and no rank waits.
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


INTERRUPTED, CUT_SHORT = 130, 141  # 128 + SIGINT and + SIGPIPE, as a shell says it

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
"""What a launcher sets to ask for it → its name."""


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
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_SHORT
    except RunError as error:
        if os.environ.get("RANK", "0") == "0" or getattr(error, "is_of_this_rank_alone", False):
            print(f"{'' if error.exit_code == 75 else 'error: '}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:  # the second one: the first asks a run to stop with a resume point
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
    """Trains by a recipe, going on where an earlier run of it stopped."""
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
            print(f"{folder.path} is finished; --restart would begin anew.\n\n{table(load_rows(folder.path))}")
        return
    run, lock = build(recipe, accelerator, folder, stop, restart)
    with contextlib.ExitStack() as ending:
        if lock is not None:
            ending.callback(lock.release)
        ending.callback(run.tracker.finish)
        watcher = make_watcher(run, recipe)
        train_to_the_end(run, recipe, allow_world_size_change, allow_data_change)
        accelerator.end_training()  # after an error, another rank may no longer be there to say goodbye to
        if watcher is not None and (page := watcher.finish()) is not None:  # no rank waits for the last figures
            print(f"  {page}      figures, and what the numbers say", flush=True)


def train_to_the_end(run: "Run", recipe: "Recipe", allow_world_size_change: bool, allow_data_change: bool) -> None:
    """Goes on from the newest resume point, trains and says how it went; leaves the reason where it fails."""
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
    """Who draws on the main process, looking on at the loop; None: nobody."""
    if not (recipe.tracking.figures and run.accelerator.is_main_process):
        return None
    from vit_rsst.report import watching

    if not watching.is_possible():
        run.console.line("  no figures and no report: pip install 'vit_rsst[report]' draws them")
        return None
    run.watch = watching.Watcher(run.folder.path, run.tracker, run.accelerator.device)
    return run.watch


def make_accelerator(recipe: "Recipe") -> "Accelerator":
    """The Accelerator, with the recipe's precision and the accumulation that its global batch asks for.

    Raises:
        InputError: the launcher started another number of processes than Accelerate sees.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    from vit_rsst.data.loaders import Dealing

    state = start_processes()
    dealing = Dealing.of(recipe.train.global_batch, recipe.train.batch_per_device, state.num_processes)
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the launcher always sets it, to `no` when not told
    if asked not in ("no", recipe.train.precision) and state.is_main_process:
        print(
            f"warning: the launcher asks for mixed precision {asked!r}; the recipe's train.precision "
            f"{recipe.train.precision!r} holds.",
            file=sys.stderr,
        )
    # Without sync_with_dataloader the windows count micro-batches alone: an epoch is whole windows by construction.
    accumulation = GradientAccumulationPlugin(num_steps=dealing.accumulation, sync_with_dataloader=False)
    return Accelerator(mixed_precision=recipe.train.precision, gradient_accumulation_plugin=accumulation)


def start_processes() -> "PartialState":
    """This process among those of the launcher, and its device.

    Raises:
        InputError: the launcher asks for what is not supported, or Accelerate sees another number of processes.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from vit_rsst.run.watchdog import PREPARATION

    for variable, name in SHARDED.items():
        if parse_flag_from_env(variable):
            raise InputError(
                f"the launcher asks for {name}, which shards the weights: masks, tickets and resume points need them "
                "whole on every process. Use a configuration with distributed_type: MULTI_GPU or 'NO', such as "
                "accelerate_configs/gpu_8x_bf16.yaml."
            )
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PREPARATION)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != state.num_processes:
        raise InputError(
            f"the launcher started {world} processes and Accelerate sees {state.num_processes}: they would work apart "
            "from each other. For several CPU processes set ACCELERATE_USE_CPU=true and use a configuration with "
            "distributed_type: MULTI_GPU, such as accelerate_configs/cpu_2proc.yaml."
        )
    return state


def finish(run: "Run", recipe: "Recipe") -> None:
    """Says how it went and what can be done next."""
    from vit_rsst.tickets.rounds import load_rows, ticket_path

    if not run.accelerator.is_main_process:
        return
    rows = load_rows(run.folder.path)
    run.folder.write_status("finished", exit_code=0)
    run.console.rounds(rows)
    last = ticket_path(run.folder.path, rows[-1].round)
    run.console.line(
        f"The last ticket holds {rows[-1].density:.2%} of the prunable weights: {last}\n"
        f"  vit-rsst evaluate {last}      its test scores by class\n"
        f"  {run.folder.path}/rounds.csv, metrics.jsonl      every number of this run"
    )


def fail(run: "Run", error: BaseException) -> None:
    """Leaves the reason in status.json, once: where all ranks fail alike, rank 0 says it.

    A run that is not even allowed to go on leaves its folder as it was.
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
    with contextlib.suppress(OSError):  # on a full disk the error itself is all that is told
        p = run.progress
        where = {"round": p.round, "epoch": p.epoch, "step": p.global_step} if run.stop.is_training else {}
        state = "stopped" if code == 75 else "failed"
        run.folder.write_status(state, code, str(error) or type(error).__name__, **where)
        if not isinstance(error, Damaged):
            run.tracker.log("warning", run.progress.global_step, {"text": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    sys.exit(main())
