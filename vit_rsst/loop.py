"""The run: rounds, epochs, steps. The page to read first.

A round begins with a plan (who is condemned, what is removed at once), trains its epochs while the controller
enforces masks and applies the penalty, and ends with a sparse ticket. After the last round every ticket meets the
test split, once.
"""

import math
import time
from dataclasses import asdict, replace
from typing import NoReturn

import numpy as np
import torch

from vit_rsst.data.loaders import Batch
from vit_rsst.errors import Diverged, Stopped
from vit_rsst.progress import Progress
from vit_rsst.pruning.controller import RoundReport
from vit_rsst.run import resume
from vit_rsst.run.state import Run
from vit_rsst.seeds import derived_seed
from vit_rsst.tickets import rounds, ticket_file
from vit_rsst.training import optim
from vit_rsst.training.counters import Interrupted


def run(s: Run) -> None:
    """Trains all rounds.

    Raises:
        Stopped: as a signal or the time limit asked, with a resume point.
    """
    try:
        train_rounds(s)
    except Interrupted:  # an evaluation between two epochs: the last point stands, and it is repeated from there
        leave(s, save=False)


def train_rounds(s: Run) -> None:
    for round in s.progress.remaining_rounds():
        if s.controller.begin_round(round):  # False when resuming inside this round
            optim.reset_state_(s.optimizer)
            s.best.restart()
            s.seconds, s.clock = 0.0, time.monotonic()
            s.watch("round began", s.progress, s.controller)
        if s.epoch_is_open:  # when resuming between its last step and its evaluation
            finish_epoch(s)
        for _ in s.progress.remaining_epochs():
            train_epoch(s)
            s.controller.after_epoch(s.progress)
            finish_epoch(s)
        finish_round(s)
    score_tickets(s)


def train_epoch(s: Run) -> None:
    """From the step at which `progress` stands to the end of its epoch."""
    s.model.train()
    for micro_batches in s.loader.steps(s.progress):
        seed_step(s)
        optim.set_lr_(s.optimizer, s.lr(s.progress))
        loss, grad_norm = train_step(s, micro_batches)
        s.progress.advance()
        s.watchdog.beat()
        s.console.step(loss)
        if s.progress.global_step % s.log_every_steps == 0:
            log_step(s, loss, grad_norm)
        if s.progress.step:  # the end of an epoch is saved after its evaluation
            if s.save_every_steps and s.progress.global_step % s.save_every_steps == 0:
                resume.save(s)
            stop_if_asked(s)


def train_step(s: Run, micro_batches: list[Batch]) -> tuple[float, float]:
    """One optimizer step over all micro-batches of this rank; mean loss of this rank and gradient norm of all."""
    total = 0.0
    s.controller.before_forward()
    for micro, (images, labels) in enumerate(micro_batches):
        if s.mixing is not None:
            place = micro * s.accelerator.num_processes + s.accelerator.process_index  # in the global batch
            seed = derived_seed(s.seed, "mixing", s.progress.global_step, place)
            images, labels = s.mixing(images, labels, seed)
        with s.accelerator.accumulate(s.model):
            logits = s.model(images)
            loss = s.loss(logits, labels)
            if s.distillation is not None:
                loss = s.distillation(loss, logits, images)
            if s.own_loss is not None:
                loss = loss + s.own_loss()
            s.accelerator.backward(loss)  # divides by the accumulation
        s.meter.add(logits, labels, loss)
        total = total + loss.detach()
    s.controller.after_backward(s.progress)
    norm = float(s.accelerator.clip_grad_norm_(s.model.parameters(), s.clip_grad_norm or math.inf))
    if is_finite := math.isfinite(norm):  # a loss that is not finite on any rank makes every rank's norm so
        s.controller.before_step(s.progress)
        s.optimizer.step()
    else:
        skip_step(s, norm)
    s.optimizer.zero_grad()
    s.controller.after_step(s.progress, skipped=not is_finite)
    return float(total) / len(micro_batches), norm


def seed_step(s: Run) -> None:
    """Seeds every generator that a step may use from the step alone, so that none has a state to lose."""
    seed = derived_seed(s.seed, "step", s.progress.global_step, s.accelerator.process_index)
    if s.accelerator.device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed notes it for every GPU too, in a third of a ms
    else:
        torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def skip_step(s: Run, norm: float) -> None:
    s.skipped_steps += 1
    p = s.progress
    place = f"round {p.round}, epoch {p.epoch}, step {p.global_step}"
    if s.skipped_steps > s.max_skipped_steps:
        raise Diverged(
            f"{place}: the loss or a gradient is not finite (gradient norm {norm}); lower optim.lr, lengthen "
            "optim.warmup_epochs or set optim.clip_grad_norm. The last resume point is sound; a changed recipe needs "
            "another name, or --restart. train.max_skipped_steps tolerates single steps."
        )
    s.tracker.warning(
        p.global_step, f"{place}: skipped a step whose gradient norm is {norm} ({s.skipped_steps} so far)"
    )


