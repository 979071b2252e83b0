"""The look of every figure: one palette for light and dark pages, sizes for a phone, SVG with live text.

A file on disk has a white background, so any viewer shows it; `data_uri` gives the same drawing to a page.
"""

import base64
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit_rsst import files
from vit_rsst.errors import MissingRequirement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#3c82c8", "#df7a35", "#2f9d6c", "#cf4a5c", "#8d6cc0", "#898e97"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, "#b08a1e", "#2aa5b5", GREY)
INK, GROUND = "#1f2328", "#fffffe"
"""Text and background. No figure uses these two for anything else, so a page can replace them."""

SCHEMES = f"<style>svg {{ --ink: {INK} }} @media (prefers-color-scheme: dark) {{ svg {{ --ink: #e4e7eb }} }}</style>"
"""Colours of the text in a page, as in `report.html.j2`."""

SCRIPTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Microsoft YaHei",
)
"""Fonts for more scripts than matplotlib ships; used for bitmaps. An SVG uses the fonts of its viewer."""

HEAT = "viridis"
LINES = (0.25, 0.88)
"""The part of it in which lines are visible on white and on black."""

WIDTH = 5.2
"""Inches. On a 390 px phone a point is 0.9 px, so 10 points stay legible."""


@contextmanager
def drawing() -> Iterator[None]:
    """The style for everything drawn inside.

    Raises:
        MissingRequirement: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingRequirement("figures need matplotlib: pip install 'vit_rsst[report]'.") from error
    from matplotlib.font_manager import get_font_names

    installed = get_font_names()
    style = {
        "font.family": ["DejaVu Sans", *(font for font in SCRIPTS if font in installed)],
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.4,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 1.5,
        "legend.columnspacing": 1.2,
        "figure.facecolor": GROUND,
        "axes.facecolor": "none",
        "savefig.facecolor": GROUND,
        "svg.fonttype": "none",  # text stays text: the viewer's fonts cover any script
        **{name: INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def figure(height: float = 2.6, width: float = WIDTH) -> "Figure":
    """An empty figure with constrained layout; no display, no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def count(axes: "Axes", values: Iterable[int]) -> None:
    """Integer ticks on the horizontal axis; a single value is centred."""
    axes.locator_params(axis="x", integer=True)
    if len(found := set(values)) == 1:
        [only] = found
        axes.set_xlim(only - 0.5, only + 0.5)
        axes.set_xticks([only])


def svg(drawn: "Figure") -> str:
    """The figure as SVG, byte-identical for identical input."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "vit_rsst"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)


def save(drawn: "Figure", path: Path) -> None:
    """Writes the SVG file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, svg(drawn))


def pixels(drawn: "Figure", dpi: int = 150) -> np.ndarray:
    """The figure as a bitmap, uint8 (height, width, 3), for trackers without SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn.set_dpi(dpi)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def data_uri(text: str) -> str:
    """An SVG file as the `src` of an image: nothing in it can run or load; its text follows light and dark mode."""
    text = text.replace(GROUND, "none").replace(INK, "var(--ink)")
    text = re.sub(r"<svg\b[^>]*>", lambda tag: tag[0] + SCHEMES, text, count=1)
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode('utf-8')).decode('ascii')}"
