"""All checks in order, their output lines, and the plot of the range test."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vit_rsst.checks import costs, inputs, learning, removal
from vit_rsst.checks.bench import Bench, Verdict
from vit_rsst.errors import CheckFailed
from vit_rsst.report import canvas

CHECKS: dict[str, Callable[[Bench], Verdict]] = {
    "classes": inputs.classes,
    "labels": inputs.labels,
    "normalisation": inputs.normalisation,
    "shapes": learning.shapes,
    "first loss": learning.first_loss,
    "gradients": learning.gradients,
    "memory": costs.memory,
    "speed": costs.speed,
    "over-fit": learning.over_fit,
    "learning rate": learning.learning_rate,
    "removal": removal.removal,
    "hours": costs.hours,
}


def check(bench: Bench) -> Iterator[Verdict]:
    """Runs the checks in order; after a verdict that blocks the rest, those are skipped."""
    blocked = ""
    for name, one in CHECKS.items():
        verdict = Verdict(name, "skipped", blocked) if blocked else one(bench)
        blocked = blocked or verdict.blocks
        yield verdict


def line(verdict: Verdict) -> str:
    """State, name and text; advice on a second line."""
    text = f"{verdict.state:8} {verdict.name:14} {verdict.text}"
    return f"{text}\n{'':8} {'':14} advice: {verdict.advice}" if verdict.advice else text


def conclude(verdicts: Sequence[Verdict]) -> str:
    """The closing line.

    Raises:
        CheckFailed: a check failed.
    """
    failed = [verdict.name for verdict in verdicts if verdict.state == "failed"]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(verdicts)} checks failed: {', '.join(failed)}.")
    warned = sum(verdict.state == "warning" for verdict in verdicts)
    return f"no check failed; {warned} warning(s)"


def draw_range_test(verdicts: Sequence[Verdict], lr: float, path: Path) -> bool:
    """Plots loss over learning rate, with the rate of the recipe; returns whether there was data to plot."""
    found = next((v.details for v in verdicts if v.name == "learning rate" and v.details.get("rates")), None)
    if found is None:
        return False
    with canvas.drawing():
        figure = canvas.figure()
        axes = figure.subplots()
        axes.plot(found["rates"], found["losses"], color=canvas.BLUE)
        marks = (("falls_at", "loss has fallen", canvas.GREEN), ("diverges_at", "loss diverges", canvas.RED))
        for key, label, color in (mark for mark in marks if found[mark[0]]):
            axes.axvline(found[key], color=color, linewidth=1, linestyle="--", label=f"{label}, {found[key]:.1e}")
        axes.axvline(lr, color=canvas.ORANGE, linewidth=1.6, label=f"recipe, {lr:g}")
        top = 1.6 * max(found["losses"][: max(len(found["losses"]) // 2, 1)])
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(None, top if math.isfinite(top) else None))
        figure.legend(loc="outside upper left", ncols=3)
        canvas.save(figure, path)
    return True
