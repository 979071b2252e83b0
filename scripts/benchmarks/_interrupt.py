"""A recipe plugin: records the batch of every step, and sends a signal at the moment given by INTERRUPT.

INTERRUPT is `MOMENT:SIGNAL:RANK`, such as `window:KILL:0`. Moments are those of `interruptions.py`; STEP is the step at
which they occur.
"""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vit_rsst import loop
from vit_rsst.assembly import data
from vit_rsst.run import console, rehearsal
from vit_rsst.run.tracking import Tracker

moment, _, rest = os.environ.get("INTERRUPT", "").partition(":")
name, _, rank = rest.partition(":")
is_target = os.environ.get("RANK", "0") == rank
step = int(os.environ.get("STEP", "-1"))
log = Path(os.environ["BATCHES"] + os.environ.get("RANK", "0"))

train_step, evaluation_batches, step_of = loop.train_step, data.evaluation_batches, console.Console.step
log_of = Tracker.log
data.EVALUATION_BATCH = 10  # so that every rank has batches


def send() -> None:
    os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
    time.sleep(0 if name == "TERM" else 60)


def noted(s: loop.Run, micro_batches: Sequence) -> tuple[float, float]:
    micro_batches = list(micro_batches)  # an iterator
    digest = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for batch in micro_batches for t in batch)).hexdigest()
    with log.open("a") as file:
        file.write(json.dumps([s.progress.global_step, digest]) + "\n")
    return train_step(s, micro_batches)


def after_step(self: console.Console, loss: float) -> None:
    step_of(self, loss)
    if is_target and moment == "step" and self.progress.global_step == step:
        send()
    evaluating.here = self.progress.global_step == step


def evaluating(*samples: object, **options: object) -> Iterator:
    for number, batch in enumerate(evaluation_batches(*samples, **options)):
        yield batch
        if is_target and moment == "evaluation" and evaluating.here and number == 0:
            send()


def after_log(self: Tracker, event: str, at: int, metrics: dict) -> None:
    log_of(self, event, at, metrics)
    if is_target and moment == "epoch" and event == "epoch" and at == step:
        send()


if os.environ.get("SETTLES") == "False":
    rehearsal.settle_buckets = lambda *_: None
evaluating.here = False
loop.train_step, data.evaluation_batches, console.Console.step = noted, evaluating, after_step
Tracker.log = after_log
