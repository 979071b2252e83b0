"""ONNX: `model.onnx` of the slim model, or of the dense one where no unit is gone.

Its input is float32 `images` (batch, 3, size, size), normalised already; mean and std stand in the file's metadata.
Its output is `logits` (batch, classes).
"""

import contextlib
import importlib.util
import io
import json
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from vit_rsst import files
from vit_rsst.errors import EnvironmentLacks, InputError
from vit_rsst.export.work import Target, Work

TOLERANCE = 1e-4  # the kernels of another runtime round otherwise
INLINE_LIMIT = 2**31 - 2**24
"""Bytes above which protobuf cannot hold the weights, so that they lie in a file beside it."""
USAGE = """\
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
about = session.get_modelmeta().custom_metadata_map
mean, std, classes, size = (json.loads(about[key]) for key in ("mean", "std", "classes", "image_size"))
image = ImageOps.fit(Image.open("image.png").convert("RGB"), (size, size), Image.Resampling.BICUBIC)
pixels = (np.asarray(image, dtype=np.float32) / 255 - mean) / std
[logits] = session.run(["logits"], {"images": pixels.transpose(2, 0, 1)[None].astype(np.float32)})
print(classes[int(logits[0].argmax())])
"""


class Logits(nn.Module):
    """Gives the input its name, whatever the network calls it."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def check(work: Work) -> None:
    """Raises:
    EnvironmentLacks: the exporter's packages are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentLacks(f"--to onnx: {missing[0]} is not installed; pip install 'vit-rsst[onnx]'.")


def write(work: Work, folder: Path) -> None:
    """Traces the network and writes it.

    Raises:
        InputError: the exporter does not take this network, or has no such opset.
    """
    net = work.slimmed if work.is_narrower else work.net
    batch = torch.export.Dim("batch")
    try:
        with _quiet():
            program = torch.onnx.export(
                Logits(net).eval(),
                (work.images(2),),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"images": {0: batch}},
                opset_version=work.opset,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"--to onnx: torch cannot export this {work.architecture} ({first}).") from error
    trained = work.trained
    about = {"mean": trained.mean, "std": trained.std, "classes": trained.classes, "image_size": trained.data.size}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    num_bytes = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    program.save(str(folder / "model.onnx"), external_data=num_bytes > INLINE_LIMIT)
    for path in folder.iterdir():
        files.settle(path)


def logits(folder: Path, images: Tensor) -> Tensor | None:
    """Logits by onnxruntime; None where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    # Image by image as well as at once: the batch has to be free.
    one = session.run(["logits"], {"images": images[:1].numpy()})[0]
    rest = session.run(["logits"], {"images": images[1:].numpy()})[0]
    return torch.cat([torch.from_numpy(one), torch.from_numpy(rest)])


@contextlib.contextmanager
def _quiet() -> object:
    """The exporter prints its progress and logs what it did not find."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


TARGET = Target(
    "onnx",
    check,
    write,
    logits,
    lambda work: USAGE,
    is_slim=True,
    tolerance=TOLERANCE,
    options=("round_to", "opset"),
)
