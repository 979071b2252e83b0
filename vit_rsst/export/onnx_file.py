"""ONNX: `model.onnx` of the slim model, or of the dense one if no units were removed; in fp32, fp16, bf16 or int8.

Its input is float32 `images` (batch, 3, size, size), already normalised; mean and std are in the file's metadata. Its
output is float32 `logits` (batch, classes). Nodes bear the names of the modules that they come from.
"""

import ast
import contextlib
import copy
import importlib.util
import io
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vit_rsst import files
from vit_rsst.errors import OF_A_LIBRARY, Damaged, InputError, MissingRequirement, first_line
from vit_rsst.export import int8, speed
from vit_rsst.export.work import Section, Target, Work
from vit_rsst.models.published import Published

FILE = "model.onnx"
TOLERANCE = 1e-4  # another runtime's kernels round differently
INLINE_LIMIT = 2**31 - 2**24
"""Bytes above which protobuf cannot hold the weights, so they go to a separate file."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BF16_OPSET = 22
"""The first whose convolutions take bfloat16."""
METADATA = ("mean", "std", "classes", "image_size", "crop_pct", "interpolation")
"""Preprocessing keys in the file's metadata."""
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
    """Names the input `images`, whatever the network calls it.

    Args:
        attention: mode that replaces torch's attention in the forward pass; None: no replacement.
    """

    def __init__(self, net: nn.Module, attention: type[TorchFunctionMode] | None = None):
        super().__init__()
        self.net, self.attention = net, attention
        self.dtype = next(net.parameters()).dtype

    def forward(self, images: Tensor) -> Tensor:
        with self.attention() if self.attention else contextlib.nullcontext():
            return self.net(images.to(self.dtype)).float()


class PlainAttention(TorchFunctionMode):
    """Attention as matrix products and softmax: the exporter supports only some shapes of torch's fused attention."""

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


def check(work: Work) -> None:
    """Raises:
    MissingRequirement: the exporter's packages are not installed.
    """
    is_int8 = work.options.precision == "int8"
    needed = ["onnx", "onnxscript", *(["onnxruntime"] if is_int8 else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        option = "--int8" if missing[0] == "onnxruntime" else "--to onnx"
        raise MissingRequirement(f"{option}: {missing[0]} is not installed; pip install 'vit-rsst[onnx]'.")
    if is_int8:
        _ = work.calibration  # opens the dataset before anything is traced


def write(work: Work, folder: Path) -> None:
    """Traces the network, quantises it if asked to, and writes it.

    Raises:
        InputError: the exporter does not support this network or opset, or a layer to keep does not exist.
    """
    net, options = work.slim.net, work.options
    if options.precision in DTYPES:
        net = copy.deepcopy(net).to(DTYPES[options.precision])
    if options.precision == "int8":
        with tempfile.TemporaryDirectory() as name:
            _write(work, net, Path(name))
            int8.quantize(Path(name) / FILE, folder / FILE, work.calibration, options.int8_keep)
    else:
        _write(work, net, folder)
    for path in folder.iterdir():
        files.settle(path)


def _write(work: Work, net: nn.Module, folder: Path) -> None:
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
    _name_nodes_(program.model)
    _strip_(program.model)
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about(work).items()})
    num_bytes = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    program.save(str(folder / FILE), external_data=num_bytes > INLINE_LIMIT)


def about(work: Work) -> dict:
    """What a reader of the file needs to prepare images and name classes."""
    trained = work.trained
    values = (trained.mean, trained.std, trained.classes, trained.data.size)
    return dict(zip(METADATA, (*values, trained.data.crop_share, trained.data.resampling), strict=True))


def measured(work: Work, folder: Path) -> Sequence[Section]:
    """Accuracy of an int8 file, and speed beside the dense model; nothing where onnxruntime cannot run the file."""
    try:
        here = Session(folder / FILE)
    except (MissingRequirement, NotSupported):
        return ()
    precision = work.options.precision
    sections = [int8.report(work, folder / FILE, here)] if precision == "int8" else []
    networks = {f"this file, {precision}": here}
    if precision != "fp32" or work.slim.is_narrower:
        with tempfile.TemporaryDirectory() as name:
            _write(work, work.net, Path(name))
            networks = {speed.DENSE: Session(Path(name) / FILE)} | networks
    import onnxruntime

    return [*sections, speed.report(networks, work.trained.data.size, f"onnxruntime {onnxruntime.__version__}")]


EXPORTER_ERRORS = (torch.onnx.errors.OnnxExporterError, *OF_A_LIBRARY)
"""Exceptions of the exporter and the traced network."""


