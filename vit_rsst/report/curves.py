"""Figures that need only the run folder: curves, rounds, sparsity by layer, units left, weight magnitudes."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vit_rsst.analysis.counts import block_of, kind_of
from vit_rsst.report import canvas
from vit_rsst.report.history import History, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure of a run.

    Attributes:
        name: of its file, without suffix.
        title, caption: for the report.
        draw: returns the figure; None if the run has nothing to show.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[History], "Figure | None"]


def curves(history: History) -> "Figure | None":
    """Training and validation loss and accuracy over epochs, with round boundaries."""
    epochs = history.epochs
    if not epochs:
        return None
    figure = canvas.figure(3.6)
    loss, accuracy = figure.subplots(2, 1, sharex=True)
    for axes, key in ((loss, "loss"), (accuracy, "top1")):
        for part, color in (("train", canvas.GREY), ("val", canvas.BLUE)):
            _line(axes, epochs, "global_epoch", f"{part}/{key}", label="validation" if part == "val" else "training",
                  color=color)  # fmt: skip
        _round_marks(axes, history)
    loss.set_ylabel("loss")
    accuracy.set(ylabel="top-1, %", xlabel="epoch")
    canvas.count(accuracy, (event["global_epoch"] for event in epochs))
    _legend(loss)
    return figure


def rate_and_penalty(history: History) -> "Figure | None":
    """Learning rate, penalty and remaining size of the condemned weights over steps."""
    rates = sorted([*history.steps, *history.epochs], key=lambda event: event["step"])
    if not rates:
        return None
    penalised = [event for event in history.epochs if "prune/penalty" in event]
    figure = canvas.figure(3.4 if penalised else 2.0)
    axes = figure.subplots(2 if penalised else 1, 1, sharex=True, squeeze=False)[:, 0]
    _line(axes[0], rates, "step", "train/lr", color=canvas.BLUE)
    axes[0].set_ylabel("learning rate")
    if penalised:
        parts = {"prune/penalty": ("o-", "penalty", canvas.RED)}
        parts["prune/condemned_left"] = ("s-", "condemned size left", canvas.PURPLE)
        for round, group in itertools.groupby(penalised, key=lambda event: event["round"]):
            events = list(group)
            for key, (style, label, color) in parts.items():
                label = label if round == penalised[0]["round"] else None
                _line(axes[1], events, "step", key, style, label=label, color=color, markersize=3, linewidth=0.9)
        axes[1].set(ylabel="penalty, share left", ylim=(-0.05, None))
        _legend(axes[1])
    canvas.count(axes[-1], (event["step"] for event in rates))
    axes[-1].set_xlabel("optimizer step")
    return figure


def accuracy_by_density(history: History) -> "Figure | None":
    """Accuracy of each round's ticket over its density, and the immediate cost of each removal."""
    rows = [row for row in history.rows if row.density > 0]
    if len(rows) < 2:
        return None
    figure = canvas.figure(3.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([r.density for r in rows], [r.val_top1 for r in rows], "o-", label="validation", color=canvas.BLUE)
    tested = [r for r in rows if r.test_top1 is not None]
    if tested:
        top.plot([r.density for r in tested], [r.test_top1 for r in tested], "s--", label="test", color=canvas.ORANGE)
    top.set_ylabel("top-1, %")
    _legend(top)
    gaps = [r for r in rows if r.what_if_gap is not None]
    bottom.vlines([r.density for r in gaps], 0, [r.what_if_gap for r in gaps], color=canvas.RED, linewidth=4)
    bottom.axhline(0, color=canvas.GREY, linewidth=0.8)
    shown = [r.what_if_gap for r in gaps]
    limits = (min([-0.5, *shown]), 1.1 * max([1.0, *shown]))  # noise below a point must not look like a cliff
    bottom.set(ylabel="what-if gap", xlabel="density of the prunable weights", ylim=limits)
    bottom.set_xscale("log")
    ticks = _apart([r.density for r in rows])
    bottom.set_xticks(ticks, [f"{density:.2g}" for density in ticks])
    bottom.minorticks_off()
    bottom.invert_xaxis()
    return figure


def layers(history: History) -> "Figure | None":
    """Sparsity by layer over rounds: one panel per kind of layer, one row per block, one column per round."""
    found = [report["layers"] for report in history.pruning if report.get("layers")]
    if not found or all(layer["density"] == 1.0 for report in found for layer in report.values()):
        return None
    kinds = list(dict.fromkeys(kind_of(name) for name in found[-1]))
    blocks = sorted({block_of(name) for name in found[-1]}, key=_natural)
    panels = kinds[:8]
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = canvas.figure(rows * min(1.0 + 0.2 * len(blocks), 4.2))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, kind in zip(grid.flat, panels, strict=False):
        cells = [[_sparsity(report, f"{block}.{kind}".lstrip(".")) for report in found] for block in blocks]
        mesh = axes.pcolormesh(cells, cmap=canvas.HEAT, vmin=0, vmax=1, edgecolors=canvas.GROUND, linewidth=0.4)
        axes.set(title=kind.split(".")[-1])
        axes.grid(visible=False)
        _name_cells(axes.set_xticks, [str(i) for i in range(len(found))], 6 if len(found) <= 10 else 4)
    _name_cells(grid[0, 0].set_yticks, [block.split(".")[-1] or "–" for block in blocks], 12)
    grid[0, 0].invert_yaxis()
    figure.supxlabel("round", fontsize=10)
    figure.supylabel("block", fontsize=10)
    figure.colorbar(mesh, ax=grid, label="sparsity", shrink=0.9).outline.set_visible(False)
    return figure


def units(history: History) -> "Figure | None":
    """Heads, neurons and channels left in each block, round by round."""
    found = [report["units"] for report in history.pruning if report.get("units")]
    if not found:
        return None
    from matplotlib import colormaps

    kinds = list(dict.fromkeys(group["kind"] for group in found[-1].values()))
    figure, last = canvas.figure(2.6), len(found) - 1
    low, high = canvas.LINES
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for i, report in enumerate(found):
            left = [group["alive"] for group in report.values() if group["kind"] == kind]
            is_named = axes is panels[0] and (i in (0, last) or last < 5)
            shade = colormaps[canvas.HEAT](low + (high - low) * i / max(last, 1))
            label = f"round {i}" if is_named else None
            axes.step(range(len(left)), left, where="mid", color=shade, label=label)
        axes.set(title=f"{kind}s left", xlabel="block", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside upper right", ncols=5)
    return figure


def sizes(history: History) -> "Figure | None":
    """Magnitudes of kept and condemned weights, at moments of the round that saw most of the condemned."""
    filled = [event for event in history.weights if sum(event["kept"])]
    by_round = [list(events) for _, events in itertools.groupby(filled, key=lambda event: event["round"])]
    if not by_round:
        return None
    moments = _spread(max(by_round, key=lambda events: (sum("condemned" in e for e in events), events[0]["round"])), 5)
    figure = canvas.figure(0.9 + 0.55 * len(moments))
    panels = figure.subplots(len(moments), 1, sharex=True, squeeze=False)[:, 0]
    for axes, event in zip(panels, moments, strict=True):
        for part, color in (("kept", canvas.BLUE), ("condemned", canvas.RED)):
            counts = event.get(part) or []
            if sum(counts):
                heights = [count / max(counts) for count in counts]
                axes.stairs(heights, event["edges"], fill=True, alpha=0.55, color=color, label=part)
        axes.set(ylim=(0, 1.1), yticks=[])
        axes.set_ylabel(f"epoch {event['epoch']}", rotation=0, ha="right", va="center")
        axes.grid(visible=False)
    _legend(panels[0])
    panels[0].set_title(f"round {moments[0]['round']}", loc="left")
    seen = [edge for event in moments for part in ("kept", "condemned") for edge in _extent(event, part)]
    panels[-1].set(xlabel="log₁₀ |weight| (each histogram scaled to its peak)", xlim=(min(seen) - 0.2, max(seen) + 0.2))
    return figure


DRAWINGS = (
    Drawing("curves", "Loss and accuracy", "Dotted lines separate rounds.", curves),
    Drawing(
        "rate_and_penalty",
        "Learning rate and penalty",
        "The penalty shrinks the condemned weights, those about to be removed, towards zero.",
        rate_and_penalty,
    ),
    Drawing(
        "accuracy_by_density",
        "Accuracy by density",
        "One point per round. The what-if gap is the drop in validation top-1 caused by the removal alone, in points.",
        accuracy_by_density,
    ),
    Drawing("layers", "Sparsity by layer", "One panel per kind of layer; bright is sparse.", layers),
    Drawing("units", "Units left", "Units left in each block, round by round.", units),
    Drawing("sizes", "Weight magnitudes", "Kept and condemned weights over the course of one round.", sizes),
)


def _line(axes: "Axes", events: Sequence[dict], x: str, y: str, style: str = "-", **options: object) -> None:
    points = [(event[x], number(event, y)) for event in events if y in event]
    points = [(a, b) for a, b in points if math.isfinite(b)]
    if points:
        is_one = len({x for x, _ in points}) == 1
        axes.plot(*zip(*points, strict=True), "o" if is_one else style, **options)


def _legend(axes: "Axes") -> None:
    """Above the axes, clear of the lines; omitted without labels."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1)


def _round_marks(axes: "Axes", history: History) -> None:
    for before, event in itertools.pairwise(history.epochs):
        if event["round"] != before["round"]:
            axes.axvline(before["global_epoch"] + 0.5, color=canvas.GREY, linewidth=0.7, linestyle=":")


def _name_cells(set_ticks: Callable, names: Sequence[str], most: int) -> None:
    """Tick labels in the middle of the cells, at most `most` of them."""
    every = -(-len(names) // most)
    set_ticks([i + 0.5 for i in range(len(names))][::every], names[::every])


def _apart(densities: Sequence[float], least: float = 0.12) -> list[float]:
    """The first, the last, and those in between at least a share of the log axis apart from the others."""
    first, *between, last = densities
    span, kept = math.log(first / last), [first]
    for density in between:
        if math.log(kept[-1] / density) > least * span and math.log(density / last) > least * span:
            kept.append(density)
    return [*kept, last] if last != first else [first]


def _extent(event: dict, part: str) -> tuple[float, ...]:
    """The outermost edges of a histogram's filled bins."""
    filled = [i for i, count in enumerate(event.get(part, ())) if count]
    return (event["edges"][filled[0]], event["edges"][filled[-1] + 1]) if filled else ()


def _sparsity(report: dict, layer: str) -> float:
    found = report.get(f"{layer}.weight")
    return math.nan if found is None else 1.0 - found["density"]


def _natural(name: str) -> list:
    """`blocks.10` after `blocks.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _spread(items: Sequence, most: int) -> list:
    """At most `most` items, evenly spread, first and last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
