"""From a run to a resume point and back. Randomness needs no place in it: every draw is a function of progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vit_rsst import optim, tickets
from vit_rsst.checkpoint import ResumePoint
from vit_rsst.tracking import AGAIN

if TYPE_CHECKING:
    from vit_rsst.loop import Run


def save(s: Run) -> None:
    """Saves the run as it stands between two steps; collective, written by the main process in the background."""
    meter = s.meter.gather_(s.accelerator.is_main_process)
    now = time.monotonic()
    s.seconds, s.clock = s.seconds + now - s.clock, now
    if not s.accelerator.is_main_process:
        return
    masks, controller = s.controller.state_dict()
    best, best_numbers = s.best.state_dict()
    names = {id(parameter): name for name, parameter in s.net.named_parameters()}
    tensors = {
        "model": s.net.state_dict(),
        "optimizer": optim.state_tensors(s.optimizer, names),
        "controller": masks,
        **({"best": best} if best else {}),
    }
    numbers = {
        "progress": s.progress.state_dict(),
        "controller": controller,
        "best": best_numbers,
        "meter": meter,
        "skipped_steps": s.skipped_steps,
        "seconds": s.seconds,
        "recipe": s.recipe_fingerprint,
        "epoch_is_open": s.epoch_is_open,
        "processes": s.accelerator.num_processes,
        "environment": s.environment,
    }
    s.checkpointer.save(ResumePoint(s.progress.global_step, tensors, numbers))


def restore_(s: Run, point: ResumePoint) -> None:
    """Sets the run to where a point was taken.

    Raises:
        Damaged: the point's tensors do not fit this model; nothing is changed.
    """
    check_fits(s, point)
    s.net.load_state_dict(point.tensors["model"])
    optim.load_state_tensors_(s.optimizer, point.tensors["optimizer"], dict(s.net.named_parameters()))
    s.controller.load_state_dict(point.tensors["controller"], point.numbers["controller"])
    s.progress.load_state_dict(point.numbers["progress"])
    s.best.load_state_dict(point.tensors.get("best", {}), point.numbers["best"])
    s.meter.load(point.numbers["meter"], s.accelerator.is_main_process)
    s.skipped_steps, s.seconds = point.numbers["skipped_steps"], point.numbers["seconds"]
    s.epoch_is_open = point.numbers.get("epoch_is_open", False)
    s.clock = time.monotonic()
    s.tracker.truncate(s.progress.global_step, ("epoch", *AGAIN) if s.epoch_is_open else AGAIN)


def check_fits(s: Run, point: ResumePoint) -> None:
    """Compares weights, masks, averages and moments with the model, before any of them is loaded.

    Raises:
        Damaged: names or shapes differ.
    """
    model, moments = tickets.shapes(s.net.state_dict()), tickets.shapes(point.tensors["optimizer"])
    controller = tickets.shapes(point.tensors["controller"])
    parts = {
        "mask": {name: (-(-weight.numel() // 8),) for name, weight in s.controller.weights.items()},  # bits
        "rewind": model,
    }
    parts["condemned"] = parts["mask"]
    parts["ema"] = {} if s.controller.ema is None else tickets.shapes(s.controller.ema.tensors)
    expected = dict(model)
    for part, shapes in parts.items():
        if part in ("mask", "ema") or any(path.startswith(f"{part}/") for path in controller):
            expected |= {f"{part}/{name}": shape for name, shape in shapes.items()}
    for path, shape in moments.items():  # the counter of steps is one number
        owner = path.rpartition("/")[0]
        if owner in model:
            expected[f"optimizer/{path}"] = shape and model[owner]
    best = tickets.shapes(point.tensors.get("best", {}))
    for path in best:
        part, name = path.split("/", 1)
        expected[f"best/{path}"] = (model if part == "model" else parts["ema"]).get(name, ())
    found = tickets.shapes(point.tensors["model"]) | controller
    found |= {f"best/{path}": shape for path, shape in best.items()}
    found |= {f"optimizer/{path}": shape for path, shape in moments.items()}
    tickets.check_shapes(expected, found, f"resume point {point.step}")
