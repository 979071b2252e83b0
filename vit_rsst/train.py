"""Entry point of `accelerate launch -m vit_rsst.train RECIPE [key=value …]`: parse, assemble, call `loop.train`.

The recipe is checked before any heavy import, so a mistake costs a second and no rank waits.
"""

import argparse
import contextlib
import datetime
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vit_rsst import machine
from vit_rsst.arguments import Parser
from vit_rsst.errors import (
    CheckFailed,
    Damaged,
    Diverged,
    InputError,
    MissingRequirement,
    RunError,
    Stopped,
    first_line,
)

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

    from vit_rsst.recipe.schema import Recipe
    from vit_rsst.report.watching import Watcher
    from vit_rsst.run.folder import RunFolder
    from vit_rsst.run.ranks import Ranks
    from vit_rsst.run.signals import StopFlag
    from vit_rsst.run.state import Run


INTERRUPTED, CUT_SHORT = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as in a shell

SHARDED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
"""Environment variable set by the launcher → what it asks for."""

PREPARATION = datetime.timedelta(hours=24)
"""Timeout of collectives: the heartbeat names a lost rank long before, and one rank may prepare the data for all."""

AGAIN_ALIKE = {kind.exit_code: kind for kind in (InputError, Diverged, Damaged, CheckFailed, Stopped)}
"""Exit codes of runs that a launcher must not restart by itself."""


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
    from vit_rsst.run.folder import RunFolder
    from vit_rsst.run.signals import StopFlag, before_first_step

    is_first, ranks = os.environ.get("RANK", "0") == "0", None
    folder, minutes = RunFolder(recipe.run_folder), recipe.train.max_minutes

    def when_blocked(name: str) -> None:
        if not stop.is_training:  # nothing to save, and nothing that this process could still do
            if is_first:
                folder.record_stop(before_first_step(name))
            os._exit(Stopped.exit_code)
        if ranks is not None and (found := ranks.heartbeat.missing()[0]):  # a launcher ends the others of a dead rank
            ranks.heartbeat.end(found)

    stop = StopFlag(deadline=time.monotonic() + 60 * minutes if minutes else None, when_blocked=when_blocked)
    stop.install()  # before the imports that take seconds
    try:
        if is_first:
            folder.check_place()
        accelerator = make_accelerator(recipe)
        ranks = join_ranks(recipe, folder)
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        restart = restart and not attempt  # what the first attempt left is of this run
        if ranks.on_main("looking at the run folder", lambda: is_finished(folder, recipe, restart, attempt)):
            accelerator.wait_for_everyone()  # rank 0 may serve the store, over which the others hear it
            return
        train_to_the_end(recipe, accelerator, folder, stop, ranks, restart, allow_world_size_change, allow_data_change)
    except BaseException as error:
        raise failed(error, recipe, folder, stop, ranks) from error
    finally:
        stop.close()
        if ranks is not None:
            ranks.heartbeat.close()


def join_ranks(recipe: "Recipe", folder: "RunFolder") -> "Ranks":
    """The processes of this run, which from now on watch each other."""
    from vit_rsst.run.explanations import lost_rank
    from vit_rsst.run.ranks import Ranks

    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def on_loss(found: str) -> None:
        time.sleep(0.2 * min(ranks.rank, 10))  # rank 0 records it; if that is the one that is lost, the next one does
        record_loss(str(lost_rank(found, folder)), folder, began)

    ranks = Ranks.join(recipe.train.rank_timeout, folder.logs, on_loss)
    return ranks


def record_loss(text: str, folder: "RunFolder", began: str) -> None:
    """Says who is lost, unless another rank has recorded it since this one began; before there is a folder, all do."""
    status, is_over = folder.status(), ("failed", "stopped")
    if status.get("state") in is_over and status.get("updated", "") >= began:
        return
    print(f"error: {text}", file=sys.stderr, flush=True)
    if folder.path.is_dir():
        folder.write_status("failed", MissingRequirement.exit_code, text)


def is_finished(folder: "RunFolder", recipe: "Recipe", restart: bool, attempt: int) -> bool:
    """Whether there is nothing left to do in the run folder; says so.

    Args:
        attempt: how often an elastic launcher (`--max_restarts`) has started the processes before.

    Raises:
        InputError: the folder holds a run of a different recipe.
        RunError: the launcher restarts a run that was stopped, or that would fail again.
    """
    from vit_rsst.tickets.rounds import load_rows, table

    if restart:
        return False
    folder.check(recipe)
    status = folder.status()
    if attempt and status.get("exit_code") in AGAIN_ALIKE:
        kind = AGAIN_ALIKE[status["exit_code"]]
        raise kind(f"the launcher restarts the run, which {status['state']} ({status['reason']}); not restarting.")
    if status.get("state") != "finished":
        return False
    print(f"{folder.path} is already finished; use --restart to start over.", file=sys.stderr, flush=True)
    print(table(load_rows(folder.path)))
    return True


