"""A recipe plugin: records the batch of every step, and sends a signal at the moment given by INTERRUPT.

INTERRUPT is `EVENT:SIGNAL:RANK`, such as `step:KILL:0`. Events are those of `interruptions.py`; STEP is the step at
which they occur.
"""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from vit_rsst import loop, shards
from vit_rsst.assembly import data
from vit_rsst.run import checkpoint, console, rehearsal
from vit_rsst.run.tracking import Tracker

event, _, rest = os.environ.get("INTERRUPT", "").partition(":")
name, _, rank = rest.partition(":")
is_target = os.environ.get("RANK", "0") == rank
step = int(os.environ.get("STEP", "-1"))
log = Path(os.environ["BATCHES"] + os.environ.get("RANK", "0"))

train_step, evaluation_batches, step_of = loop.train_step, data.evaluation_batches, console.Console.step
log_of, gathered, save_file = Tracker.log, shards.gathered, checkpoint.save_file
is_there = False  # whether the last step is STEP
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
    global is_there
    step_of(self, loss)
    is_there = self.progress.global_step == step
    if is_target and event == "step" and is_there:
        send()


def evaluating(*samples: object, **options: object) -> Iterator:
    for number, batch in enumerate(evaluation_batches(*samples, **options)):
        yield batch
        if is_target and event == "evaluation" and is_there and number == 0:
            send()


def after_log(self: Tracker, what: str, at: int, metrics: dict) -> None:
    log_of(self, what, at, metrics)
    if is_target and event == what == "epoch" and at == step:
        send()


def gathering(tensors: Mapping[str, Tensor], **options: bool) -> Mapping[str, Tensor]:
    """Of a resume point, or of a ticket."""
    found = gathered(tensors, **options)
    if is_target and event == "gather" and is_there:
        send()
    return found


def writing(tensors: dict[str, Tensor], path: Path) -> None:
    """One file of a resume point, in the thread that writes it."""
    save_file(tensors, path)
    if is_target and event == "write" and path.parent.name.startswith(f".tmp-{step:08d}-"):
        send()


if os.environ.get("SETTLES") == "False":
    rehearsal.settle_buckets = lambda *_: None
loop.train_step, data.evaluation_batches, console.Console.step = noted, evaluating, after_step
Tracker.log, shards.gathered, checkpoint.save_file = after_log, gathering, writing
