"""Where metrics go: metrics.jsonl always; TensorBoard, wandb and trackio through Accelerate's trackers, never fatal.

Trackers get figures and the report too. One that fails causes a single warning and is dropped; training continues.
"""

import importlib
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vit_rsst import files, reach
from vit_rsst.errors import first_line

if TYPE_CHECKING:
    import numpy as np

FINISH_SECONDS = 90.0
"""Time a tracker has to finish."""
WANDB_PATIENCE = {"WANDB_INIT_TIMEOUT": "20", "WANDB_FINISH_TIMEOUT": "60"}
"""Seconds to wait for its service; by default 90 to start and forever to finish."""
AGAIN = ("round", "test")
"""Events logged after the resume point of their step."""


@dataclass
class Tracker:
    """Records events on the main process; a no-op on all others.

    Attributes:
        path: metrics.jsonl.
        is_main: whether this process writes.
        trackers: Accelerate's trackers by name.
        warn: shows a warning to the user.
    """

    path: Path
    is_main: bool
    warn: Callable[[str], None]
    trackers: dict[str, object] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def start(self, names: tuple[str, ...], project: str, run: str, config: Mapping, logs: Path) -> None:
        """Starts the given trackers; wandb falls back to offline if its service is unreachable."""
        if not (names and self.is_main):
            return
        is_new, run_id = _run_id(logs)
        options = {
            "tensorboard": {"run_name": run, "logging_dir": logs},
            "wandb": {"run_name": project, "name": run, "id": run_id, "resume": "allow", "dir": str(logs)},
            # It identifies runs by name, which an earlier one may have had.
            "trackio": {"run_name": project, "name": run, "resume": "never" if is_new else "allow"},
        }
        for name in names:
            begin = self._start_wandb if name == "wandb" else self._start
            self._guarded(name, "start", lambda name=name, begin=begin: begin(name, options[name], config))

    def _start(self, name: str, options: Mapping, config: Mapping) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker = LOGGER_TYPE_TO_CLASS[name](**options)
        tracker.start()
        self.trackers[name] = tracker
        # TensorBoard shows each configuration as another run: write it once.
        if name == "tensorboard" and any((options["logging_dir"] / options["run_name"]).glob("*/hparams.yml")):
            return
        tracker.store_init_configuration(
            {k: v if isinstance(v, bool | int | float) else str(v) for k, v in config.items()}
        )

    def _start_wandb(self, name: str, options: Mapping, config: Mapping) -> None:
        """Online if the service answers within seconds, else offline; wandb itself would try for minutes."""
        import wandb

        for setting, seconds in WANDB_PATIENCE.items():
            os.environ.setdefault(setting, seconds)
        options = {**options, "mode": os.environ.get("WANDB_MODE", "online")}
        is_online = options["mode"] == "online"
        why = reach.unreachable(wandb.setup().settings.base_url) if is_online else ""
        if is_online and not why:
            try:
                return self._start(name, options, config)
            except Exception as error:  # wandb raises errors of its own
                why = first_line(error)[:200]
                options["id"] += "-offline"  # the service may still hold the online one
        if why:
            self._warn_once(name, f"wandb could not start ({why}); it records offline in {options['dir']}.")
            options["mode"] = "offline"
        return self._start(name, options, config)

    def log(self, event: str, step: int, values: Mapping[str, object]) -> None:
        """Appends a line to metrics.jsonl; numbers also go to the trackers."""
        if not self.is_main:
            return
        # JSON has no NaN: non-finite numbers become strings.
        record = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, **record}, ensure_ascii=False, allow_nan=False) + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._each("log", lambda _, tracker: tracker.log(numbers, step=step))

    def figure(self, step: int, name: str, draw: Callable[[], "np.ndarray"]) -> None:
        """Sends a figure to the trackers.

        Args:
            draw: returns pixels, uint8 (height, width, 3); called only if there is a tracker.
        """
        if not self.trackers:
            return
        tag, pixels = f"figures/{name}", draw()

        def give(kind: str, tracker: object) -> None:
            if kind == "trackio":  # Accelerate has no log_images for it
                tracker.log({tag: importlib.import_module(kind).Image(pixels)}, step=step)
            else:
                order = {"dataformats": "NHWC"} if kind == "tensorboard" else {}
                tracker.log_images({tag: pixels[None]}, step=step, **order)

        self._each("show a figure", give)

    def report(self, step: int, page: Path) -> None:
        """Sends the report to the trackers: the page, or its Markdown where a page cannot be shown."""

        def give(kind: str, tracker: object) -> None:
            if kind == "tensorboard":
                text = page.with_suffix(".md").read_text(encoding="utf-8")
                found = re.sub(r"^!\[.*\n", "", text, flags=re.MULTILINE)  # the figures are there as images
            else:
                found = importlib.import_module(kind).Html(page, inject=False)
            tracker.log({"report": found}, step=step)

        self._each("show the report", give)

    def warning(self, step: int, text: str) -> None:
        """Shows a warning to the user and records it."""
        if self.is_main:
            self.warn(text)
            self.log("warning", step, {"text": text})

    def truncate(self, step: int, again: Sequence[str] = AGAIN) -> None:
        """Moves lines after `step`, which a resumed run logs again, to a file under logs/.

        Args:
            again: events that are logged again at `step` itself.
        """
        if not self.is_main or not self.path.exists():
            return
        kept, tail = [], []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                event = json.loads(line)
                is_later = event["step"] > step or (event["step"] == step and event["event"] in again)
            except (ValueError, KeyError):  # a line cut short by a kill
                is_later = True
            (tail if is_later else kept).append(line)
        if tail:
            with open(self.path.with_name("logs") / f"metrics-after-{step:08d}.jsonl", "a", encoding="utf-8") as aside:
                aside.write("".join(tail))
            files.write_text(self.path, "".join(kept))

    def finish(self) -> None:
        """Finishes every tracker; one that does not finish in time is abandoned."""
        for name, tracker in list(self.trackers.items()):
            thread = threading.Thread(
                target=self._guarded, args=(name, "finish", tracker.finish), name=f"finish {name}", daemon=True
            )
            thread.start()
            thread.join(FINISH_SECONDS)
            if thread.is_alive():
                self._warn_once(name, f"{name} did not finish within {FINISH_SECONDS:g} s; giving up on it.")

    def _each(self, what: str, call: Callable[[str, object], object]) -> None:
        """Calls with name and tracker of each one that still works."""
        for name, tracker in list(self.trackers.items()):
            self._guarded(name, what, lambda name=name, tracker=tracker: call(name, tracker))

    def _guarded(self, name: str, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker raises, training continues
            self.trackers.pop(name, None)
            self._warn_once(name, f"{name} failed to {what} ({first_line(error)[:200]}); dropped for this run.")

    def _warn_once(self, name: str, text: str) -> None:
        """Only the first problem of each tracker is shown."""
        if name not in self._warned:
            self._warned.add(name)
            self.warn(f"tracking: {text}")


def _run_id(logs: Path) -> tuple[bool, str]:
    """Whether this run is tracked for the first time, and its id, which stays the same when it resumes."""
    path = logs / "tracker_id"
    if is_new := not path.exists():
        files.write_text(path, os.urandom(4).hex())
    return is_new, path.read_text(encoding="utf-8")


def to_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
