"""Where metrics go: metrics.jsonl always; TensorBoard, wandb and trackio through Accelerate's trackers, never fatal.

A tracker that fails is warned of once and left out from then on; training does not notice.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vit_rsst import files


@dataclass
class Tracker:
    """Records events on the main process; on the others every call does nothing.

    Attributes:
        path: metrics.jsonl.
        is_main: whether this process writes.
        trackers: Accelerate's trackers by name.
        warn: shows a warning to the person.
    """

    path: Path
    is_main: bool
    warn: Callable[[str], None]
    trackers: dict[str, object] = field(default_factory=dict)

    def start(self, names: tuple[str, ...], project: str, run: str, config: Mapping, logs: Path) -> None:
        """Starts the trackers asked for; wandb falls back to offline when its service cannot be had."""
        for name in names if self.is_main else ():
            self._guarded(name, "start", lambda name=name: self._start(name, project, run, config, logs))

    def _start(self, name: str, project: str, run: str, config: Mapping, logs: Path) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # One id a run, so that a resumed run goes on as the same one.
        options = {
            "tensorboard": {"run_name": run, "logging_dir": logs},
            "wandb": {"run_name": project, "name": run, "id": _run_id(logs), "resume": "allow", "dir": str(logs)},
            "trackio": {"run_name": project, "name": run, "resume": "allow"},
        }
        tracker = LOGGER_TYPE_TO_CLASS[name](**options[name])
        try:
            tracker.start()
        except Exception as error:  # wandb raises errors of its own
            if name != "wandb" or os.environ.get("WANDB_MODE") == "offline":
                raise
            self.warn(f"tracking: wandb could not start ({_short(error)}); it records offline in {logs}.")
            os.environ["WANDB_MODE"] = "offline"
            tracker.start()
        self.trackers[name] = tracker
        tracker.store_init_configuration(
            {k: v if isinstance(v, bool | int | float) else str(v) for k, v in config.items()}
        )

    def log(self, event: str, step: int, values: Mapping[str, object]) -> None:
        """One line of metrics.jsonl; the numbers of steps, epochs and rounds go to the trackers too."""
        if not self.is_main:
            return
        # JSON has no NaN: what is not finite is written as a text.
        record = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, **record}, ensure_ascii=False, allow_nan=False) + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        for name, tracker in list(self.trackers.items()):
            self._guarded(name, "log", lambda tracker=tracker: tracker.log(numbers, step=step))

    def warning(self, step: int, text: str) -> None:
        """A warning, for the person and for the record."""
        if self.is_main:
            self.warn(text)
            self.log("warning", step, {"text": text})

    def truncate(self, step: int) -> None:
        """Drops lines after `step`, which a resumed run writes again; they are kept under logs/."""
        if not self.is_main or not self.path.exists():
            return
        kept, tail = [], []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                event = json.loads(line)
                # A round is logged after the resume point of its last step: it is logged again.
                is_later = event["step"] > step or (event["event"] == "round" and event["step"] == step)
            except (ValueError, KeyError):  # a line cut short by a kill
                is_later = True
            (tail if is_later else kept).append(line)
        if tail:
            with open(self.path.with_name("logs") / f"metrics-after-{step:08d}.jsonl", "a", encoding="utf-8") as aside:
                aside.write("".join(tail))
            files.write_text(self.path, "".join(kept))

    def finish(self) -> None:
        for name, tracker in list(self.trackers.items()):
            self._guarded(name, "finish", tracker.finish)

    def _guarded(self, name: str, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker raises, training goes on
            self.trackers.pop(name, None)
            self.warn(f"tracking: {name} failed to {what} ({_short(error)}); it is left out from now on.")


def _run_id(logs: Path) -> str:
    path = logs / "tracker_id"
    if not path.exists():
        files.write_text(path, os.urandom(4).hex())
    return path.read_text(encoding="utf-8")


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]


def to_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