def train_to_the_end(
    recipe: "Recipe",
    accelerator: "Accelerator",
    folder: "RunFolder",
    stop: "StopFlag",
    ranks: "Ranks",
    restart: bool,
    allow_world_size_change: bool,
    allow_data_change: bool,
) -> None:
    """Builds the run, resumes from its newest resume point, trains and reports the outcome."""
    from vit_rsst import loop
    from vit_rsst.assembly.build import build
    from vit_rsst.run.rehearsal import settle_buckets
    from vit_rsst.run.resume import resume_if_possible

    run, lock = build(recipe, accelerator, folder, stop, ranks, restart)
    with contextlib.ExitStack() as ending:
        if lock is not None:
            ending.callback(lock.release)
        ending.callback(run.tracker.finish)
        watcher = make_watcher(run, recipe)
        try:
            resume_if_possible(run, allow_world_size_change, allow_data_change)
            if accelerator.is_main_process:
                folder.record(recipe, run.environment)
            stop.is_training = True
            settle_buckets(run.model, run.net, run.batch_shape, run.auxiliary_loss)
            loop.train(run)
            finish(run, recipe)
        except BaseException as error:
            raise failed(error, recipe, folder, stop, ranks, run) from error
        finally:
            run.console.close()
        ranks.heartbeat.close()
        accelerator.wait_for_everyone()  # before the process that serves the store ends
        accelerator.end_training()  # not after an error: another rank may be gone
        if watcher is not None and (page := watcher.finish()) is not None:  # drawn last: no rank waits for it
            print(f"  {page}      figures and findings", flush=True)


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
    """The Accelerator, with the recipe's precision, the accumulation implied by its global batch, and FSDP2 if asked.

    Raises:
        InputError: the launcher started a different number of processes than Accelerate sees.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    from vit_rsst.assembly import sharding
    from vit_rsst.data.dealing import Dealing
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
    plugin = None
    if sharding.is_asked() and state.num_processes > 1:
        plugin = sharding.make_plugin(recipe.train.mixed_precision)
    accelerator = Accelerator(
        mixed_precision=recipe.train.mixed_precision,
        gradient_accumulation_plugin=accumulation,
        fsdp_plugin=plugin,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # gradients are held once
    )
    if accelerator.device.type == "cpu" and plugin is None:  # who shards weights is short of memory
        machine.keep_freed_memory()
    if plugin is not None:
        sharding.shard_with_(accelerator, plugin)
    return accelerator


def start_processes() -> "PartialState":
    """This process among those the launcher started, and its device.

    Raises:
        InputError: the launcher requests something unsupported, or Accelerate sees a different number of processes.
        MissingRequirement: these GPUs cannot talk to each other as they are set up.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from vit_rsst.run.ranks import meeting_place

    for variable, name in SHARDED.items():
        if parse_flag_from_env(variable):
            raise InputError(
                f"the launcher requests {name}, which shards the weights in a way that masks cannot follow. Use FSDP2, "
                "as in accelerate_configs/gpu_8x_fsdp2.yaml, or, where the whole model fits on each GPU, DDP, as in "
                "accelerate_configs/gpu_8x_bf16.yaml."
            )
    try:
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
        state = PartialState(cpu=cpu, timeout=PREPARATION, **meeting_place(PREPARATION))
    except NotImplementedError as error:  # RTX 40xx with a driver before 550
        raise MissingRequirement(
            "these GPUs need peer-to-peer and InfiniBand transfers turned off with this driver: set "
            "NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1, start with `accelerate launch`, which sets them, or update the "
            f"driver ({first_line(error)})"
        ) from error
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
        f"  vit-rsst evaluate {shlex.quote(str(last))}      test scores by class\n"
        f"  {run.folder.path}/rounds.csv, metrics.jsonl      every number of this run"
    )


def failed(
    error: BaseException,
    recipe: "Recipe",
    folder: "RunFolder",
    stop: "StopFlag",
    ranks: "Ranks | None",
    run: "Run | None" = None,
) -> BaseException:
    """The error as the user should read it; tells the other ranks and records it in status.json, once."""
    from vit_rsst.run.explanations import explained

    if getattr(error, "is_recorded", False):
        return error
    known = explained(error, recipe, folder, ranks)
    known.is_recorded = True
    code = INTERRUPTED if isinstance(known, KeyboardInterrupt) else getattr(known, "exit_code", 1)
    if run is not None:
        record(known, code, run)
    elif code == Stopped.exit_code and os.environ.get("RANK", "0") == "0":
        folder.record_stop(str(known))
    if ranks is not None:  # the others hear of it once it is recorded
        ranks.heartbeat.close(str(known) or type(known).__name__, code)
    return known


def record(error: BaseException, code: int, run: "Run") -> None:
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
    with contextlib.suppress(OSError):  # on a full disk, the error itself has to do
        p = run.progress
        where = {"round": p.round, "epoch": p.epoch, "step": p.global_step} if run.stop.is_training else {}
        state = "stopped" if code == Stopped.exit_code else "failed"
        run.folder.write_status(state, code, str(error) or type(error).__name__, **where)
        if not isinstance(error, Damaged):
            run.tracker.log("warning", p.global_step, {"text": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    sys.exit(main())