def log_step(s: Run, loss: float, grad_norm: float) -> None:
    metrics = {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": s.optimizer.param_groups[0]["lr"]}
    metrics["time/images_per_s"] = s.console.images_per_second
    s.tracker.log("step", s.progress.global_step, _where(s.progress) | metrics)


def finish_epoch(s: Run) -> None:
    """Evaluates, logs, shows and saves the epoch that has just ended."""
    s.epoch_is_open = True
    try:
        with s.controller.as_deployed():
            scores = s.evaluate("val")
    except Interrupted:
        leave(s, save=True)
    train, s.epoch_is_open = s.meter.compute_and_reset(), False
    last = replace(s.progress, epoch=s.progress.epoch - 1, step=s.progress.steps_per_epoch - 1)
    metrics = {"train/loss": train["loss"], "train/top1": train["top1"], "train/lr": s.lr(last)}
    metrics |= {f"val/{key}": value for key, value in scores.items()}
    metrics |= s.controller.metrics(last) | {"time/images_per_s": s.console.images_per_second}
    has_ended = note_best(s, scores["top1"])
    if math.isfinite(s.best.top1):
        metrics["val/top1_best"] = s.best.top1
    read, warnings = s.loader.report()
    for warning in warnings:
        s.tracker.warning(s.progress.global_step, warning)
    metrics |= read
    s.tracker.log("epoch", s.progress.global_step, _where(s.progress) | metrics)
    s.console.epoch(metrics)
    if s.accelerator.is_main_process:
        s.folder.write_status("running", **_where(s.progress))
    s.watch("epoch ended", s.progress, s.controller)
    if has_ended:
        s.console.line(f"no better val/top1 than {s.best.top1:.2f} for {s.best.waited} epochs: the round ends here")
        s.progress.end_round()
    resume.save(s)
    stop_if_asked(s)


def note_best(s: Run, top1: float) -> bool:
    """Counts an epoch after the last removal; whether the round has waited long enough for a better one."""
    if not s.controller.is_settled(s.progress):
        s.best.restart()
        return False
    return s.best.note(top1, s.progress.epoch, s.controller.snapshot)


def finish_round(s: Run) -> None:
    """Leaves the round's ticket, its report and its row."""
    if s.best.weights is not None:
        s.controller.restore_(s.best.weights)
    report = s.controller.end_round()
    with s.controller.as_deployed():
        scores = s.evaluate("val")
        leave_ticket(s, report, scores)
    s.watch("round ended", s.progress, s.controller)
    s.accelerator.wait_for_everyone()


def leave_ticket(s: Run, report: RoundReport, scores: dict[str, float]) -> None:
    """The ticket of the weights as they stand, its report and its row; on the main process."""
    if s.accelerator.is_main_process:
        path = rounds.ticket_path(s.folder.path, report.round)
        header = s.header | {"round": str(report.round), "density": repr(report.density)}
        num_bytes = ticket_file.save(path, s.net.state_dict(), s.controller.mask, header)
        row = rounds.RoundRow(
            round=report.round,
            density_asked=report.density_asked,
            density=report.density,
            val_top1=scores["top1"],
            val_top5=scores["top5"],
            val_loss=scores["loss"],
            test_top1=None,
            test_loss=None,
            what_if_gap=report.what_if_gap,
            epochs=s.best.ended_after or s.progress.round_epochs[report.round],
            seconds=round(s.seconds + time.monotonic() - s.clock, 1),
            ticket_bytes=num_bytes,
        )
        rounds.save_row(s.folder.path, row, asdict(report))
        if report.round + 1 < len(s.progress.round_epochs):  # the last table comes with the test scores
            s.console.rounds(rounds.load_rows(s.folder.path))
        s.tracker.log("round", s.progress.global_step, {k: v for k, v in asdict(row).items() if v is not None})


def score_tickets(s: Run) -> None:
    """Every ticket meets the test split, once, read back from its file."""
    s.checkpointer.settle()
    for row in rounds.load_rows(s.folder.path):
        path = rounds.ticket_path(s.folder.path, row.round)
        ticket_file.load_into_(s.net, ticket_file.load(path), str(path))
        scores = s.evaluate("test")
        if s.accelerator.is_main_process:
            report = rounds.load_report(path.with_suffix(".json"))["pruning"]
            scored = replace(row, test_top1=scores["top1"], test_loss=scores["loss"])
            rounds.save_row(s.folder.path, scored, report)
            found = {"round": row.round, **{f"test/{key}": value for key, value in scores.items()}}
            s.tracker.log("test", s.progress.global_step, found)
    s.accelerator.wait_for_everyone()


def stop_if_asked(s: Run) -> None:
    """Leaves a resume point at this step on every rank, then stops."""
    if s.stop.agreed(s.progress.global_step):
        leave(s, save=bool(s.progress.step))  # the end of an epoch has its point already


def leave(s: Run, save: bool) -> NoReturn:
    """Stops cleanly; collective."""
    if save:
        resume.save(s)
    s.checkpointer.wait()
    s.accelerator.wait_for_everyone()  # a launcher soon ends the others when the first process has ended
    reason = s.stop.reason or "another rank was asked to stop"
    raise Stopped(f"stopped on {reason} at step {s.progress.global_step}; the same command goes on from there.")


def _where(progress: Progress) -> dict[str, int]:
    return {"round": progress.round, "epoch": progress.epoch, "step": progress.global_step}
