"""The analysis as text: one column per subject, then a table of blocks for each with zeros. At most 120 wide, or "
"the terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from vit_rsst.analysis.counts import block_of, kind_of
from vit_rsst.text import aligned, duration, size, terminal_width

WIDTH = 120
NONE = "–"
Row = tuple[str, list[str]]


def analysis_text(result: Mapping) -> str:
    """Everything except single layers, which are in the JSON."""
    items = result["items"]
    rows = [row for part in (counted_rows, latency_rows, memory_rows) for row in part(items)]
    parts = list(side_by_side([item["what"] for item in items], rows))
    notes = []
    if "flops" in items[0]:
        notes.append("FLOPs per image; one multiply-accumulate (MAC) is 2 FLOPs. Effective: non-zero weights only.")
    if "latency" in items[0]:
        notes.append(
            f"Time: median [quartiles], {result['precision']}, {result['device']}, {result['threads']} thread(s). "
            "Dense includes the zeros of its mask."
        )
    if any(item["kind"] == "file" for item in items):
        notes.append("A file runs on the CPU, in its own runtime and precision.")
    if memory := _memory(items):
        what = "the process, including libraries" if memory["dense"]["kind"] == "rss" else "torch allocations"
        notes.append(f"Peak memory of {what}, each in its own process; above: added by the model.")
    if notes:
        parts.append("\n".join(notes))
    parts += [block_table(item) for item in items if item["parameters"].get("density", 1) < 1]
    return "\n\n".join(parts)


def side_by_side(heads: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    """Tables of as many columns as fit, until every subject is shown."""
    first, limit = max(len(label) for label, _ in rows), min(terminal_width() or WIDTH, WIDTH)
    widths = [max(len(head), *(len(cells[i]) for _, cells in rows)) for i, head in enumerate(heads)]
    start = 0
    while start < len(heads):
        end, total = start + 1, first + 2 + widths[start]
        while end < len(heads) and total + 2 + widths[end] <= limit:
            total, end = total + 2 + widths[end], end + 1
        shown = [(label, cells[start:end]) for label, cells in rows]
        lines = [("", *heads[start:end]), *((label, *cells) for label, cells in shown if set(cells) != {NONE})]
        yield aligned(lines, num_left=1)
        start = end


def counted_rows(items: Sequence[Mapping]) -> Iterator[Row]:
    row = partial(_row, items)
    yield row("image size, px", "image_size", show=str)
    yield row("parameters", "parameters", "total", show=number)
    for key in ("prunable", "alive", "slim", "nonzero"):
        yield row(f"  {key}", "parameters", key, show=number)
    yield row("density of prunable weights", "parameters", "density", show="{:.4f}".format)
    for key in ("dense", "effective", "slim"):
        yield row(f"MFLOPs {key}", "flops", key, show=lambda value: f"{value / 1e6:,.1f}")
    yield row("ticket or exported file", "bytes", "file", show=size)
    yield row("dense in fp32", "bytes", "dense_fp32", show=size)
    yield row("slim in fp32", "bytes", "slim_fp32", show=size)
    yield row("training memory, estimated", "training", "computed_bytes", show=size)
    yield row("  at batch", "training", "batch", show=str)


def latency_rows(items: Sequence[Mapping]) -> Iterator[Row]:
    """Per batch: milliseconds of dense, slim and file, speedup of slim, images per second."""
    for batch in next(iter(items[0].get("latency", {}).values()), {}):
        found = {name: [_at(item, ("latency", name, batch)) for item in items] for name in ("dense", "slim", "file")}
        for name, times in found.items():
            yield f"batch {batch}: {name}, ms", [NONE if t is None else spread(t) for t in times]
        pairs = list(zip(found["dense"], found["slim"], strict=True))
        yield "  slim, speedup", [NONE if b is None else f"{a['median'] / b['median']:.2f}" for a, b in pairs]
        for name, times in found.items():
            yield f"  {name}, images/s", [NONE if t is None else f"{t['images_per_s']:,.1f}" for t in times]


def memory_rows(items: Sequence[Mapping]) -> Iterator[Row]:
    """Peak memory of inference and training, also relative to the empty process, and the time of training."""
    memory = _memory(items)
    if memory is None:
        return

    row = partial(_row, items)
    for name in ("dense", "slim"):
        yield row(
            f"peak memory, batch {memory['batch']}: {name}", "memory", name, show=lambda probe: peak(probe, "inference")
        )
    yield row("peak memory, training", "memory", "dense", show=lambda probe: peak(probe, "training"))
    yield row("  measured at batch", "memory", "dense", "train_batch", show=str)
    yield row("  time per step, ms", "memory", "dense", "step", show=spread)
    yield row("  epoch of 50,000 images", "epoch_seconds", show=duration)


def _row(items: Sequence[Mapping], label: str, *path: str, show: Callable[[Any], str]) -> Row:
    found = [_at(item, path) for item in items]
    return label, [NONE if value is None else show(value) for value in found]


def _memory(items: Sequence[Mapping]) -> Mapping | None:
    """Of the first subject that has been measured; files are not."""
    return next((item["memory"] for item in items if "memory" in item), None)


def block_table(item: Mapping) -> str:
    """One line per block: density of each layer, its share of all weights alive, and units left."""
    layers, blocks, units = item["layers"], {}, {}
    for name, layer in layers.items():
        blocks.setdefault(block_of(name), {})[kind_of(name)] = layer
    for group in item["units"]:
        left, of = units.setdefault((block_of(group["name"]), group["kind"]), [0, 0])
        units[block_of(group["name"]), group["kind"]] = [left + group["left"], of + group["units"]]
    unit_kinds = list(dict.fromkeys(kind for _, kind in units))
    kinds = list(item["kinds"])
    lines = [("block", *(kind.split(".")[-1] for kind in kinds), *(f"{kind}s" for kind in unit_kinds), "share")]
    for block, by_kind in {**blocks, "all": item["kinds"]}.items():
        cells = [f"{k['density']:.3f} {k['share']:5.1%}" if (k := by_kind.get(kind)) else NONE for kind in kinds]
        cells += [_left(units, block, kind) for kind in unit_kinds]
        lines.append((block or NONE, *cells, f"{sum(layer['share'] for layer in by_kind.values()):.1%}"))
    head = f"{item['what']}: density of each layer, its share of all weights alive, and units left"
    return f"{head}\n{aligned(lines, num_left=1)}"


def _left(units: Mapping, block: str, kind: str) -> str:
    found = [value for (where, what), value in units.items() if what == kind and block in (where, "all")]
    return f"{sum(left for left, _ in found)}/{sum(of for _, of in found)}" if found else NONE


def _at(tree: Mapping, path: Sequence[str]) -> object:
    for key in path:
        tree = tree.get(key, {}) if isinstance(tree, Mapping) else {}
    return None if tree == {} else tree


def number(value: int) -> str:
    return f"{value:,}"


def spread(times: Mapping) -> str:
    """`12.3 [12.1–12.9]` in milliseconds."""
    median, low, high = (1000 * times[key] for key in ("median", "low", "high"))
    digits = 2 if median < 100 else 0
    return f"{median:,.{digits}f} [{low:,.{digits}f}–{high:,.{digits}f}]"


def peak(probe: Mapping, what: str) -> str:
    return f"{size(probe[what])} ({size(probe[what] - probe['before'])} above)"
