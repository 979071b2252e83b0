"""From a run to a resume point and back. It holds no random state: every draw is a function of progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vit_rsst import shards
from vit_rsst.errors import Damaged, InputError
from vit_rsst.run import environment
from vit_rsst.run.checkpoint import ResumePoint
from vit_rsst.run.environment import DATA_IDENTITY
from vit_rsst.run.tracking import AGAIN
from vit_rsst.tickets import rounds, ticket_file
from vit_rsst.training import optim

if TYPE_CHECKING:
    from vit_rsst.run.state import Run


def save(run: Run) -> None:
    """Saves the run between two steps; collective; the main process writes in the background.

    A point is skipped, with a warning, while the one before it is still being written.
    """
    meter, step = gather_(run), run.progress.global_step
    if is_wanted(run, lambda: run.checkpointer.has_room(step)):
        point = taken(run, meter)
        if run.accelerator.is_main_process:
            run.checkpointer.save(point, is_own=True)


def save_last(run: Run) -> None:
    """Saves the run between two steps unless this step has been saved; collective; returns once it is written."""
    meter, step = gather_(run), run.progress.global_step
    point = taken(run, meter) if is_wanted(run, lambda: run.checkpointer.lacks(step)) else None

    def write() -> None:
        if point is not None:
            run.checkpointer.save(point, is_own=True)
        run.checkpointer.wait()

    run.ranks.on_main(f"writing the resume point of step {step}", write)


def is_wanted(run: Run, ask: Callable[[], bool]) -> bool:
    """Whether this rank takes part in taking a point: the main process, which decides, or all of sharded weights."""
    if run.is_sharded:
        return run.ranks.on_main("looking for room for a resume point", ask)
    return run.accelerator.is_main_process and ask()


def gather_(run: Run) -> list[float]:
    """Sums of the meter over all ranks, and the time of the round so far; collective."""
    now = time.monotonic()
    run.seconds, run.clock = run.seconds + now - run.clock, now
    return run.meter.gather_(run.accelerator.is_main_process)


def taken(run: Run, meter: list[float]) -> ResumePoint:
    """A copy of the run as it stands, with the sums of its meter; collective if weights are sharded: rank 0 gathers
    them."""
    masks, controller = run.controller.state_dict()
    best, best_numbers = run.best.state_dict()
    live = run.controller.live() if best else {}
    names = {id(parameter): name for name, parameter in run.net.named_parameters()}
    tensors = {
        "model": run.net.state_dict(),
        "optimizer": optim.state_tensors(run.optimizer, names),
        "controller": masks,
        **({"best": {path: shards.like(own, live[path]) for path, own in best.items()}} if best else {}),
    }
    tensors = {stem: shards.gathered(of_stem, copies=True) for stem, of_stem in tensors.items()}
    numbers = {
        "progress": run.progress.state_dict(),
        "controller": controller,
        "best": best_numbers,
        "meter": meter,
        "skipped_steps": run.skipped_steps,
        "seconds": run.seconds,
        "recipe": run.recipe_fingerprint,
        "epoch_is_open": run.epoch_is_open,
        "processes": run.accelerator.num_processes,
        "environment": run.environment,
    }
    return ResumePoint(run.progress.global_step, tensors, numbers)


def restore_(run: Run, point: ResumePoint) -> None:
    """Sets the run to the state of a point.

    Raises:
        Damaged: the point's tensors do not fit this model; nothing is changed.
    """
    check_fits(run, point)
    shards.load_state_(run.net, point.tensors["model"])
    optim.load_state_tensors_(run.optimizer, point.tensors["optimizer"], dict(run.net.named_parameters()))
    run.controller.load_state_dict(point.tensors["controller"], point.numbers["controller"])
    run.progress.load_state_dict(point.numbers["progress"])
    best, live = point.tensors.get("best", {}), run.controller.live()
    best = {path: shards.part(whole, live[path]) for path, whole in best.items()}
    run.best.load_state_dict(best, point.numbers["best"])
    run.meter.load(point.numbers["meter"], run.accelerator.is_main_process)
    run.skipped_steps, run.seconds = point.numbers["skipped_steps"], point.numbers["seconds"]
    run.epoch_is_open = point.numbers.get("epoch_is_open", False)
    run.clock = time.monotonic()
    run.tracker.truncate(run.progress.global_step, ("epoch", *AGAIN) if run.epoch_is_open else AGAIN)


def check_fits(run: Run, point: ResumePoint) -> None:
    """Compares weights, masks, averages and moments with the model before any of them is loaded.

    Raises:
        Damaged: names or shapes differ.
    """
    model, moments = ticket_file.shapes(run.net.state_dict()), ticket_file.shapes(point.tensors["optimizer"])
    controller = ticket_file.shapes(point.tensors["controller"])
    parts = {
        "mask": {name: (-(-weight.numel() // 8),) for name, weight in run.controller.weights.items()},  # bits
        "rewind": model,
        "movement": ticket_file.shapes(run.controller.weights),
    }
    parts["condemned"] = parts["mask"]
    parts["ema"] = {} if run.controller.ema is None else ticket_file.shapes(run.controller.ema.tensors)
    expected = dict(model)
    for part, shapes in parts.items():
        if part in ("mask", "ema") or any(path.startswith(f"{part}/") for path in controller):
            expected |= {f"{part}/{name}": shape for name, shape in shapes.items()}
    for path, shape in moments.items():  # the step counter is a scalar
        owner = path.rpartition("/")[0]
        if owner in model:
            expected[f"optimizer/{path}"] = shape and model[owner]
    best = ticket_file.shapes(point.tensors.get("best", {}))
    for path in best:
        part, name = path.split("/", 1)
        expected[f"best/{path}"] = (model if part == "model" else parts["ema"]).get(name, ())
    found = ticket_file.shapes(point.tensors["model"]) | controller
    found |= {f"best/{path}": shape for path, shape in best.items()}
    found |= {f"optimizer/{path}": shape for path, shape in moments.items()}
    ticket_file.check_shapes(expected, found, f"resume point {point.step}")


def resume_if_possible(run: Run, allow_world_size_change: bool = False, allow_data_change: bool = False) -> None:
    """Sets the run to its newest intact resume point on every rank and reports it.

    Raises:
        InputError: the point belongs to a different recipe or dataset or, mid-epoch, to a different number of
            processes, and that is not allowed.
        Damaged: no point is intact, or the ranks read different ones.
    """
    point: ResumePoint | None = None

    def look() -> str:
        nonlocal point
        point = run.checkpointer.load()
        return "" if point is None else point.name

    name = run.ranks.on_main("reading the last resume point", look)
    if name and point is None:  # the points are on a file system that all ranks share
        try:
            point = run.checkpointer.read(name)
        except (Damaged, OSError) as error:
            raise Damaged(
                f"rank {run.ranks.rank} cannot read {run.folder.checkpoints / name}, which rank 0 reads ({error}); "
                "output_dir must be on a file system shared by all machines."
            ) from error
    if point is None:
        return
    drift = environment.drift(point.numbers.get("environment", run.environment), run.environment)
    check_same_run(run, point, drift, allow_world_size_change, allow_data_change)
    restore_(run, point)
    p = run.progress
    if run.accelerator.is_main_process:
        rounds.forget_from(run.folder.path, p.round)
    why = environment.inexact_because(run.environment, drift)
    run.tracker.log("resume", p.global_step, {"round": p.round, "epoch": p.epoch, "bit_exact": not why, "why": why})
    run.console.line(
        f"resumed at round {p.round}, epoch {p.epoch}, step {p.global_step} of {p.total_steps}, "
        + (f"not bit-exact: {why}" if why else "bit-exact")
    )
    if told := [f"{key} {then} → {now}" for key, (then, now) in drift.items() if key != "processes"]:
        run.tracker.warning(p.global_step, f"the environment has changed since the run started: {'; '.join(told)}")


def check_same_run(
    run: Run, point: ResumePoint, drift: dict[str, tuple], allow_world_size_change: bool, allow_data_change: bool
) -> None:
    """Refuses a point that this run cannot resume from as the same run.

    Raises:
        InputError: see `resume_if_possible`.
    """
    if point.numbers["recipe"] not in run.environment.get("fingerprints", [run.recipe_fingerprint]):
        raise InputError(
            f"{run.folder.path}: resume point {point.step} belongs to a different recipe, whatever recipe.yaml says; "
            "give this run another name (name=…), or use --restart to start over."
        )
    then, now = drift.get("processes", (1, 1))
    if then != now and point.numbers["progress"]["step"] and not allow_world_size_change:
        raise InputError(
            f"{run.folder.path}: the run stopped mid-epoch, at step {point.step}, with {then} processes, and now has "
            f"{now}. Start it with {then}, or pass --allow-world-size-change: every image is still seen, but sums are "
            "rounded in a different order, so the result is no longer bit-identical."
        )
    then, now = (of.get("order") for of in (point.numbers.get("environment", {}), run.environment))
    if then != now and point.numbers["progress"]["step"]:
        why = f"its lanes were {then} and are {now}" if then else "version 0.1 read streams in a different order"
        raise InputError(
            f"{run.folder.path}: the run stopped mid-epoch, at step {point.step}, and which images are left of that "
            f"epoch is lost: {why}. Finish the epoch with the version and settings that began it, or use --restart to "
            "start over; between epochs such a run does resume."
        )
    other = [f"data.{key}" for key in DATA_IDENTITY if f"data.{key}" in drift]
    if other and not allow_data_change:
        told = "; ".join(_change(key, *drift[key]) for key in other)
        raise InputError(
            f"{run.folder.path}: the dataset has changed since the run started: the data are not those it began with "
            f"({told}). Restore it, give this run "
            "another name (name=…), or pass --allow-data-change; it is then no longer a single experiment."
        )


def _change(key: str, then: object, now: object) -> str:
    """What has changed of the dataset, in a few words."""
    if isinstance(then, dict) and isinstance(now, dict):
        splits = [split for split in {**then, **now} if then.get(split) != now.get(split)]
        return f"other files or labels in {' and '.join(splits)}"
    return f"{key} was {then}, is {now}"
