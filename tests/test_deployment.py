"""Models as they are deployed: int8, fp16 and bf16 in onnxruntime, programs of torch.export, and their speed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_export import images, last, logits, scores

from vit_rsst import timing
from vit_rsst.data.images import ImageData
from vit_rsst.errors import InputError, MissingRequirement
from vit_rsst.export import int8, onnx_file, program_file, semi_structured, speed
from vit_rsst.export.exporting import export, relative_difference
from vit_rsst.export.work import Work

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
LAYERS = ["patch_embed.proj", *(f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")), "head"]


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch) -> None:
    monkeypatch.setattr(timing, "BUDGET", 0.0)


@pytest.fixture(scope="module")
def quantised(units_run, tmp_path_factory) -> Path:
    """The int8 file, with a layer left out."""
    folder = tmp_path_factory.mktemp("int8") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "BUDGET", 0.0)
        export(units_run, "onnx", folder, precision="int8", int8_keep=["head"])
    return folder


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


# -- int8


def test_scales_are_those_of_the_largest_weight_of_a_channel_and_the_range_of_training_images(units_run, quantised):
    stored, work = initializers(quantised / "model.onnx"), Work.of(units_run)
    weight = work.slim.net.patch_embed.proj.weight.detach().double().numpy()
    scale = np.abs(weight).max((1, 2, 3)) / 127
    assert stored["net.patch_embed.proj.weight_scale"] == pytest.approx(scale, rel=1e-6)
    assert not stored["net.patch_embed.proj.weight_zero_point"].any()
    rounded = np.round(weight / scale[:, None, None, None])
    assert np.abs(stored["net.patch_embed.proj.weight_quantized"] - rounded).max() <= 1  # at a tie
    pixels = work.calibration
    assert len(pixels) == 256
    assert float(stored["images_scale"]) == pytest.approx(float(pixels.max() - pixels.min()) / 255, rel=1e-5)


def test_an_int8_file_takes_any_batch_and_scores_nearly_as_its_ticket(units_run, quantised, tmp_path):
    session = onnx_file.Session(quantised / "model.onnx")
    assert [session(images(batch)).shape for batch in (1, 7)] == [(1, 10), (7, 10)]
    found, expected = scores(tmp_path, quantised, "--source", "digits"), scores(tmp_path, units_run)
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.01)
    assert found["top1"] == pytest.approx(expected["top1"], abs=2)


def test_layers_that_are_kept_stay_in_float32_and_the_others_do_not(quantised):
    model = onnx.load(quantised / "model.onnx")
    assert list(int8._quantised(model)) == LAYERS[:-1]
    assert int8.layers(model) == {"head/Gemm": "head"}


def test_the_card_reports_accuracy_layers_and_speed(quantised):
    card = (quantised / "README.md").read_text(encoding="utf-8")
    for part in ("## Quantisation", "| validation top-1 |", "calibrated on 256 training images",
                 "in float32: head", "Largest errors of a layer's output", "## Speed", "| dense, fp32 |",
                 "| this file, int8 |", "| times as fast |", "--int8-keep"):  # fmt: skip
        assert part in card


def test_the_error_of_a_layer_is_that_of_rounding_its_input_and_its_weight(units_run, quantised):
    work, model = Work.of(units_run), onnx.load(quantised / "model.onnx")
    pixels = work.calibration[:4]
    errors = int8.layer_errors(work.slim.net, model, pixels)
    assert list(errors) == LAYERS[:-1]
    assert all(0 < error < 0.05 for error in errors.values())
    stored = {k: torch.tensor(v) for k, v in initializers(quantised / "model.onnx").items()}
    scale, zero = stored["images_scale"].double(), stored["images_zero_point"].double()
    x = ((pixels.double() / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    weight = stored["net.patch_embed.proj.weight_quantized"].double()
    weight = weight * stored["net.patch_embed.proj.weight_scale"].double()[:, None, None, None]
    layer = work.slim.net.double().patch_embed.proj
    with torch.no_grad():
        exact, rounded = layer(pixels.double()), torch.nn.functional.conv2d(x, weight, layer.bias, stride=layer.stride)
    assert errors["patch_embed.proj"] == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-3)


def test_masked_weights_stay_zero_in_int8(tmp_path):
    assert tiny.command("train", tiny.write_recipe(tmp_path)) == 0
    ticket = last(tmp_path / "runs" / "tiny")
    done = export(ticket, "onnx", tmp_path / "out", precision="int8")
    assert not done.is_narrower
    stored = initializers(tmp_path / "out" / "model.onnx")
    nonzero = sum(int((v != 0).sum()) for name, v in stored.items() if name.endswith("_quantized") and v.ndim == 2)
    kept = Work.of(ticket).trained.mask.num_alive
    assert 0.9 * kept < nonzero - stored["net.head.weight_quantized"].size <= kept


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ("--int8", "--int8-keep", "block.*"),
            2,
            "--int8-keep: 'block.*' matches no layer; this model has p",
        ),
        (("--int8", "--int8-keep", "*"), 2, "--int8-keep: leaves no layer to quantise"),
        (("--int8-keep", "head"), 2, "--int8-keep: has no effect without --int8"),
        (("--int8", "--data", "/nowhere"), 2, "--data PATH says where they are now: data.path: there is no folder"),
        (("--fp16", "--int8"), 2, "--int8: not allowed with argument --fp16"),
    ],
)
def test_a_quantisation_that_makes_no_sense_is_refused_in_one_sentence(
    options, code, message, units_run, tmp_path, capsys
):
    assert tiny.command("export", units_run, "--to", "onnx", tmp_path / "out", *options) == code
    [error] = capsys.readouterr().err.splitlines()
    assert message in error
    assert not any(tmp_path.iterdir())


def test_int8_needs_onnxruntime_and_training_images(units_run, tmp_path, monkeypatch):
    split = Work.of(units_run).dataset.balanced("train", 3, 0)
    monkeypatch.setattr(ImageData, "balanced", lambda *_: replace(split, images=split.images[:0]))
    with pytest.raises(InputError, match=r"^--int8: no training images to calibrate on; .* --data\.$"):
        export(units_run, "onnx", tmp_path / "out", precision="int8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(MissingRequirement, match=r"^--int8: onnxruntime is not installed; pip install"):
        export(units_run, "onnx", tmp_path / "out", precision="int8")
    assert not any(tmp_path.iterdir())


# -- half precision


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_file_in_half_precision_has_the_logits_of_the_ticket_and_half_its_bytes(
    precision, units_run, tmp_path, capsys
):
    done = export(units_run, "onnx", tmp_path / "out", precision=precision)
    path = tmp_path / "out" / "model.onnx"
    assert done.difference < {"fp16": 2e-3, "bf16": 2e-2}[precision]
    big = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2]
    kind = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    assert {tensor.data_type for tensor in big} == {kind}
    if precision == "fp16":
        found = onnx_file.Session(path)(images())
        assert relative_difference(logits(last(units_run), images()), found) < 2e-3
        assert [section.title for section in done.measured] == ["Speed"]
    else:  # onnxruntime has no such kernels on the CPU
        assert done.measured == ()
        assert tiny.command("evaluate", path, "--source", "digits") == 5
        assert "has no CPU kernel for it" in capsys.readouterr().err


# -- torch.export


def test_a_program_scores_as_its_ticket_and_names_no_file_of_this_machine(units_run, tmp_path):
    done = export(units_run, "torch", tmp_path / "out")
    path = tmp_path / "out" / "model.pt2"
    assert done.difference < 1e-5
    assert b"site-packages" not in path.read_bytes()
    assert b".py" not in path.read_bytes()
    found, expected = scores(tmp_path, path, "--source", "digits"), scores(tmp_path, units_run)
    assert found["confusion"] == expected["confusion"]
    program = program_file.Program(path)
    assert program.num_parameters[0] == sum(p.numel() for p in Work.of(units_run).slim.net.parameters())


def test_a_damaged_or_foreign_program_is_refused(units_run, tmp_path, capsys):
    (tmp_path / "bad.pt2").write_bytes(b"PK nonsense")
    assert tiny.command("evaluate", tmp_path / "bad.pt2", "--source", "digits") == 5
    [error] = capsys.readouterr().err.splitlines()
    assert "cannot load this program" in error
    foreign = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(foreign, tmp_path / "foreign.pt2")
    assert tiny.command("analyze", tmp_path / "foreign.pt2") == 5
    assert "it does not say mean" in capsys.readouterr().err


# -- analysis and speed


def test_analyze_takes_files_beside_tickets(units_run, quantised, tmp_path, capsys):
    argv = ("analyze", quantised, units_run, "--no-latency", "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv")
    assert tiny.command(*argv) == 0
    file, ticket = json.loads((tmp_path / "a.json").read_text())["items"]
    assert file["parameters"]["total"] == pytest.approx(ticket["parameters"]["slim"], abs=5)
    assert file["bytes"]["file"] == (quantised / "model.onnx").stat().st_size < ticket["bytes"]["slim_fp32"]
    assert "out/model.onnx" in capsys.readouterr().out
    assert tiny.command("analyze", quantised / "model.onnx", "--batch", "2") == 0
    assert "batch 2: file, ms" in capsys.readouterr().out
    assert tiny.command("analyze", quantised, "--image-size", "64") == 2
    assert "takes images of 32 px only" in capsys.readouterr().err


def test_the_section_on_speed_says_where_a_file_is_no_faster():
    faster = speed.section({speed.DENSE: [0.004, 0.1], "this file, int8": [0.002, 0.04]}, "a machine")
    assert faster.rows[-1] == ("times as fast", "2.00", "2.50")
    assert faster.sentences == ["Median time of a batch, measured by a machine."]
    slower = speed.section({speed.DENSE: [0.004, 0.1], "this file, int8": [0.0039, 0.05]}, "a machine")
    assert slower.sentences[1] == "At batch 1 it is no faster than the dense model on this machine."
    alone = speed.section({"this file, fp32": [0.004, 0.1]}, "a machine")
    assert "zeros save no time" in alone.sentences[1]
    assert len(alone.rows) == 2


# -- 2:4


@pytest.fixture(scope="module")
def two_of_four(tmp_path_factory) -> Path:
    """A ticket of one round, 64 wide, so that the kernels of GPUs take it."""
    folder = tmp_path_factory.mktemp("two")
    recipe = tiny.RECIPE.replace("pruning:\n", "pruning:\n  granularity: '2:4'\n")
    recipe = recipe.replace('"embed_dim": 24', '"embed_dim": 64')
    recipe = recipe.replace('"num_heads": 3', '"num_heads": 2').replace("{rounds: 2, final_sparsity: 0.9}", "linear")
    assert tiny.command("train", tiny.write_recipe(folder, recipe)) == 0
    return folder / "runs" / "tiny"


def test_a_two_of_four_ticket_says_what_it_is_good_for_and_others_do_not(units_run, two_of_four, tmp_path):
    work = Work.of(two_of_four)
    assert semi_structured.layers(work) == [f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    done = export(two_of_four, "slim", tmp_path / "out")
    for text in (done.text(), (tmp_path / "out" / "README.md").read_text(encoding="utf-8")):
        assert "4 layers are 2:4 sparse. GPUs with sparse tensor cores" in text
    assert semi_structured.note(Work.of(units_run)) == ""


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([[1, 0, 2, 0], [0, 0, 0, 3]], True), ([[1, 0, 2, 3]], False), ([[1, 1, 0, 0, 0, 1]], False)],
)
def test_two_of_four_is_counted_in_sets_of_four_inputs(rows, expected):
    assert semi_structured.is_two_of_four(torch.tensor(rows, dtype=torch.float32)) is expected


def compress(weight: torch.Tensor) -> torch.Tensor:
    """Stands in for cuSPARSELt's: (out, in * 9/16), as it stores them: kept values, then where they lie."""
    kept = weight.reshape(len(weight), -1, 4)
    places = (kept == 0).to(torch.int8).argsort(dim=2, stable=True)[:, :, :2].sort(2).values
    values = kept.gather(2, places).flatten(1)
    packed = torch.zeros(len(weight), weight.shape[1] * 9 // 16, dtype=weight.dtype)
    packed[:, : values.shape[1]] = values
    bits = (places.flatten(1).reshape(len(weight), -1, 8) << torch.arange(0, 16, 2)).sum(2).to(torch.int16)
    packed[:, values.shape[1] :] = bits.view(weight.dtype)
    return packed


def multiply(packed: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Stands in for cuSPARSELt's product of a compressed weight and a dense matrix (in, rows)."""
    assert dense.shape[1] % 8 == 0
    num_inputs = packed.shape[1] * 16 // 9
    values, bits = packed[:, : num_inputs // 2], packed[:, num_inputs // 2 :].contiguous().view(torch.int16)
    places = (bits.to(torch.int32)[:, :, None] >> torch.arange(0, 16, 2)) & 3
    weight = torch.zeros(len(packed), num_inputs // 4, 4, dtype=packed.dtype)
    weight.scatter_(2, places.reshape(len(packed), -1, 2).long(), values.reshape(len(packed), -1, 2))
    product = weight.flatten(1).float() @ dense.float()
    return (product if bias is None else product + bias.float()[:, None]).to(dense.dtype)


def test_a_compressed_layer_multiplies_as_the_dense_one_and_is_stored_by_torch_export(tmp_path, monkeypatch):
    library = torch.library.Library("aten", "IMPL")
    library.impl("_cslt_sparse_mm", lambda packed, dense, bias=None, *_, **__: multiply(packed, dense, bias), "CPU")
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 10)).half()
    weight = net[0].weight.data.view(96, 16, 4)
    weight.scatter_(2, weight.abs().argsort(2)[:, :, :2], 0.0)
    inputs = torch.randn(3, 5, 64).half()  # 15 rows are no multiple
    expected = net(inputs)
    semi_structured.compress_(net, ["0", "2"])
    assert [type(layer).__name__ for layer in net] == ["TwoOfFour", "GELU", "Linear"], "10 outputs stay dense"
    assert torch.allclose(net(inputs), expected, atol=2e-3)
    with torch.no_grad():
        program = torch.export.export(net, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2")
    for batch in (1, 3, 16):
        more = torch.randn(batch, 5, 64).half()
        assert torch.equal(loaded.module()(more), net(more))
    assert program_file._elements(loaded) == (64 * 96 + 96 + 96 * 10 + 10, 64 * 96 // 2 + 96 + 96 * 10 + 10)


def test_compression_without_a_gpu_or_without_two_of_four_is_refused_in_one_sentence(
    units_run, two_of_four, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for ticket, code, message in (
        (two_of_four, 3, "needs a GPU with sparse tensor cores (NVIDIA Ampere or newer), and torch sees none"),
        (units_run, 2, "no layer of this ticket keeps two of every four inputs"),
    ):
        assert tiny.command("export", ticket, "--to", "torch", "--semi-structured", tmp_path / "out") == code
        [error] = capsys.readouterr().err.splitlines()
        assert message in error
    assert tiny.command("export", units_run, "--to", "onnx", "--semi-structured", tmp_path / "out") == 2
    assert "--semi-structured: has no effect with --to onnx, only with torch" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
