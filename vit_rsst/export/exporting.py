"""Exports a ticket: writes to a temporary folder, reads it back, compares it with the ticket, then renames it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from vit_rsst import files
from vit_rsst.errors import OF_A_LIBRARY, InputError, MissingRequirement, RunError, first_line, unknown
from vit_rsst.export import dense_folder, onnx_file, program_file, slim_target, timm_folder, transformers_folder
from vit_rsst.export.card import Card
from vit_rsst.export.semi_structured import note
from vit_rsst.export.work import Options, Precision, Section, Target, Work
from vit_rsst.text import aligned, size

TARGETS: dict[str, Target] = {
    "slim": slim_target.TARGET,
    "timm": timm_folder.TARGET,
    "transformers": transformers_folder.TARGET,
    "dense": dense_folder.TARGET,
    "onnx": onnx_file.TARGET,
    "torch": program_file.TARGET,
}

LOOSER = {"fp16": 1e-2, "bf16": 1e-1, "int8": float("inf")}
"""Precision → tolerance for logits; what int8 costs is measured as accuracy."""


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        sizes: file name → bytes.
        difference: maximum difference from the ticket's logits, relative to the largest; None: not compared.
        is_narrower: whether the slim form has fewer units than the dense model.
        is_slim: whether this is the slim form.
        note: what its sparsity pattern is good for.
        measured: sections of its card.
    """

    path: Path
    folder: Path
    sizes: dict[str, int]
    difference: float | None
    is_narrower: bool
    is_slim: bool
    note: str = ""
    measured: Sequence[Section] = ()

    def text(self) -> str:
        """Files and their sizes, the comparison with the ticket, and whether units were removed."""
        lines = [f"{self.path} → {self.folder}", *(f"  {name:28}{size(num)}" for name, num in self.sizes.items())]
        if self.difference is None:
            lines.append("not compared with the ticket: onnxruntime is not installed (pip install 'vit-rsst[onnx]')")
        else:
            lines.append(f"compared with the ticket: logits differ by {self.difference:.1e} of the largest")
        if self.is_slim and not self.is_narrower:
            lines.append("no dead heads, neurons or channels: same widths as the dense model")
        lines += [self.note] if self.note else []
        for section in self.measured:
            lines += ["", *([aligned(section.rows, num_left=1)] if section.rows else []), *section.sentences]
        return "\n".join(lines)


def export(
    what: Path,
    to: str,
    folder: Path,
    round_to: int | None = None,
    opset: int | None = None,
    precision: Precision | None = None,
    int8_keep: Sequence[str] = (),
    data: str | None = None,
    semi_structured: bool = False,
) -> Exported:
    """Exports a ticket, the last ticket of a run, or a slim folder; see `Options`.

    Raises:
        InputError: unknown target, a non-empty folder, an option without effect, or a model that the target does not
            support.
        MissingRequirement: a package is missing, or the folder cannot be written.
        Damaged: the ticket cannot be read.
        RunError: the exported model's logits differ from the ticket's.
    """
    if to not in TARGETS:
        raise InputError(f"--to: {unknown('target', to, TARGETS)}")
    target, folder = TARGETS[to], folder.absolute()
    given = {"round_to": round_to, "opset": opset, "precision": precision, "int8_keep": tuple(int8_keep), "data": data}
    given["semi_structured"] = semi_structured
    options = Options(**{name: value for name, value in given.items() if value not in (None, ())})
    _check_options(to, target, options)
    check_vacant(folder)
    work = Work.of(what, options)
    target.check(work)
    try:
        with files.whole_folder(folder) as temporary:
            target.write(work, temporary)
            found, measured = _compared(work, target, temporary), target.measured(work, temporary)
            card = _card(work, target, temporary, folder.name, found, measured)
            files.write_text(temporary / "README.md", card.text())
            sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    except (OSError, SafetensorError) as error:
        raise MissingRequirement(
            f"{folder}: cannot be written ({error}); free some space, or choose another folder."
        ) from error
    return Exported(work.path, folder, sizes, found, work.slim.is_narrower, target.is_slim, note(work), measured)


def check_vacant(folder: Path) -> None:
    """Raises:
    InputError: it exists and is not empty.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder}: already exists and is not empty; name a new or empty folder.")


def _check_options(to: str, target: Target, options: Options) -> None:
    for name, option in _given(options):
        if name not in target.options:
            others = " and ".join(key for key, other in TARGETS.items() if name in other.options)
            raise InputError(f"{option}: has no effect with --to {to}, only with {others}; leave it out.")
        if name in ("int8_keep", "data") and options.precision != "int8":
            raise InputError(f"{option}: has no effect without --int8; set it, or leave this out.")
    for name in ("round_to", "opset"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: {value} is less than 1; give at least 1.")


def _given(options: Options) -> Iterator[tuple[str, str]]:
    """Name and flag of every option that differs from its default."""
    for one in fields(options):
        value = getattr(options, one.name)
        if value != one.default:
            yield one.name, f"--{value if one.name == 'precision' else one.name.replace('_', '-')}"


@torch.no_grad()
def _compared(work: Work, target: Target, folder: Path) -> float | None:
    """Maximum difference from the ticket's logits, relative to its largest logit (at least 1).

    On random images; for int8, whose range is that of the training images, on some of those.
    """
    precision = work.options.precision
    images = work.calibration[:5] if precision == "int8" else work.images()
    expected = work.net(images)
    try:
        found = target.logits(folder, images)
    except RunError:
        raise
    except OF_A_LIBRARY as error:
        raise RunError(
            f"{work.path}: the exported model fails ({first_line(error)}); its units cannot be removed, use --to dense."
        ) from error
    if found is None:
        return None
    difference = relative_difference(expected, found)
    tolerance = LOOSER.get("fp16" if work.options.semi_structured else precision, target.tolerance)
    if not difference <= tolerance:  # also catches NaN
        raise RunError(
            f"{work.path}: the exported model does not match the ticket: logits differ by {difference:.1e} of the "
            f"largest (tolerance {tolerance:.0e}). The export was discarded; please report this."
        )
    return difference


def _card(
    work: Work, target: Target, folder: Path, name: str, found: float | None, measured: Sequence[Section]
) -> Card:
    images = "training images" if work.options.precision == "int8" else "random images"
    compared = (
        "The files were not compared with the ticket: onnxruntime was not installed."
        if found is None
        else f"Compared with the ticket on {images}: logits differ by {found:.1e} of the largest."
    )
    net = work.slim.net if target.is_slim else work.net
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    return Card(work, name, target.library, net, largest, compared, target.usage(work), measured)


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """max|Δ| / max(1, max|expected|)."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
