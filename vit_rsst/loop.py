"""The run: rounds, epochs, steps. Read this module first.

A round starts with a plan (which weights are condemned, which are removed at once), trains its epochs while the
controller enforces masks and applies the penalty, and ends with a sparse ticket. After the last round every ticket is
evaluated on the test split, once.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from vit_rsst import shards
from vit_rsst.data.loaders import Batch
from vit_rsst.errors import Diverged, Stopped
from vit_rsst.progress import Progress
from vit_rsst.pruning.agreement import check_same_weights
from vit_rsst.pruning.controller import RoundResult
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.run import resume
from vit_rsst.run.state import Run
from vit_rsst.seeds import derived_seed
from vit_rsst.tickets import rounds, ticket_file
from vit_rsst.training import optim, switches
from vit_rsst.training.counters import Interrupted
from vit_rsst.training.readings import Reading


def train(run: Run) -> None:
    """Trains all rounds.

    Raises:
        Stopped: a signal or the time limit stopped the run; a resume point exists.
    """
    try:
        train_rounds(run)
    except Interrupted:  # during an evaluation outside of epochs: the last resume point is current, and repeats it
        stop_run(run, saves=False)


def train_rounds(run: Run) -> None:
    for round in run.progress.remaining_rounds():
        if run.controller.begin_round(round):  # False when resuming inside this round
            optim.reset_state_(run.optimizer)
            run.best.restart()
            run.seconds, run.clock, run.scores = 0.0, time.monotonic(), None
            run.watch("round began", run.progress, run.controller)
        if run.epoch_is_open:  # resumed between the last step of an epoch and its evaluation
            finish_epoch(run)
        for _ in run.progress.remaining_epochs():
            train_epoch(run)
            run.controller.after_epoch(run.progress)
            finish_epoch(run)
        finish_round(run)
    score_tickets(run)


def train_epoch(run: Run) -> None:
    """Trains from the step that `progress` points at to the end of its epoch."""
    run.model.train()
    run.ranks.heartbeat.enter("reading images")
    for micro_batches in run.loader.steps(run.progress):
        seed_step(run)
        optim.set_lr_(run.optimizer, run.lr(run.progress))
        loss, grad_norm = train_step(run, micro_batches)
        place = _where(run.progress)
        run.progress.advance()
        run.ranks.heartbeat.step_done(run.progress.global_step)
        run.console.step(run.readings.last_loss)
        logs = run.progress.global_step % run.log_every_steps == 0
        reading = Reading(run.progress.global_step, place, host_metrics(run) if logs else None)
        run.readings.note(reading, loss, grad_norm)
        if logs:
            report_steps(run, run.readings.turn())
        if run.progress.step:  # an epoch end is saved after its evaluation
            if run.save_every_steps and run.progress.global_step % run.save_every_steps == 0:
                save(run)
            stop_if_asked(run)
    report_steps(run, run.readings.flush())


def train_step(run: Run, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """One optimizer step over all micro-batches of this rank; returns its mean loss and the global gradient norm.

    Both stay on the device, and nothing here synchronizes with it. A non-finite step is skipped on the device.
    """
    losses = []
    run.controller.before_forward()
    for images, labels in micro_batches:
        run.ranks.heartbeat.enter("forward")
        switches.begin_pass()
        with run.accelerator.accumulate(run.model):
            logits = run.model(images)
            loss = run.loss(logits, labels)
            if run.distillation is not None:
                loss = run.distillation(loss, logits, images)
            if run.auxiliary_loss is not None:
                loss = loss + run.auxiliary_loss()
            run.ranks.heartbeat.enter("backward")
            run.accelerator.backward(loss)  # divides by the accumulation steps
        run.meter.add(logits, labels, loss)
        losses.append(loss.detach())
    run.ranks.heartbeat.enter("update")
    run.controller.after_backward(run.progress)
    norm = optim.clip_grads_(run.accelerator, run.model, run.clip_grad_norm)
    skipped = 1.0 - norm.isfinite().float()  # a non-finite loss on any rank makes every rank's norm non-finite
    run.controller.before_step(run.progress)
    optim.step_unless_(run.optimizer, skipped)
    run.optimizer.zero_grad()
    run.controller.after_step(run.progress, skipped)
    return sum(losses) / len(losses), norm


def seed_step(run: Run) -> None:
    """Seeds every generator that a step may use from the step number alone, so there is no RNG state to save."""
    seed = derived_seed(run.seed, "step", run.progress.global_step, run.accelerator.process_index)
    if run.accelerator.device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also visits every GPU, which takes 0.3 ms
    else:
        torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def report_steps(run: Run, readings: list[Reading]) -> None:
    """Logs steps whose numbers have reached the host.

    Raises:
        Diverged: more than `train.max_skipped_steps` steps were skipped.
    """
    for reading in readings:
        if reading.was_skipped:
            skip_step(run, reading)
        if reading.metrics is not None:
            metrics = {"train/loss": reading.loss, "train/grad_norm": reading.grad_norm, **reading.metrics}
            run.tracker.log("step", reading.step, metrics)


def skip_step(run: Run, reading: Reading) -> None:
    """Counts a skipped step."""
    run.skipped_steps += 1
    place = "round {round}, epoch {epoch}, step {step}".format_map(reading.place)
    if run.skipped_steps > run.max_skipped_steps:
        raise Diverged(
            f"{place}: the loss or a gradient is not finite (gradient norm {reading.grad_norm}); lower optim.lr, "
            "increase optim.warmup_epochs or set optim.clip_grad_norm. The last resume point is intact; a changed "
            "recipe needs a new name, or --restart. train.max_skipped_steps tolerates single steps."
        )
    run.tracker.warning(
        reading.step - 1,
        f"{place}: skipped a step whose gradient norm is {reading.grad_norm} ({run.skipped_steps} so far)",
    )


def host_metrics(run: Run) -> dict[str, float]:
    """The logged values of a step that need nothing from the device."""
    rates = {"train/lr": run.optimizer.param_groups[0]["lr"], "time/images_per_s": run.console.images_per_second}
    return _where(run.progress) | rates


def save(run: Run) -> None:
    """Saves a resume point, after reporting all steps before it. Collective."""
    report_steps(run, run.readings.flush())
    resume.save(run)


def finish_epoch(run: Run) -> None:
    """Evaluates, logs, prints and saves the epoch that has just ended."""
    run.epoch_is_open = True
    try:
        check_same_weights(run.net)
        with run.controller.as_deployed():
            run.scores = scores = run.evaluate("val")
    except Interrupted:
        stop_run(run, saves=True)
    train, run.epoch_is_open = run.meter.compute_and_reset(), False
    last = replace(run.progress, epoch=run.progress.epoch - 1, step=run.progress.steps_per_epoch - 1)
    metrics = {"train/loss": train["loss"], "train/top1": train["top1"], "train/lr": run.lr(last)}
    metrics |= {f"val/{key}": value for key, value in scores.items()}
    metrics |= run.controller.metrics(last) | {"time/images_per_s": run.console.images_per_second}
    has_ended = note_best(run, scores["top1"])
    if math.isfinite(run.best.top1):
        metrics["val/top1_best"] = run.best.top1
    read, warnings = run.loader.report()
    for warning in warnings:
        run.tracker.warning(run.progress.global_step, warning)
    metrics |= read
    run.tracker.log("epoch", run.progress.global_step, _where(run.progress) | metrics)
    run.console.epoch(metrics)
    if run.accelerator.is_main_process:
        run.folder.write_status("running", **_where(run.progress))
    run.watch("epoch ended", run.progress, run.controller)
    if has_ended:
        run.console.line(
            f"val/top1 has not improved on {run.best.top1:.2f} for {run.best.waited} epochs; ending this round"
        )
        run.progress.end_round()
    save(run)
    stop_if_asked(run)


def note_best(run: Run, top1: float) -> bool:
    """Counts an epoch after the last removal; returns whether the round has run out of patience."""
    if not run.controller.is_settled(run.progress):
        run.best.restart()
        return False
    return run.best.note(top1, run.progress.epoch, run.controller.snapshot)


def finish_round(run: Run) -> None:
    """Writes the round's ticket, result and row."""
    if run.best.weights is not None:
        run.controller.restore_(run.best.weights)
        run.scores = None
    result = run.controller.end_round()
    with run.controller.as_deployed():
        scores = run.scores or run.evaluate("val")  # nothing has changed since the last epoch was evaluated
        state, mask = shards.gathered(run.net.state_dict()), run.controller.mask.gathered()
        run.ranks.on_main("writing the ticket", lambda: write_ticket(run, result, scores, state, mask))
    run.watch("round ended", run.progress, run.controller)


