"""torch: `model.pt2` of the slim model, a program of torch.export for AOTInductor and other compilers of torch.

Its input is float32 `images` (batch, 3, size, size), already normalised; how to prepare them stands beside the program,
in the same file. Its output is `logits` (batch, classes).
"""

import copy
import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vit_rsst import files
from vit_rsst.errors import OF_A_LIBRARY, Damaged, InputError, first_line
from vit_rsst.export import semi_structured, speed
from vit_rsst.export.onnx_file import METADATA, Logits, about
from vit_rsst.export.work import Section, Target, Work
from vit_rsst.models.published import Published

FILE = "model.pt2"
ABOUT = "vit_rsst.json"
"""The entry of the archive that says how to prepare images."""
NOTES = ("stack_trace", "source_fn_stack", "nn_module_stack", "torch_fn", "from_node")
"""What torch.export notes at each node; it names files of this machine."""
USAGE = """\
import json

import numpy as np
import torch
from PIL import Image, ImageOps

more = {"vit_rsst.json": ""}
program = torch.export.load("model.pt2", extra_files=more)  # torch._inductor.aoti_compile_and_package(program)
about = json.loads(more["vit_rsst.json"])
size, kernel = about["image_size"], Image.Resampling[about["interpolation"].upper()]
image = Image.open("image.png").convert("RGB")
image = ImageOps.fit(image, (size, size), kernel, bleed=(1 - about["crop_pct"]) / 2)
pixels = (torch.tensor(np.asarray(image)) / 255 - torch.tensor(about["mean"])) / torch.tensor(about["std"])
with torch.no_grad():
    logits = program.module()(pixels.permute(2, 0, 1)[None])
print(about["classes"][int(logits.argmax())])
"""


def check(work: Work) -> None:
    """Every ticket may be exported, and `write` finds out whether torch can trace its network; 2:4 needs a GPU."""
    if work.options.semi_structured:
        semi_structured.check(work)


def write(work: Work, folder: Path) -> None:
    """Traces the network with any batch size and saves it.

    Raises:
        InputError: torch cannot trace it.
    """
    try:
        program = traced(work)
    except OF_A_LIBRARY as error:
        raise InputError(f"--to torch: torch cannot export this {work.architecture}: {first_line(error)}.") from error
    for node in program.graph.nodes:
        for note in NOTES:
            node.meta.pop(note, None)
    torch.export.save(program, folder / FILE, extra_files={ABOUT: json.dumps(about(work))})
    files.settle(folder / FILE)


def traced(work: Work) -> torch.export.ExportedProgram:
    """The slim model as a program, on the device that it is for."""
    net, images = work.slim.net, work.images(2)
    if work.options.semi_structured:
        net, images = Logits(on_gpu(work)).eval(), images.cuda()
        semi_structured.compress_(net.net, semi_structured.layers(work))
    return torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def on_gpu(work: Work) -> nn.Module:
    """A copy of the slim model on the GPU in float16, still with all its zeros."""
    return copy.deepcopy(work.slim.net).to("cuda", torch.float16)


class Program(nn.Module):
    """A `.pt2` file as a module: normalised images (batch, 3, size, size) to logits, on the device of its weights.

    Attributes:
        about: how to prepare images; empty if the file does not say.

    Raises:
        Damaged: torch cannot load the file.
    """

    def __init__(self, path: Path):
        super().__init__()
        more, log = {ABOUT: ""}, logging.getLogger("torch.export")
        level = log.level
        log.setLevel(logging.ERROR)  # a file that it cannot load is logged with a traceback
        try:
            program = torch.export.load(path, extra_files=more)
        except (zipfile.BadZipFile, *OF_A_LIBRARY) as error:
            raise Damaged(
                f"{path}: torch {torch.__version__} cannot load this program ({first_line(error)}); export it again."
            ) from error
        finally:
            log.setLevel(level)
        self._run = program.module().forward  # hidden from `eval` and `to`, which a program does not have
        self.device = next((tensor.device for tensor in program.state_dict.values()), torch.device("cpu"))
        self.about, self.num_parameters = json.loads(more[ABOUT] or "{}"), _elements(program)

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images.float().to(self.device)).to(images.device)


def _elements(program: torch.export.ExportedProgram) -> tuple[int, int]:
    """Weights, and those that are not zero; a compressed tensor has half of them, and an eighth more bytes."""
    found, alive = 0, 0
    for name, tensor in program.state_dict.items():
        if name.endswith(f".{semi_structured.PACKED}"):
            found, alive = found + tensor.numel() * 16 // 9, alive + tensor.numel() * 8 // 9
        elif name in program.graph_signature.parameters:
            found, alive = found + tensor.numel(), alive + int(torch.count_nonzero(tensor))
    return found, alive


def opened(path: Path) -> Published:
    """Opens a program with its preprocessing.

    Raises:
        Damaged: see `Program`; also if its notes are missing.
    """
    net = Program(path)
    if missing := [name for name in METADATA if name not in net.about]:
        raise Damaged(
            f"{path}: it does not say {', '.join(missing)}; expected a file written by `vit-rsst export --to torch`."
        )
    mean, std, classes, *shown = (net.about[key] for key in METADATA)
    return Published(net, *shown, mean, std, classes)


@torch.no_grad()
def logits(folder: Path, images: Tensor) -> Tensor:
    """Logits of the file, as a user loads it, in batches of several sizes."""
    run = Program(folder / FILE)
    return torch.cat([run(images)[:-3], run(images[-3:-1]), run(images[-1:])])


def measured(work: Work, folder: Path) -> Sequence[Section]:
    """Speed beside the dense model, on the device of the program."""
    here, runtime = Program(folder / FILE), f"torch {torch.__version__}"
    networks: dict[str, nn.Module] = {speed.DENSE: work.net} if work.slim.is_narrower else {}
    networks["this file, fp32"] = here
    if work.options.semi_structured:
        networks = {speed.DENSE: copy.deepcopy(work.net).to(here.device), "dense, fp16": Logits(on_gpu(work))}
        networks["this file, 2:4 in fp16"] = here
    return [speed.report(networks, work.trained.data.size, runtime, here.device)]


TARGET = Target(
    "pytorch",
    check,
    write,
    logits,
    lambda work: USAGE,
    is_slim=True,
    options=("round_to", "semi_structured"),
    measured=measured,
)
