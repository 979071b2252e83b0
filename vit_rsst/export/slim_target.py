"""slim: the small model as a slim folder."""

from pathlib import Path

import torch
from torch import Tensor, nn

import vit_rsst
from vit_rsst.export.work import Target, Work
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.tickets import slim_folder
from vit_rsst.tickets.ticket_file import Ticket

USAGE = """\
import json

import numpy as np
import torch
import vit_rsst
from PIL import Image, ImageOps

model = vit_rsst.load(".")  # "." is this folder
data = json.load(open("config.json"))["data"]
size, kernel = data["image_size"], Image.Resampling[data["interpolation"].upper()]
image = Image.open("image.png").convert("RGB")
image = ImageOps.fit(image, (size, size), kernel, bleed=(1 - data["crop_pct"]) / 2)
pixels = (torch.tensor(np.asarray(image)) / 255 - torch.tensor(data["mean"])) / torch.tensor(data["std"])
with torch.no_grad():
    logits = model(pixels.permute(2, 0, 1)[None])
print(data["classes"][int(logits.argmax())])
"""


def check(work: Work) -> None:
    """Every ticket has a slim form; without dead units it is as large as the dense one."""


def write(work: Work, folder: Path) -> None:
    """config.json and model.safetensors."""
    state = work.slim.net.state_dict()
    mask = MaskSet({name: state[name] != 0 for name in work.trained.mask})
    header = work.header | work.slim.header | {"density": repr(mask.density)}
    slim_folder.write(folder, Ticket(state, mask, header))


def load(folder: str | Path) -> nn.Module:
    """`vit_rsst.load`, under the name that model cards written by 0.1 use."""
    return vit_rsst.load(folder)


@torch.no_grad()
def logits(folder: Path, images: Tensor) -> Tensor:
    """Logits of the folder, loaded as a user would."""
    return load(folder)(images)


TARGET = Target("vit_rsst", check, write, logits, lambda work: USAGE, is_slim=True, options=("round_to",))
