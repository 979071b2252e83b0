"""Trained models: loads a ticket, run folder or slim folder into a ready network with the data from its header."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vit_rsst.data.options import DataOptions, Imbalance
from vit_rsst.errors import Damaged
from vit_rsst.models import zoo
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.tickets import ticket_file
from vit_rsst.tickets.opening import open_ticket


@dataclass(frozen=True)
class Trained:
    """A network with its weights and its run's preprocessing.

    Attributes:
        net: on the CPU, in evaluation mode; zero where masked.
        mask: of the prunable weights.
        path: of the ticket or slim folder.
        header: strings written by the run.
        data: the run's data options.
        mean, std: per channel.
        classes: class names by label.
    """

    net: nn.Module
    mask: MaskSet
    path: Path
    header: dict[str, str]
    data: DataOptions
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]

    @property
    def seed(self) -> int:
        return int(self.header["seed"])

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The run's precision, in which Accelerate autocasts the forward pass."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.header.get("precision") == "bf16")


def open_trained(what: Path) -> Trained:
    """Builds the network of a ticket, a run folder's last ticket, or a slim folder, from the header alone.

    Raises:
        InputError: a run folder without tickets.
        Damaged: the ticket does not exist, is unreadable, or has a header of another version.
    """
    path, ticket = open_ticket(what)
    for name in ("data", "seed"):
        if name not in ticket.metadata:
            raise Damaged(f"{path}: the header has no {name!r}; the ticket was not written by a run of this version.")
    info = json.loads(ticket.metadata["data"])
    mean, std, classes = tuple(info.pop("mean")), tuple(info.pop("std")), info.pop("classes")
    info.pop("content", None)
    info["imbalance"] = Imbalance(**info.get("imbalance", {}))
    net = zoo.described(ticket.metadata, str(path))
    ticket_file.load_into_(net, ticket, str(path))
    net.eval()
    return Trained(net, ticket.mask, path, ticket.metadata, DataOptions(**info), mean, std, classes)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
