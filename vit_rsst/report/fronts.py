"""Figures of several experiments: accuracy over epochs and against the cost of a ticket."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vit_rsst.report import canvas
from vit_rsst.report.document import Image
from vit_rsst.report.groups import Group
from vit_rsst.text import clipped, width_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One ticket."""

    x: float
    y: float
    group: int


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front: points that no other matches or beats in both cost and score."""
    best, found = -math.inf, []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if point.y > best:
            found.append(point)
            best = point.y
    return found


def images(groups: Sequence[Group], timed: Mapping) -> list[Image]:
    with canvas.drawing():
        drawn = [
            (
                "compared_curves",
                "Accuracy over epochs",
                "Validation top-1 and density, one line per run.",
                curves(groups),
            ),
            (
                "fronts",
                "Pareto fronts",
                "Top-1 against the cost of a ticket. The grey line is the Pareto front.",
                fronts(groups, timed),
            ),
        ]
        return [Image(name, title, about, canvas.svg(f)) for name, title, about, f in drawn if f is not None]


def curves(groups: Sequence[Group]) -> "Figure | None":
    """Validation accuracy and density over epochs."""
    if not any(run.epochs for group in groups for run in group.runs):
        return None
    figure = _figure(groups, 3.6)
    accuracy, density = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for i, group in enumerate(groups):
        for j, run in enumerate(group.runs):
            x = [event["global_epoch"] for event in run.epochs]
            color, style, _ = look(i)
            line = {"color": color, "linestyle": style, "alpha": 1.0 if j == 0 else 0.5}
            line["marker"] = "o" if len(x) == 1 else None
            label = _label(group) if j == 0 else None
            accuracy.plot(x, [event.get("val/top1") for event in run.epochs], label=label, **line)
            density.step(x, [event.get("prune/density", 1.0) for event in run.epochs], where="post", **line)
    accuracy.set_ylabel("validation top-1, %")
    density.set(ylabel="density", xlabel="epoch", ylim=(0, 1.05))
    canvas.count(density, (event["global_epoch"] for group in groups for run in group.runs for event in run.epochs))
    _legend(figure, groups)
    return figure


def tradeoff(points: Sequence[Point], labels: Sequence[str], cost: str) -> "Figure":
    """Top-1 against a cost, along one path of tickets; the first point is the dense model.

    Args:
        labels: beside the points.
        cost: label of the axis.
    """
    figure = canvas.figure()
    axes = figure.subplots()
    axes.plot([p.x for p in points], [p.y for p in points], color=canvas.GREY, linewidth=1, zorder=1)
    axes.scatter([p.x for p in points], [p.y for p in points], s=22, c=[look(p.group)[0] for p in points], zorder=2)
    for point, label in zip(points, labels, strict=True):
        axes.annotate(label, (point.x, point.y), xytext=(4, -11), textcoords="offset points", fontsize=9)
    axes.margins(0.12)
    axes.set(xlabel=cost, ylabel="top-1, %")
    return figure


def _label(group: Group) -> str:
    """Clipped to the width of the figure."""
    return clipped(group.label, 56)


def _columns(groups: Sequence[Group]) -> int:
    """Legend columns: two if all labels are short."""
    return 2 if max(width_of(group.label) for group in groups) <= 26 else 1


def _figure(groups: Sequence[Group], height: float) -> "Figure":
    """A figure with `height` inches below its legend."""
    return canvas.figure(height + 0.2 * -(-len(groups) // _columns(groups)))


def _legend(figure: "Figure", groups: Sequence[Group]) -> None:
    figure.legend(loc="outside upper left", ncols=_columns(groups))


def look(group: int) -> tuple[str, str, str]:
    """Colour, line style and marker of a group; style and marker change when the colours repeat."""
    turn = group // len(canvas.CYCLE)
    return canvas.CYCLE[group % len(canvas.CYCLE)], ("-", "--", ":", "-.")[turn % 4], ("o", "s", "^", "D")[turn % 4]


def costs(groups: Sequence[Group], timed: Mapping) -> dict[str, list[Point]]:
    """Points by x-axis label; FLOPs and latency only for last tickets."""
    found: dict[str, list[Point]] = {"density": [], "ticket, MiB": [], "MFLOPs, slim": [], "ms at batch 1, slim": []}
    for i, group in enumerate(groups):
        for run in group.runs:
            for row in run.rows:
                score = group.top1(row)
                found["density"].append(Point(row.density, score, i))
                found["ticket, MiB"].append(Point(row.ticket_bytes / 2**20, score, i))
        if group.scores and group.counted:
            found["MFLOPs, slim"].append(Point(group.counted["flops"]["slim"] / 1e6, group.mean, i))
        if group.scores and timed and timed[min(timed)][i]:
            found["ms at batch 1, slim"].append(Point(1000 * timed[min(timed)][i]["median"], group.mean, i))
    return {name: points for name, points in found.items() if len(points) > 1}


def fronts(groups: Sequence[Group], timed: Mapping) -> "Figure | None":
    """Top-1 against density, size, FLOPs and latency."""
    panels = costs(groups, timed)
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = _figure(groups, 0.3 + 2.2 * rows)
    figure.get_layout_engine().set(wspace=0.08)
    grid = figure.subplots(rows, 2, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, points) in zip(grid.flat, panels.items(), strict=False):
        best = front(points)
        axes.plot([p.x for p in best], [p.y for p in best], color=canvas.GREY, linewidth=1, zorder=1)
        for i, group in enumerate(groups):
            own = [p for p in points if p.group == i]
            label = _label(group) if own and axes is grid[0, 0] else None
            color, _, marker = look(i)
            axes.scatter(
                [p.x for p in own], [p.y for p in own], s=22, color=color, marker=marker, label=label, zorder=2
            )
        axes.set(xlabel=name)
        axes.locator_params(axis="x", nbins=4)
    for axes in grid[:, 0]:
        axes.set_ylabel("top-1, %")
    _legend(figure, groups)
    return figure
