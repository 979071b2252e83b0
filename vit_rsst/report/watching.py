"""Figures during and after a run: on the loop's hook, within a share of its time, never at its cost.

They go to the run folder and to the trackers. A figure that fails is skipped with one warning; the run continues.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vit_rsst import shards
from vit_rsst.errors import first_line
from vit_rsst.progress import Progress
from vit_rsst.pruning.controller import Controller
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.report import canvas, curves, diagnosis, history, pictures, reporting
from vit_rsst.run.tracking import Tracker

SHARE = 0.01
"""Share of the elapsed time that figures may take during a run."""

LOWEST, HIGHEST, BINS = -8.0, 1.0, 72
"""Histogram of log₁₀ |weight|."""

SAMPLE = 2_000_000
"""Most weights in a histogram, sampled evenly."""


def is_possible() -> bool:
    """Whether matplotlib and jinja2 are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("matplotlib", "jinja2"))


class Watcher:
    """Draws figures of a run.

    Args:
        run: the run folder.
        tracker: records histograms and warnings.
        device: runs the model for the final figures.
    """

    def __init__(self, run: Path, tracker: Tracker, device: torch.device):
        self._run, self._tracker, self._device = run, tracker, device
        self._began, self._spent, self._last = time.monotonic(), 0.0, 1.0
        self._warned: set[str] = set()
        self._step = 0

    def __call__(self, moment: str, progress: Progress, controller: Controller) -> None:
        """Records the weights; at the end of a round draws the curves, if time allows."""
        start, self._step = time.monotonic(), progress.global_step
        if moment == "round ended" or (moment == "epoch ended" and _is_due(progress)):
            self._guarded("diagnosis", self._diagnose)
        if moment == "round ended":
            if self._spent + self._last <= SHARE * (start - self._began):
                self._guarded("curves", self._draw_history)
                self._last = time.monotonic() - start
        elif _is_telling(moment, progress, controller):
            self._guarded("histogram", lambda: self._record(progress, controller))
        self._spent += time.monotonic() - start

    def finish(self) -> Path | None:
        """Draws everything and writes the report; returns its path, or None if it failed."""
        self._guarded("pictures", self._draw_pictures)
        if self._tracker.trackers:  # the report draws its own
            self._guarded("curves", self._draw_history)
        page = self._guarded("report", lambda: reporting.report([self._run], guard=self._guarded))
        if page is not None:
            self._tracker.report(self._step, page)
        return page

    def _record(self, progress: Progress, controller: Controller) -> None:
        found = histogram(controller.weights, controller.mask, controller.condemned)
        where = {"round": progress.round, "epoch": progress.epoch}
        self._tracker.log("weights", progress.global_step, where | found)

    def _diagnose(self) -> None:
        """Warns of what the curves show, once per finding and run."""
        so_far = history.read(self._run)
        known = {str(e.get("text")).removeprefix(diagnosis.PREFIX).split(":")[0] for e in so_far.warnings}
        for found in diagnosis.diagnose(so_far):
            if found.name not in known:
                self._tracker.warning(self._step, f"{diagnosis.PREFIX}{found}")

    def _draw_history(self) -> None:
        so_far = history.read(self._run)
        with canvas.drawing():
            for drawing in curves.DRAWINGS:
                self._guarded(drawing.name, lambda drawing=drawing: self._save(drawing.name, drawing.draw(so_far)))

    def _draw_pictures(self) -> None:
        exhibit = pictures.Exhibit.of(self._run, self._device)
        exhibit.save_scores(self._run / "figures")
        with canvas.drawing():
            for picture in pictures.PICTURES:
                self._guarded(picture.name, lambda picture=picture: self._save(picture.name, picture.draw(exhibit)))

    def _save(self, name: str, figure: object) -> None:
        if figure is not None:
            canvas.save(figure, self._run / "figures" / f"{name}.svg")
            self._tracker.figure(self._step, name, lambda: canvas.pixels(figure))

    def _guarded(self, name: str, call: Callable[[], object]) -> object:
        try:
            return call()
        except Exception as error:  # whatever a figure raises, the run continues
            if name not in self._warned:
                self._warned.add(name)
                self._tracker.warning(self._step, f"figures: cannot draw {name} ({first_line(error)})")


def _is_due(progress: Progress) -> bool:
    """At the fifth epoch of a round, and about twenty times per round."""
    epochs = progress.round_epochs[progress.round]
    return progress.epoch == 5 or progress.epoch % max(epochs // 20, 5) == 0


def _is_telling(moment: str, progress: Progress, controller: Controller) -> bool:
    """At the start and the end of a round, and while the condemned shrink; not if this rank lacks most weights."""
    return not any(map(shards.is_sharded, controller.weights.values())) and (
        moment == "round began"
        or controller.condemned is not None
        or progress.epoch in (1, progress.round_epochs[progress.round])
    )


@torch.no_grad()
def histogram(weights: Mapping[str, Tensor], mask: MaskSet, condemned: MaskSet | None) -> dict[str, list]:
    """Histogram of the living weights: `edges` in log₁₀ |weight|, counts `kept` and `condemned`."""
    stride = -(-mask.num_elements // SAMPLE)
    counts = {"kept": torch.zeros(BINS), "condemned": torch.zeros(BINS)}
    for name, weight in weights.items():
        flat = weight.detach().flatten()[::stride].float().abs()
        alive = mask[name].flatten()[::stride]
        leaving = condemned[name].flatten()[::stride] if condemned is not None else torch.zeros_like(alive)
        sizes = flat.clamp(min=10.0**LOWEST).log10().clamp(max=HIGHEST)
        for part, chosen in (("kept", alive & ~leaving), ("condemned", leaving)):
            counts[part] += torch.histc(sizes[chosen], BINS, LOWEST, HIGHEST).cpu()
    edges = torch.linspace(LOWEST, HIGHEST, BINS + 1).tolist()
    found = {part: [int(count) for count in of_part] for part, of_part in counts.items()}
    if condemned is None:
        del found["condemned"]
    return {"edges": [round(edge, 4) for edge in edges], **found}
