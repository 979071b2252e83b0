"""dense: the state dict, zeros included, in `model.safetensors`, for the architecture's own library."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vit_rsst.export.work import Target, Work
from vit_rsst.models import zoo
from vit_rsst.tickets import slim_folder, ticket_file
from vit_rsst.tickets.ticket_file import Ticket

TIMM_USAGE = """\
import json

import timm
from safetensors.torch import load_file

config = json.load(open("config.json"))
model = timm.create_model(config["architecture"], **config["model_args"]).eval()
model.load_state_dict(load_file("model.safetensors"))
"""
USAGE = """\
import json

from safetensors.torch import load_file
from vit_rsst.tickets.slim_folder import as_header
from vit_rsst.models import zoo

config = json.load(open("config.json"))
model = zoo.described(as_header(config), "config.json").eval()
model.load_state_dict(load_file("model.safetensors"))
"""


def check(work: Work) -> None:
    """Every ticket has a dense form."""


def write(work: Work, folder: Path) -> None:
    """config.json and model.safetensors."""
    slim_folder.write(folder, Ticket(work.net.state_dict(), work.trained.mask, work.header), slim_folder.DENSE)


@torch.no_grad()
def logits(folder: Path, images: Tensor) -> Tensor:
    """Logits of the folder, loaded as a user would."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    net = zoo.described(slim_folder.as_header(config), str(folder))
    ticket_file.load_state_(net, load_file(folder / "model.safetensors"), str(folder))
    return net.eval()(images)


def usage(work: Work) -> str:
    """Code that loads the folder; needs only timm if timm can build the model."""
    return TIMM_USAGE if not work.lacks_stock and not work.is_hub else USAGE


TARGET = Target("vit_rsst", check, write, logits, usage)
