"""int8: static quantisation of an ONNX file by onnxruntime's own tools, and what it costs.

Weights are int8 with a scale for every output channel, the inputs of layers uint8 with a range from training images.
Only layers with weights are quantised; attention products, softmax, norms and activations stay in float32, and so do
the outputs of matrix products, which is faster and more accurate.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_rsst.data.loaders import evaluation_batches
from vit_rsst.errors import InputError
from vit_rsst.export.work import Section, Work
from vit_rsst.seeds import derived_seed
from vit_rsst.training.counters import score

OPERATORS = ("MatMul", "Gemm", "Conv")
BATCH = 16
SCORED_IMAGES = 2000
"""Validation images at most, balanced over classes; their scores differ by a few tenths of a point by chance."""
LOSS_IMAGES, MOST_LAYERS = 16, 5


def quantize(source: Path, target: Path, images: Tensor, keep: Sequence[str] = ()) -> None:
    """Quantises a file that `onnx_file` wrote.

    Args:
        images: normalised training images, (images, 3, size, size).
        keep: globs of layers that stay in float32, such as `blocks.0.*`.

    Raises:
        InputError: a glob matches no layer, or they leave none to quantise.
    """
    import onnx
    from onnxruntime import quantization

    model = onnx.load(source)
    names = layers(model)
    for glob in keep:
        if not any(fnmatchcase(layer, glob) for layer in names.values()):
            shown = ", ".join(list(names.values())[:4])
            raise InputError(f"--int8-keep: {glob!r} matches no layer; this model has {shown} ….")
    chosen = [node for node, layer in names.items() if not any(fnmatchcase(layer, glob) for glob in keep)]
    if not chosen:
        raise InputError("--int8-keep: leaves no layer to quantise; keep fewer, or omit --int8.")
    with _quiet():
        quantization.quantize_static(
            str(source),
            str(target),
            _reader(images),
            per_channel=True,
            op_types_to_quantize=list(OPERATORS),
            nodes_to_quantize=chosen,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            use_external_data_format=(source.parent / f"{source.name}.data").is_file(),
        )


def layers(model: Any) -> dict[str, str]:
    """Nodes with a constant weight, by name → the module that they come from."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = (node for node in model.graph.node if node.op_type in OPERATORS and node.input[1] in constants)
    return {node.name: node.name.partition("/")[0] for node in found}


def _reader(images: Tensor) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        """Calibration images, batch by batch."""

        batches = iter(images.split(BATCH))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tools' advice to optimise the file first, which would rename its nodes and gains no time."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def report(work: Work, path: Path, session: nn.Module) -> Section:
    """Accuracy on validation images before and after, and the layers that lose most."""
    import onnx

    model = onnx.load(path)
    errors = layer_errors(work.slim.net, model, work.calibration[:LOSS_IMAGES])
    images = work.dataset.balanced("val", SCORED_IMAGES, derived_seed(work.trained.seed, "int8"))
    before, after = (score(net, _batches(work, images), torch.device("cpu")) for net in (work.slim.net, session))
    rows = [("", "before", "here"), ("validation top-1", f"{before['top1']:.2f} %", f"{after['top1']:.2f} %")]
    rows.append(("validation loss", f"{before['loss']:.4f}", f"{after['loss']:.4f}"))
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:MOST_LAYERS]
    kept = f"; in float32: {', '.join(work.options.int8_keep)}" if work.options.int8_keep else ""
    sentences = [
        f"Static int8 with a scale per channel, calibrated on {len(work.calibration)} training images and scored on "
        f"{len(images)} of the validation split{kept}.",
        f"Largest errors of a layer's output, relative to its size: "
        f"{', '.join(f'{layer} {errors[layer]:.1%}' for layer in worst)}; --int8-keep leaves such layers in float32.",
    ]
    if before["top1"] - after["top1"] > 1.0:
        sentences.append(
            f"It loses {before['top1'] - after['top1']:.2f} points of top-1: leave out the layers that lose most."
        )
    return Section("Quantisation", rows, sentences)


def _batches(work: Work, images: Any) -> Iterator[tuple[Tensor, Tensor]]:
    trained = work.trained
    place = {"rank": 0, "num_processes": 1, "device": torch.device("cpu")}
    return evaluation_batches(images, BATCH, **place, mean=trained.mean, std=trained.std)


@torch.no_grad()
def layer_errors(net: nn.Module, model: Any, images: Tensor) -> dict[str, float]:
    """‖quantised output − output‖ / ‖output‖ of each quantised Linear and Conv layer on the float32 model's inputs.

    Args:
        net: in float32, whose modules the nodes of `model` are named after.
        model: quantised ONNX.
    """
    modules, errors, handles = dict(net.named_modules()), {}, []
    for layer, (weight, scale, zero) in _quantised(model).items():
        module = modules.get(layer)
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue

        def note(
            module: nn.Module, args: tuple, output: Tensor, layer: str = layer, own: tuple = (weight, scale, zero)
        ) -> None:
            weight, scale, zero = own
            x = torch.fake_quantize_per_tensor_affine(args[0], scale, zero, 0, 255)
            if isinstance(module, nn.Conv2d):
                found = module._conv_forward(x, weight, module.bias)
            else:
                found = nn.functional.linear(x, weight, module.bias)
            errors[layer] = float((found - output).norm() / output.norm().clamp(min=1e-12))

        handles.append(module.register_forward_hook(note))
    net(images)
    for handle in handles:
        handle.remove()
    return errors


def _quantised(model: Any) -> dict[str, tuple[Tensor, float, int]]:
    """Layer → its weight as the file rounds it, and the scale and zero point of its input."""
    from onnx import numpy_helper

    values = {tensor.name: tensor for tensor in model.graph.initializer}
    sources = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}

    def value(name: str) -> Tensor:
        return torch.tensor(numpy_helper.to_array(values[name]))

    found = {}
    for node in model.graph.node:
        if node.op_type not in OPERATORS or not all(name in sources for name in node.input[:2]):
            continue
        x, w = (sources[name] for name in node.input[:2])
        if w.input[0] not in values:
            continue
        axis = next((attribute.i for attribute in w.attribute if attribute.name == "axis"), 0)
        weight, scale = value(w.input[0]).float(), value(w.input[1])
        shape = [-1 if i == axis else 1 for i in range(weight.dim())] if scale.dim() else []
        weight = weight * scale.view(shape)
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not any(a.name == "transB" for a in node.attribute)):
            weight = weight.T  # (in, out) → (out, in)
        found[node.name.partition("/")[0]] = weight, float(value(x.input[1])), int(value(x.input[2]))
    return found
