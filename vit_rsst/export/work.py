"""The two sides of an export: the trained network (`Work`) and the format it is written to (`Target`)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vit_rsst.data.images import ImageData
from vit_rsst.data.sources import open_data
from vit_rsst.data.transforms import normalize
from vit_rsst.errors import InputError, at_field
from vit_rsst.models import hub
from vit_rsst.models.catalog import stock
from vit_rsst.models.slim import SlimForm
from vit_rsst.seeds import derived_seed
from vit_rsst.tickets import rounds
from vit_rsst.tickets.trained import Trained, open_trained

TOLERANCE = 1e-5
"""Largest allowed difference of float32 logits, relative to the largest logit, or absolute if that is below 1."""

CALIBRATION_IMAGES = 256

Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class Options:
    """Options of the command line, with their defaults.

    Attributes:
        round_to: round widths of a slim model up to a multiple of this.
        opset: ONNX opset; None: the exporter's default.
        precision: of the weights.
        int8_keep: globs of layers to keep in float32 under int8.
        data: dataset folder for calibration, if it has moved.
        semi_structured: store 2:4 layers compressed, in float16, for GPUs.
    """

    round_to: int = 1
    opset: int | None = None
    precision: Precision = "fp32"
    int8_keep: tuple[str, ...] = ()
    data: str | None = None
    semi_structured: bool = False


@dataclass(frozen=True)
class Work:
    """A ticket or slim folder to export.

    Attributes:
        trained: the network, pruned weights as zeros, and the ticket's header.
    """

    trained: Trained
    options: Options = field(default_factory=Options)

    @classmethod
    def of(cls, what: Path, options: Options | None = None) -> "Work":
        """Opens a ticket, the last ticket of a run, or a slim folder; see `open_trained`."""
        return cls(open_trained(what), options or Options())

    @property
    def path(self) -> Path:
        return self.trained.path

    @property
    def net(self) -> nn.Module:
        return self.trained.net

    @property
    def header(self) -> dict[str, str]:
        """The ticket's header without local paths of data and weights, since exports are shared."""
        header = self.trained.header
        args = {k: v for k, v in self.model_args.items() if k != hub.PLACE or not Path(v).is_absolute()}
        data = json.loads(header["data"]) | {"path": None}
        return header | {"model_args": json.dumps(args), "data": json.dumps(data)}

    @property
    def architecture(self) -> str:
        return self.trained.header["architecture"]

    @property
    def model_args(self) -> dict:
        return json.loads(self.trained.header["model_args"])

    @property
    def is_hub(self) -> bool:
        """Whether it is a model of transformers."""
        return self.architecture.startswith(hub.PREFIX)

    @property
    def lacks_stock(self) -> str:
        """Why neither timm nor transformers can build the network; empty if one can."""
        if "widths" in self.header:
            return "a slim shape"
        return "" if stock(self.architecture).is_stock else repr(self.architecture)

    @cached_property
    def slim(self) -> SlimForm:
        return SlimForm(self.net, self.trained.mask, self.options.round_to)

    def images(self, count: int = 5) -> Tensor:
        """Random input: normalised float32, (count, 3, size, size)."""
        size = self.trained.data.size
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    @cached_property
    def dataset(self) -> ImageData:
        """The dataset that the run trained on, for calibration.

        Raises:
            RunError: it cannot be opened.
        """
        options = self.trained.data
        with at_field("--int8 needs the training images; --data PATH says where they are now"):
            return open_data(replace(options, path=self.options.data or options.path), self.trained.seed)

    @cached_property
    def calibration(self) -> Tensor:
        """Normalised training images, balanced over classes.

        Raises:
            InputError: there are none.
        """
        seed = derived_seed(self.trained.seed, "calibration")
        images = self.dataset.balanced("train", CALIBRATION_IMAGES, seed).images
        if not len(images):
            raise InputError("--int8: no training images to calibrate on; pass a dataset that has some as --data.")
        return normalize(images, self.trained.mean, self.trained.std)

    def measured(self) -> dict[str, float]:
        """Test scores from the ticket's run folder; empty if the ticket lies elsewhere or was not tested."""
        result = self.path.with_suffix(".json")
        if not (self.path.is_file() and result.is_file()):
            return {}
        row = rounds.load_result(result).get("row", {})
        if row.get("ticket_bytes") != self.path.stat().st_size:  # the result of another ticket of that name
            return {}
        return {key: row[key] for key in ("test_top1", "test_loss", "val_top1") if row.get(key) is not None}


@dataclass(frozen=True)
class Section:
    """A section of the model card that reports a measurement.

    Attributes:
        rows: table rows, the header first; may be empty.
        sentences: text below the table.
    """

    title: str
    rows: Sequence[tuple[str, ...]]
    sentences: Sequence[str]


@dataclass(frozen=True)
class Target:
    """A format that tickets are exported to.

    Attributes:
        library: the library that loads it, by its name on the Hub.
        check: raises InputError if the ticket cannot be exported to it, MissingRequirement if a package is missing.
        write: writes all files except the card into an empty folder.
        logits: logits of images, from the folder as its library loads it; None if this machine cannot run it.
        usage: Python code for the card that does the same; runs inside the folder, next to an `image.png`.
        is_slim: whether dead units are cut out.
        tolerance: largest allowed difference from the ticket's logits, relative to the largest logit (at least 1).
        options: command-line options that have an effect.
        measured: sections of the card, measured on the finished files.
    """

    library: str
    check: Callable[[Work], None]
    write: Callable[[Work, Path], None]
    logits: Callable[[Path, Tensor], Tensor | None]
    usage: Callable[[Work], str]
    is_slim: bool = False
    tolerance: float = TOLERANCE
    options: tuple[str, ...] = ()
    measured: Callable[[Work, Path], Sequence[Section]] = lambda work, folder: ()
