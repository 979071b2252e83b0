"""Checks of cost: memory, loader speed against model speed, total training time."""

import time

import torch

from vit_rsst import machine
from vit_rsst.assembly.needs import needs
from vit_rsst.checks.bench import LIMIT, Bench, Verdict
from vit_rsst.progress import Progress
from vit_rsst.text import duration, size
from vit_rsst.timing import timed
from vit_rsst.training import optim


def memory(bench: Bench) -> Verdict:
    """Weights, gradients, moments, masks, moving average, teacher and activations fit in free memory."""
    images, parts, world = bench.dealing.batch_per_device, bench.parts_on_meta, bench.accelerator.num_processes
    on_gpu, num_shards = bench.device.type == "cuda", world if bench.is_sharded else 1
    evaluated = [bench.data.count(split) for split in ("val", "test")]
    found = needs(parts, parts.preview(bench.progress), bench.dealing, evaluated, num_shards, on_gpu)
    needed = found.peak + (0 if on_gpu else sum(found.host.values()))
    available = machine.available_memory() // machine.local_processes(world)
    free = torch.cuda.mem_get_info()[0] if on_gpu else available
    sharded = f" with weights sharded over {world} processes" if bench.is_sharded else ""
    text = f"about {size(needed)} for {images} images per device{sharded}, {size(free)} free"
    details = {"needed": needed, "free": free}
    if needed > free:
        return Verdict(
            "memory", "failed", text, f"set train.batch_per_device below {images}, or train.precision=bf16", details
        )
    return Verdict("memory", "warning" if needed > 0.9 * free else "ok", text, details=details)


def speed(bench: Bench) -> Verdict:
    """Images per second of the loader alone and of training steps alone."""
    images = len(bench.batch[1])
    if (needed := bench.estimate(4, images)) > LIMIT:
        return Verdict("speed", "skipped", f"would take about {duration(needed)} on this machine")
    net = bench.make_net().train()
    optimizer = bench.optimizer(net)

    def step() -> None:
        optimizer.zero_grad()
        bench.loss(net, bench.batch).backward()
        optim.set_lr_(optimizer, 1e-6)
        optimizer.step()

    step()
    seconds = bench.mean(sorted(timed(step, bench.device)[1] for _ in range(3))[1])
    bench.step_seconds = seconds
    model, loader = images / seconds, _loader_speed(bench)
    details = {"loader": loader, "model": model}
    takes = f"model {_rate(model)} on {bench.device.type}"
    if loader is None:
        text = f"{takes}; loader not measured, since an epoch has a single step"
        return Verdict("speed", "ok", text, details=details)
    text = f"loader {_rate(loader)}, {takes}"
    if loader < model:
        advice = (
            "data loading is the bottleneck: raise data.workers, set data.in_memory=true, or shrink the images on disk"
        )
        return Verdict("speed", "warning", text, advice, details)
    return Verdict("speed", "ok", text, details=details)


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f} images/s" if images_per_second >= 10 else f"{images_per_second:.2g} images/s"


def _loader_speed(bench: Bench, limit: float = 5.0) -> float | None:
    """Images per second, without the first step, in which workers start; None: an epoch has only that step."""
    steps = bench.loader.steps(Progress(bench.progress.steps_per_epoch, (1,)))
    next(steps)
    start, images = time.perf_counter(), 0
    for turn, micro_batches in enumerate(steps):
        images += sum(len(labels) for _, labels in micro_batches)
        if turn >= 20 or time.perf_counter() - start > limit:
            break
    return images / (time.perf_counter() - start) if images else None


def hours(bench: Bench) -> Verdict:
    """Total training time on this machine, from the speeds measured before."""
    world = bench.accelerator.num_processes
    steps = bench.progress.total_steps
    training = bench.estimate(steps, bench.recipe.train.global_batch / world)
    held_out = bench.data.count("val") or 0
    passes = bench.progress.total_epochs + 3 * len(
        bench.progress.round_epochs
    )  # before and after removals, and for each ticket
    total = training + bench.estimate(0.4 * passes, held_out / world)
    text = f"about {duration(total)} on this machine: {steps:,} steps and {passes} evaluations with {world} process(es)"
    return Verdict("hours", "ok", text, details={"seconds": total})
