"""A report as plain blocks, rendered as one self-contained HTML page and as Markdown with figure files.

Blocks hold raw text; only the two renderers escape.
"""

import functools
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from vit_rsst import files
from vit_rsst.errors import MissingRequirement
from vit_rsst.report import canvas

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]
    kind: str = "bullets"


@dataclass(frozen=True)
class Facts:
    """Names with values."""

    items: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; names in the first column, numbers in the others."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Image:
    """A figure as SVG text."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Gallery:
    """Images side by side, as many as fit."""

    images: Sequence[Image]
    kind: str = "gallery"


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[object]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        badge: state of the run, in a word.
        lead: the line below the title.
    """

    title: str
    badge: str
    lead: str
    sections: Sequence[Section] = field(default_factory=tuple)

    @property
    def images(self) -> list[Image]:
        return [image for s in self.sections for b in s.blocks if isinstance(b, Gallery) for image in b.images]


def write(document: Document, folder: Path) -> Path:
    """Writes report.html, report.md and the figures into a folder; returns the path of the page.

    Raises:
        MissingRequirement: jinja2 is not installed, or the folder is not writable.
    """
    page, text = as_html(document), as_markdown(document)
    try:
        figures = folder / "figures"
        figures.mkdir(parents=True, exist_ok=True)
        for image in document.images:
            files.write_text(figures / f"{image.name}.svg", image.svg)
        files.write_text(folder / "report.md", text)
        files.write_text(folder / "report.html", page)
    except OSError as error:
        raise MissingRequirement(
            f"{folder}: cannot write the report ({error}); name another folder with --out."
        ) from error
    return folder / "report.html"


def as_html(document: Document) -> str:
    """One page without scripts that loads nothing."""
    return _environment().get_template("report.html.j2").render(document=document)


def as_markdown(document: Document) -> str:
    """GitHub Markdown; figures link to files in `figures/`."""
    text = _environment().get_template("report.md.j2").render(document=document)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def markdown(value: object) -> str:
    """Text escaped for Markdown, tables included."""
    text = html.escape(str(value), quote=False).replace("\n", " ")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def breakable(text: object) -> str:
    """For HTML: a path or recipe field that may wrap after each of its parts."""
    return re.sub(r"([/._])(?=\w)", r"\1<wbr>", html.escape(str(text)))


@functools.cache
def _environment() -> object:
    try:
        import jinja2
    except ImportError as error:
        raise MissingRequirement("reports need jinja2: pip install 'vit_rsst[report]'.") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "md": markdown,
        "data_uri": canvas.data_uri,
        "breakable": breakable,
        "quote": quote,
        "fence": _fence,
    }
    return environment


def _fence(text: str) -> str:
    """A fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def shown_path(path: Path) -> str:
    """A path for a command line, relative if that is shorter."""
    here = os.path.relpath(path)
    return here if len(here) < len(str(path)) and not here.startswith("../..") else str(path)
