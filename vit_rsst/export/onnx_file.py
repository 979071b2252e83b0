"""ONNX: `model.onnx` of the slim model, or of the dense one where no unit is gone.

Its input is float32 `images` (batch, 3, size, size), normalised already; mean and std stand in the file's metadata.
Its output is `logits` (batch, classes).
"""

import contextlib
import importlib.util
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vit_rsst import files
from vit_rsst.errors import OF_A_LIBRARY, Damaged, InputError, MissingRequirement, first_line
from vit_rsst.export.work import Target, Work
from vit_rsst.models.published import Published

FILE = "model.onnx"
TOLERANCE = 1e-4  # the kernels of another runtime round otherwise
INLINE_LIMIT = 2**31 - 2**24
"""Bytes above which protobuf cannot hold the weights, so that they lie in a file beside it."""
METADATA = ("mean", "std", "classes", "image_size", "crop_pct", "interpolation")
"""What the file says of how images are shown to it."""
USAGE = """\
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
about = session.get_modelmeta().custom_metadata_map
mean, std, classes, size, crop_pct, interpolation = (
    json.loads(about[key]) for key in ("mean", "std", "classes", "image_size", "crop_pct", "interpolation")
)
image = Image.open("image.png").convert("RGB")
image = ImageOps.fit(image, (size, size), Image.Resampling[interpolation.upper()], bleed=(1 - crop_pct) / 2)
pixels = (np.asarray(image, dtype=np.float32) / 255 - mean) / std
[logits] = session.run(["logits"], {"images": pixels.transpose(2, 0, 1)[None].astype(np.float32)})
print(classes[int(logits[0].argmax())])
"""


class Logits(nn.Module):
    """Gives the input its name, whatever the network calls it.

    Args:
        attention: replaces torch's attention meanwhile; None: as it is.
    """

    def __init__(self, net: nn.Module, attention: type[TorchFunctionMode] | None = None):
        super().__init__()
        self.net, self.attention = net, attention

    def forward(self, images: Tensor) -> Tensor:
        with self.attention() if self.attention else contextlib.nullcontext():
            return self.net(images)


class PlainAttention(TorchFunctionMode):
    """Attention as products and a softmax: of torch's own, the exporter knows four dimensions and some layouts."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, mask = given["query"], given.get("attn_mask")
        scale = given.get("scale") or query.shape[-1] ** -0.5
        scores = query * scale @ given["key"].transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ given["value"]


def path_of(what: Path) -> Path | None:
    """The file that a path means, itself or the one in an export folder; None where it means none."""
    path = what / FILE if what.is_dir() else what
    return path if path.suffix == ".onnx" and path.is_file() else None


def check(work: Work) -> None:
    """Raises:
    MissingRequirement: the exporter's packages are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingRequirement(f"--to onnx: {missing[0]} is not installed; pip install 'vit-rsst[onnx]'.")


def write(work: Work, folder: Path) -> None:
    """Traces the network and writes it.

    Raises:
        InputError: the exporter does not take this network, or has no such opset.
    """
    net = work.slim.net
    try:
        program = _traced(work, Logits(net))
    except EXPORTER_ERRORS:
        try:
            program = _traced(work, Logits(net, PlainAttention))
        except EXPORTER_ERRORS as error:
            raise InputError(
                f"--to onnx: torch cannot export this {work.architecture}: {root_cause(error)}."
            ) from error
    _check_opset(work, program.model.opset_imports[""])
    _strip_(program.model)
    trained = work.trained
    values = (trained.mean, trained.std, trained.classes, trained.data.size)
    about = dict(zip(METADATA, (*values, trained.data.crop_share, trained.data.resampling), strict=True))
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    num_bytes = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    program.save(str(folder / FILE), external_data=num_bytes > INLINE_LIMIT)
    for path in folder.iterdir():
        files.settle(path)


EXPORTER_ERRORS = (torch.onnx.errors.OnnxExporterError, *OF_A_LIBRARY)
"""What the exporter and the traced network raise."""


def _traced(work: Work, logits: Logits) -> Any:
    """The network as an ONNX program whose batch is free."""
    with _quiet():
        return torch.onnx.export(
            logits.eval(),
            (work.images(2),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=work.opset,
            verbose=False,
        )


def root_cause(error: BaseException) -> str:
    """The first line of the error that the others wrap, without colours of the screen."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\x1b\[[0-9;]*m", "", first_line(error)).rstrip(".!")


def _check_opset(work: Work, found: int) -> None:
    """The exporter writes another opset than it was asked for, and only logs it."""
    if work.opset is not None and found != work.opset:
        raise InputError(
            f"--opset: torch {torch.__version__} writes this network in opset {found}, not in {work.opset}; take that "
            "one, or leave the option out."
        )


def _strip_(model: Any) -> None:
    """Takes the exporter's notes out of an onnx_ir model: a third of a small file, with paths of this machine."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for part in (graph, *graph, *values):
        part.metadata_props.clear()


class Session(nn.Module):
    """A file as a network: normalised images (batch, 3, size, size) to logits, by onnxruntime on the CPU.

    Attributes:
        about: the file's metadata.

    Raises:
        MissingRequirement: onnxruntime is not installed.
        Damaged: it does not run the file.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingRequirement(f"{path}: onnxruntime is not installed; pip install 'vit-rsst[onnx]'.")
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        refusals = (errors.Fail, errors.InvalidGraph, errors.InvalidProtobuf, errors.NoSuchFile, errors.NotImplemented)
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except refusals as error:
            raise Damaged(
                f"{path}: onnxruntime {onnxruntime.__version__} does not run it ({first_line(error)}); export it "
                "again, with an older --opset."
            ) from error
        self.about = self._session.get_modelmeta().custom_metadata_map

    def forward(self, images: Tensor) -> Tensor:
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        try:
            [found] = self._session.run(["logits"], {"images": images.float().cpu().numpy()})
        except (errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
            raise Damaged(f"{self.path}: onnxruntime fails on {len(images)} images: {first_line(error)}.") from error
        return torch.from_numpy(found).to(images.device)


def opened(path: Path) -> Published:
    """A file with what it takes to show it images.

    Raises:
        MissingRequirement, Damaged: see `Session`; also where it has another's metadata.
    """
    net = Session(path)
    try:
        mean, std, classes, *shown = (json.loads(net.about[key]) for key in METADATA)
    except (KeyError, ValueError) as error:
        raise Damaged(
            f"{path}: its metadata do not say {', '.join(METADATA)}; expected a file that `vit-rsst export "
            "--to onnx` wrote."
        ) from error
    return Published(net.eval(), *shown, mean, std, classes)


def logits(folder: Path, images: Tensor) -> Tensor | None:
    """Logits by onnxruntime; None where it is not installed.

    Raises:
        Damaged: this onnxruntime does not run the file.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    session = Session(folder / FILE)
    try:  # in batches of five, two and one: some networks let the exporter fix the batch
        return torch.cat([session(images)[:-3], session(images[-3:-1]), session(images[-1:])])
    except Damaged as error:
        raise InputError(f"--to onnx: the exported network takes batches of one size only ({error})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and logs what it did not find; what matters is checked here."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


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