def write_ticket(
    run: Run, result: RoundResult, scores: dict[str, float], state: Mapping[str, Tensor], mask: MaskSet
) -> None:
    """Writes the ticket of a state and its mask, its result and its row; main process only."""
    path = rounds.ticket_path(run.folder.path, result.round)
    header = run.header | {"round": str(result.round), "density": repr(result.density)}
    num_bytes = ticket_file.save(path, state, mask, header)
    row = rounds.RoundRow(
        round=result.round,
        density_asked=result.density_asked,
        density=result.density,
        val_top1=scores["top1"],
        val_top5=scores["top5"],
        val_loss=scores["loss"],
        test_top1=None,
        test_loss=None,
        what_if_gap=result.what_if_gap,
        epochs=run.best.ended_after or run.progress.round_epochs[result.round],
        seconds=round(run.seconds + time.monotonic() - run.clock, 1),
        ticket_bytes=num_bytes,
    )
    rounds.save_row(run.folder.path, row, asdict(result))
    if result.round + 1 < len(run.progress.round_epochs):  # the final table includes the test scores
        run.console.rounds(rounds.load_rows(run.folder.path))
    run.tracker.log("round", run.progress.global_step, {k: v for k, v in asdict(row).items() if v is not None})


def score_tickets(run: Run) -> None:
    """Evaluates every ticket, read back from its file, on the test split, once."""
    run.ranks.on_main("writing the last resume point", run.checkpointer.settle)
    for row in run.ranks.on_main("reading rounds.csv", lambda: list(map(asdict, rounds.load_rows(run.folder.path)))):
        row = rounds.RoundRow(**row)
        path = rounds.ticket_path(run.folder.path, row.round)
        run.ranks.on_main("checking a ticket", lambda path=path: ticket_file.check(path))
        ticket_file.read_into_(run.net, path)
        scores = run.evaluate("test")
        if run.accelerator.is_main_process:
            pruning = rounds.load_result(path.with_suffix(".json"))["pruning"]
            scored = replace(row, test_top1=scores["top1"], test_loss=scores["loss"])
            rounds.save_row(run.folder.path, scored, pruning)
            found = {"round": row.round, **{f"test/{key}": value for key, value in scores.items()}}
            run.tracker.log("test", run.progress.global_step, found)
    run.accelerator.wait_for_everyone()


def stop_if_asked(run: Run) -> None:
    """Saves a resume point at this step on every rank, then stops."""
    if run.stop.agreed(run.progress.global_step):
        stop_run(run, saves=True)


def stop_run(run: Run, saves: bool) -> NoReturn:
    """Stops cleanly. Collective."""
    if saves:
        report_steps(run, run.readings.flush())
        resume.save_last(run)
    else:
        run.ranks.on_main("writing the last resume point", run.checkpointer.wait)
    run.accelerator.wait_for_everyone()  # once one process exits, the launcher soon kills the others
    reason = run.stop.reason or "a request on another rank"
    raise Stopped(f"stopped by {reason} at step {run.progress.global_step}; run the same command to resume.")


def _where(progress: Progress) -> dict[str, int]:
    return {"round": progress.round, "epoch": progress.epoch, "step": progress.global_step}
