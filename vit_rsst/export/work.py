"""What is exported, and to what: a trained network on its way out, and the form that a target gives it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from vit_rsst.models import hub
from vit_rsst.models.catalog import stock
from vit_rsst.models.slim import SlimForm
from vit_rsst.tickets import rounds
from vit_rsst.tickets.trained import Trained, open_trained

TOLERANCE = 1e-5
"""Largest difference of logits in float32, as a share of the largest logit, where that is more than 1."""


@dataclass(frozen=True)
class Work:
    """A ticket or slim folder on its way out.

    Attributes:
        trained: its network with all zeros, and what its header says.
        round_to: widths of a slim model are rounded up to a multiple of it.
        opset: of ONNX; None: the exporter's own.
    """

    trained: Trained
    round_to: int = 1
    opset: int | None = None

    @classmethod
    def of(cls, what: Path, round_to: int = 1, opset: int | None = None) -> "Work":
        """Opens a ticket, the last ticket of a run, or a slim folder; see `open_trained`."""
        return cls(open_trained(what), round_to, opset)

    @property
    def path(self) -> Path:
        return self.trained.path

    @property
    def net(self) -> nn.Module:
        return self.trained.net

    @property
    def header(self) -> dict[str, str]:
        """As the run wrote it, less where data and weights lie on this machine: what is exported goes to others."""
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
        """What of it neither timm nor transformers can build; empty when they can."""
        if "widths" in self.header:
            return "a slim shape"
        return "" if stock(self.architecture).is_stock else repr(self.architecture)

    @cached_property
    def slim(self) -> SlimForm:
        return SlimForm(self.net, self.trained.mask, self.round_to)

    def images(self, count: int = 5) -> Tensor:
        """Random images as the model takes them: normalised float32, (count, 3, size, size)."""
        size = self.trained.data.size
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    def measured(self) -> dict[str, float]:
        """Scores of the ticket's round, where it lies in a run folder and has met the test split."""
        result = self.path.with_suffix(".json")
        if not (self.path.is_file() and result.is_file()):
            return {}
        row = rounds.load_result(result).get("row", {})
        if row.get("ticket_bytes") != self.path.stat().st_size:  # the result of another ticket of that name
            return {}
        return {key: row[key] for key in ("test_top1", "test_loss", "val_top1") if row.get(key) is not None}


@dataclass(frozen=True)
class Target:
    """A form that a ticket is exported to.

    Attributes:
        library: who loads it, as the Hub names it.
        check: raises InputError when the ticket has no such form, MissingRequirement when a package is missing.
        write: puts all files but the card into an empty folder.
        logits: of images, from the folder as its reader loads it; None when that cannot be had here.
        usage: python code that does so, for the card; it runs inside the folder, beside an `image.png`.
        is_slim: whether units that are gone are cut out.
        tolerance: largest difference of logits from the ticket's, as a share of the largest logit (at least 1).
        options: of the command line, that have an effect.
    """

    library: str
    check: Callable[[Work], None]
    write: Callable[[Work, Path], None]
    logits: Callable[[Path, Tensor], Tensor | None]
    usage: Callable[[Work], str]
    is_slim: bool = False
    tolerance: float = TOLERANCE
    options: tuple[str, ...] = ()