def _traced(work: Work, logits: Logits) -> Any:
    """The network as an ONNX program with a dynamic batch dimension."""
    opset = BF16_OPSET if work.options.opset is None and logits.dtype == torch.bfloat16 else work.options.opset
    with _quiet():
        return torch.onnx.export(
            logits.eval(),
            (work.images(2),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=opset,
            verbose=False,
        )


def root_cause(error: BaseException) -> str:
    """First line of the innermost error, without terminal colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\x1b\[[0-9;]*m", "", first_line(error)).rstrip(".!")


def _check_opset(work: Work, found: int) -> None:
    """Checks the opset: the exporter may write a different one than requested, and only logs it."""
    asked = work.options.opset
    if asked is not None and found != asked:
        raise InputError(
            f"--opset: torch {torch.__version__} exports this network with opset {found}, not {asked}; use that, "
            "or omit the option."
        )


def _name_nodes_(model: Any) -> None:
    """Names every node `module/operator`, numbered from the second of a module on."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = next((scope for scope in reversed(scopes) if scope.startswith("net.")), "net.").removeprefix("net.")
        name = f"{module}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _strip_(model: Any) -> None:
    """Strips the exporter's metadata, a third of a small file, which holds local paths."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for part in (graph, *graph, *values):
        part.metadata_props.clear()


class NotSupported(Damaged):
    """This onnxruntime lacks an operator of a sound file."""


class Session(nn.Module):
    """An ONNX file as a module: normalised images (batch, 3, size, size) to logits, with onnxruntime on the CPU.

    Attributes:
        about: the file's metadata.

    Raises:
        MissingRequirement: onnxruntime is not installed.
        NotSupported: it has no kernel for an operator, such as those in bfloat16 on a CPU.
        Damaged: it cannot run the file for another reason.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingRequirement(f"{path}: onnxruntime is not installed; pip install 'vit-rsst[onnx]'.")
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except errors.NotImplemented as error:
            raise NotSupported(
                f"{path}: onnxruntime {onnxruntime.__version__} has no CPU kernel for it ({first_line(error)}); export "
                "it again in another precision or with an older --opset."
            ) from error
        except (errors.Fail, errors.InvalidGraph, errors.InvalidProtobuf, errors.NoSuchFile) as error:
            raise Damaged(
                f"{path}: onnxruntime {onnxruntime.__version__} cannot run this file ({first_line(error)}); export it "
                "again with an older --opset."
            ) from error
        self.about = self._session.get_modelmeta().custom_metadata_map

    @cached_property
    def num_parameters(self) -> tuple[int, int] | None:
        """Weights stored in the file, and those that are not zero; None if onnx is not installed."""
        if importlib.util.find_spec("onnx") is None:
            return None
        import onnx
        from onnx import TensorProto, numpy_helper

        kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.INT32)
        graph = onnx.load(self.path).graph
        quantizers = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        scales = {name for node in quantizers for name in node.input[1:]}
        found = [t for t in graph.initializer if t.data_type in kinds and t.dims and t.name not in scales]
        values = [numpy_helper.to_array(tensor) for tensor in found]
        return sum(value.size for value in values), sum(int((value != 0).sum()) for value in values)

    def forward(self, images: Tensor) -> Tensor:
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        try:
            [found] = self._session.run(["logits"], {"images": images.float().cpu().numpy()})
        except (errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
            raise Damaged(f"{self.path}: onnxruntime fails on {len(images)} images: {first_line(error)}.") from error
        return torch.from_numpy(found).to(images.device)


def opened(path: Path) -> Published:
    """Opens an ONNX file with its preprocessing.

    Raises:
        MissingRequirement, Damaged: see `Session`; also if its metadata is missing.
    """
    net = Session(path)
    try:
        mean, std, classes, *shown = (json.loads(net.about[key]) for key in METADATA)
    except (KeyError, ValueError) as error:
        raise Damaged(
            f"{path}: its metadata lacks {', '.join(METADATA)}; expected a file written by `vit-rsst export --to onnx`."
        ) from error
    return Published(net.eval(), *shown, mean, std, classes)


def logits(folder: Path, images: Tensor) -> Tensor | None:
    """Logits from onnxruntime; None if it is not installed.

    Raises:
        Damaged: this onnxruntime cannot run the file.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    try:
        session = Session(folder / FILE)
    except NotSupported:
        return _by_reference(folder / FILE, images)
    try:  # in batches of five, two and one: for some networks the exporter fixes the batch size
        return torch.cat([session(images)[:-3], session(images[-3:-1]), session(images[-1:])])
    except Damaged as error:
        raise InputError(f"--to onnx: the exported network accepts a single batch size only ({error})") from error


def _by_reference(path: Path, images: Tensor) -> Tensor:
    """Logits from onnx's own evaluator, which has every operator and takes its time."""
    from onnx.reference import ReferenceEvaluator

    return torch.from_numpy(ReferenceEvaluator(str(path)).run(["logits"], {"images": images.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's progress and logs; what matters is checked here."""
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
    options=("round_to", "opset", "precision", "int8_keep", "data"),
    measured=measured,
)
