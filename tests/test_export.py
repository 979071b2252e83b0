"""Exports as users load them: timm and transformers without this package, onnxruntime, slim models; and the Hub."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import vit_rsst
import vit_rsst.export
from vit_rsst.data.transforms import normalize
from vit_rsst.errors import Damaged, InputError, MissingRequirement, RunError
from vit_rsst.export import exporting, onnx_file, push, transformers_folder
from vit_rsst.export.exporting import TARGETS, export, relative_difference
from vit_rsst.export.work import Work
from vit_rsst.models import slim, zoo
from vit_rsst.models.anatomy import prunable_weights, unit_groups
from vit_rsst.pruning.granularity import expand
from vit_rsst.pruning.patterns import UNIT_KINDS
from vit_rsst.tickets import ticket_file
from vit_rsst.tickets.opening import open_ticket

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
HF_VIT = {
    "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 48,
}  # fmt: skip
OWN = {
    "dynamic_vit": VIT | {"stages": [1]}, "lightweight_vit": VIT | {"rank": 4}, "vit_t16": VIT | {"mlp_ratio": 2.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_speed(monkeypatch) -> None:
    """Cards without measurements, which take as long as the export; `test_deployment.py` has them."""
    for to in ("onnx", "torch"):
        monkeypatch.setitem(TARGETS, to, replace(TARGETS[to], measured=lambda work, folder: ()))


@pytest.fixture(scope="module")
def runs(units_run, tmp_path_factory) -> dict[str, Path]:
    """Two trained runs on the digits: pruned by elements, and by heads and neurons."""
    folder = tmp_path_factory.mktemp("runs")
    assert tiny.command("train", tiny.write_recipe(folder)) == 0
    return {"elements": folder / "runs" / "tiny", "units": units_run}


def make_ticket(path: Path, name: str, args: dict, kind: str | None = None) -> Path:
    """An untrained ticket with half of its units dead, under the header of a run."""
    torch.manual_seed(0)
    architecture, all_args = zoo.describe(name, args, 10)
    net = zoo.create(architecture, all_args)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    groups = unit_groups(net, UNIT_KINDS[kind]) if kind else []
    mask = expand(groups, [torch.rand(group.units) > 0.5 for group in groups], prunable_weights(net))
    data = {"source": "digits", "path": None, "image_size": 32, "mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.4]}
    header = {
        "model": name,
        "architecture": architecture,
        "model_args": json.dumps(all_args),
        "data": json.dumps(data | {"classes": [f"class {i}" for i in range(10)]}),
        "seed": "0",
    }
    state = {n: t * mask[n] if n in mask.masks else t for n, t in net.state_dict().items()}
    ticket_file.save(path, state, mask, header)
    return path


def logits(what: Path, images: Tensor) -> Tensor:
    """Of the masked model, built here by hand."""
    ticket = ticket_file.load(what)
    net = zoo.create(ticket.metadata["architecture"], ticket.model_args)
    net.load_state_dict(ticket.state)
    with torch.no_grad():
        return net.eval()(images)


def last(run: Path) -> Path:
    return run / "tickets" / "round_02.safetensors"


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def need(to: str) -> None:
    if to == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)


# -- every target


@pytest.mark.parametrize("pruned", ["elements", "units"])
@pytest.mark.parametrize("to", TARGETS)
def test_every_export_has_the_logits_of_the_masked_model(to, pruned, runs, tmp_path):
    need(to)
    done = export(runs[pruned], to, tmp_path / "deep" / "out")
    assert done.difference <= TARGETS[to].tolerance
    found = TARGETS[to].logits(tmp_path / "deep" / "out", images())
    assert relative_difference(logits(last(runs[pruned]), images()), found) <= TARGETS[to].tolerance
    assert sorted(done.sizes) == sorted(path.name for path in (tmp_path / "deep" / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("to", TARGETS)
def test_the_usage_code_of_the_card_runs(to, runs, tmp_path, monkeypatch, capsys):
    need(to)
    export(runs["units"], to, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "out" / "image.png")
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(compile(code, to, "exec"), names)
    if to == "dense":
        expected = logits(last(runs["units"]), images())
        assert relative_difference(expected, names["model"](images()).detach()) <= 1e-5
    else:
        assert capsys.readouterr().out.split()[0] in set("0123456789")


def test_the_card_reports_what_was_measured(runs, tmp_path):
    export(runs["units"], "slim", tmp_path / "out")
    _, front, text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    row = json.loads(last(runs["units"]).with_suffix(".json").read_text())["row"]
    tree = yaml.safe_load(front)
    assert (tree["library_name"], tree["pipeline_tag"]) == ("vit_rsst", "image-classification")
    [result] = tree["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(row["test_top1"] / 100, abs=1e-6)
    assert f"Test top-1: {row['test_top1']:.2f} %" in text
    ticket = ticket_file.load(last(runs["units"]))
    assert f"{ticket.mask.density:.2%}" in text
    small = vit_rsst.load(tmp_path / "out")
    assert f"{sum(p.numel() for p in small.parameters()):,}" in text
    heads, neurons = small.blocks[0].attn.num_heads, small.blocks[0].mlp.fc1.out_features
    assert f"| 0 | {heads} of 3 | {neurons} of 24 |" in text
    assert ticket.metadata["recipe"] in text


def test_a_ticket_outside_of_a_run_has_no_score(runs, tmp_path):
    shutil.copy(last(runs["units"]), tmp_path / "alone.safetensors")
    export(tmp_path / "alone.safetensors", "dense", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "was not measured" in card
    assert "model-index" not in card


# -- timm and transformers alone

ALONE = """\
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vit_rsst":
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
from safetensors.torch import load_file, save_file
import torch, timm
from transformers import AutoImageProcessor, AutoModelForImageClassification
images = load_file(sys.argv[1])["images"]
with torch.no_grad():
    model = timm.create_model(f"local-dir:{sys.argv[2]}", pretrained=True).eval()
    twin = AutoModelForImageClassification.from_pretrained(sys.argv[3]).eval()
    AutoImageProcessor.from_pretrained(sys.argv[3])
    found = {"timm": model(images), "transformers": twin(images).logits}
save_file(found, sys.argv[4])
print(model.pretrained_cfg["label_names"], twin.config.id2label[3], "vit_rsst" in sys.modules)
"""


def test_timm_and_transformers_load_their_folders_in_a_process_without_this_package(runs, tmp_path):
    for to in ("timm", "transformers"):
        export(runs["units"], to, tmp_path / to)
    save_file({"images": images()}, tmp_path / "images.safetensors")
    files = [tmp_path / name for name in ("images.safetensors", "timm", "transformers", "found.safetensors")]
    done = tiny.python("-c", ALONE, *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{[str(i) for i in range(10)]} 3 False"
    expected, found = logits(last(runs["units"]), images()), load_file(files[-1])
    assert relative_difference(expected, found["timm"]) <= 1e-5
    assert relative_difference(expected, found["transformers"]) <= 1e-5


@torch.no_grad()
def test_a_converted_vit_is_the_same_function_in_float64():
    for args in ({}, {"act_layer": "gelu_tanh"}, {"qkv_bias": False}):
        torch.manual_seed(0)
        net = zoo.create(*zoo.describe("vit_tiny", VIT | args, 10)).double().eval()
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        twin = transformers_folder.converted(net).double()
        x = images().double()
        assert (net(x) - twin(x).logits).abs().max() <= 1e-10
        assert {m.eps for m in twin.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"reg_tokens": 2}, "reg_token"),
        ({"init_values": 1e-5}, r"ls1\.gamma"),
        ({"class_token": False, "global_pool": "avg"}, "pools with 'avg'"),
        ({"global_pool": "avg", "fc_norm": False}, "pools with 'avg'"),
        ({"qk_norm": True}, "k_norm"),
        ({"pre_norm": True}, "norm_pre"),
        ({"no_embed_class": True}, "no position"),
        ({"act_layer": "relu"}, "ReLU"),
        ({"proj_bias": False}, r"no blocks\.0\.attn\.proj\.bias"),
        ({"scale_attn_norm": True}, r"attn\.norm"),
        ({"final_norm": False}, r"no norm\.bias"),
    ],
)
def test_a_vit_without_equivalent_in_transformers_is_rejected_with_the_reason(args, reason):
    net = zoo.create(*zoo.describe("vit_tiny", VIT | args, 10), device="meta")
    with pytest.raises(InputError, match=reason):
        transformers_folder.converted(net)


def test_the_image_processor_makes_the_images_of_the_run(tmp_path):
    from transformers import AutoImageProcessor

    export(make_ticket(tmp_path / "t.safetensors", "vit_tiny", VIT), "transformers", tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = AutoImageProcessor.from_pretrained(tmp_path / "out")(Image.fromarray(pixels), return_tensors="pt")
    expected = normalize(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None], (0.3, 0.4, 0.5), (0.2, 0.3, 0.4))
    assert torch.allclose(found["pixel_values"], expected, atol=1e-6)
    assert found["pixel_values"].shape == (1, 3, 32, 32)


def test_timm_prepares_the_images_of_the_run(tmp_path):
    import timm

    export(make_ticket(tmp_path / "t.safetensors", "vit_tiny", VIT), "timm", tmp_path / "out")
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'out'}"))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = timm.data.create_transform(**config)(Image.fromarray(pixels))
    expected = normalize(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None], (0.3, 0.4, 0.5), (0.2, 0.3, 0.4))
    assert torch.allclose(found, expected[0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "args", "kind", "to"),
    [
        ("hf:vit", HF_VIT, "head+neuron", "transformers"),
        ("hf:vit", HF_VIT, "head+neuron", "slim"),
        ("hf:vit", HF_VIT, "head", "onnx"),
        ("resnet20", {}, "channel", "slim"),
        ("resnet20", {}, "channel", "dense"),
        ("resnet20", {}, "channel", "onnx"),
        ("resnet18", {}, "channel", "timm"),
        ("resnet18", {}, "channel", "slim"),
        *((name, args, "head+neuron", to) for name, args in OWN.items() for to in ("slim", "onnx")),
        ("vit_tiny", VIT | {"reg_tokens": 2, "init_values": 0.1}, "neuron", "timm"),
    ],
)
def test_other_models_export_to_the_targets_that_support_them(name, args, kind, to, tmp_path):
    need(to)
    path = make_ticket(tmp_path / "t.safetensors", name, args, kind)
    done = export(path, to, tmp_path / "out")
    assert done.is_narrower
    found = TARGETS[to].logits(tmp_path / "out", images())
    assert relative_difference(logits(path, images()), found) <= TARGETS[to].tolerance


@pytest.mark.parametrize(
    ("name", "args", "to", "message"),
    [
        ("resnet20", {}, "timm", "timm has no model of 'resnet20'; use --to slim, onnx or dense"),
        ("resnet20", {}, "transformers", "transformers has no model of 'resnet20'; use --to slim"),
        ("resnet18", {}, "transformers", "it is a ResNet; use --to timm"),
        *((name, args, "timm", f"timm has no model of '{name}'; use --to slim") for name, args in OWN.items()),
        *((name, args, "transformers", f"transformers has no model of '{name}'") for name, args in OWN.items()),
        ("hf:vit", HF_VIT, "timm", "hf:vit is a model of transformers; use --to transformers"),
    ],
)
def test_a_model_without_a_counterpart_is_rejected_in_one_sentence(name, args, to, message, tmp_path):
    path = make_ticket(tmp_path / "t.safetensors", name, args)
    with pytest.raises(InputError, match=message):
        export(path, to, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


# -- slim folders


def test_a_slim_folder_has_fewer_parameters_and_the_scores_of_its_ticket(runs, tmp_path):
    export(runs["units"], "slim", tmp_path / "out")
    small, full = vit_rsst.load(str(tmp_path / "out")), Work.of(runs["units"]).net
    assert not small.training
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in full.parameters())
    scores = []
    for what in (runs["units"], tmp_path / "out"):
        assert tiny.command("evaluate", what, "--json", tmp_path / "scores.json") == 0
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
    assert scores[0]["confusion"] == scores[1]["confusion"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-5)


def test_widths_of_neurons_are_rounded_on_demand(runs, tmp_path):
    assert tiny.command("export", runs["units"], "--to", "slim", tmp_path / "out", "--round-to", "8") == 0
    small = vit_rsst.load(tmp_path / "out")
    assert small.blocks[0].mlp.fc1.out_features % 8 == 0
    ticket = ticket_file.load(last(runs["units"]))
    exact = slim.widths(slim.kept_units(Work.of(runs["units"]).net, ticket.mask))
    assert small.blocks[0].mlp.fc1.out_features - exact["blocks.0.mlp"] in range(8)


@pytest.mark.parametrize(
    "pruning",
    [
        "pruning: {method: {name: dense}}",
        "pruning: {method: {name: imp}, schedule: {rounds: 1, final_sparsity: 0.5}}",
        "pruning: {method: {name: rsst}, granularity: neuron, schedule: {rounds: 1, final_sparsity: 0.3}}",
    ],
)
def test_a_slim_folder_is_trained_further_and_its_tickets_know_their_widths(pruning, runs, tmp_path, capsys):
    export(runs["units"], "slim", tmp_path / "slim")
    text = tiny.RECIPE[: tiny.RECIPE.index("pruning:")] + pruning + "\n"
    text = text.replace("}}\noptim", f"}}, start_from: {tmp_path / 'slim'}}}\noptim")
    assert "start_from" in text
    assert tiny.command("train", tiny.write_recipe(tmp_path, text)) == 0
    run = tmp_path / "runs" / "tiny"
    path, ticket = open_ticket(run)
    widths = json.loads(ticket.metadata["widths"])
    before = vit_rsst.export.load(tmp_path / "slim")  # as cards of 0.1 do
    assert ticket.state["blocks.0.mlp.fc1.weight"].shape == before.blocks[0].mlp.fc1.weight.shape
    assert widths.get("blocks.0.mlp", 24) == before.blocks[0].mlp.fc1.out_features
    assert any(not torch.equal(ticket.state[n], t) for n, t in before.state_dict().items())
    assert tiny.command("evaluate", run) == 0
    for to in ("slim", "dense"):
        assert tiny.command("export", path, "--to", to, tmp_path / to / "again") == 0
    if "neuron" in pruning:
        smaller = vit_rsst.load(tmp_path / "slim" / "again")
        assert smaller.blocks[0].mlp.fc1.out_features < before.blocks[0].mlp.fc1.out_features
    capsys.readouterr()
    assert tiny.command("export", run, "--to", "timm", tmp_path / "no") == 2
    assert "a slim shape" in capsys.readouterr().err


def test_a_slim_folder_is_exported_as_its_ticket_is(runs, tmp_path):
    need("onnx")
    export(runs["units"], "slim", tmp_path / "slim")
    export(tmp_path / "slim", "onnx", tmp_path / "onnx")
    found = TARGETS["onnx"].logits(tmp_path / "onnx", images())
    assert relative_difference(logits(last(runs["units"]), images()), found) <= 1e-4


# -- ONNX


def scores(folder: Path, *argv: object) -> dict:
    assert tiny.command("evaluate", *argv, "--json", folder / "scores.json") == 0
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def test_the_onnx_file_takes_any_batch_says_how_to_prepare_images_and_scores_as_its_ticket(runs, tmp_path, capsys):
    need("onnx")
    import onnx
    import onnxruntime

    assert tiny.command("export", runs["units"], "--to", "onnx", tmp_path / "out", "--opset", "20") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    [entry], [result] = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.shape[1:], result.name) == ("images", [3, 32, 32], "logits")
    for batch in (1, 7):
        assert session.run(None, {"images": images(batch).numpy()})[0].shape == (batch, 10)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mean"]) == [0.305, 0.305, 0.305]
    assert json.loads(about["classes"]) == [str(i) for i in range(10)]
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert {o.domain: o.version for o in model.opset_import}[""] == 20
    # The exporter's notes name files of this machine.
    assert b"onnx_file.py" not in (tmp_path / "out" / "model.onnx").read_bytes()
    stored = sum(np.prod(tensor.dims) for tensor in model.graph.initializer)
    assert stored < 1.05 * sum(p.numel() for p in Work.of(runs["units"]).slim.net.parameters()) + 100
    expected = scores(tmp_path, runs["units"])
    for path in (tmp_path / "out", tmp_path / "out" / "model.onnx"):
        found = scores(tmp_path, path, "--source", "digits")
        assert (found["confusion"], found["density"]) == (expected["confusion"], None)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    (tmp_path / "bad.onnx").write_bytes((tmp_path / "out" / "model.onnx").read_bytes()[:500])
    assert tiny.command("evaluate", tmp_path / "bad.onnx", "--source", "digits") == 5
    assert "bad.onnx: onnxruntime" in capsys.readouterr().err


@pytest.mark.parametrize("opset", [5, 99])
def test_an_opset_that_the_exporter_does_not_write_is_refused(opset, runs, tmp_path, capsys):
    need("onnx")
    assert tiny.command("export", runs["units"], "--to", "onnx", tmp_path / "out", "--opset", opset) == 2
    assert f"not {opset}; use that" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_onnx_without_its_packages_says_what_to_install(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tiny.command("export", runs["units"], "--to", "onnx", tmp_path / "out") == 3
    assert "pip install 'vit-rsst[onnx]'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# -- what can go wrong


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_non_empty_folder_is_not_touched(runs, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert tiny.command("export", runs["units"], "--to", "slim", tmp_path / "out") == 2
    assert tiny.command("export", runs["units"], "--to", "slim", tmp_path / "out" / "mine.txt") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("already exists and is not empty" in line for line in errors)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_folder_is_accepted(runs, tmp_path):
    (tmp_path / "out").mkdir()
    export(runs["units"], "dense", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("fault", ["truncated", "flipped", "foreign", "absent", "of another model", "without data"])
def test_a_damaged_ticket_exits_with_5_and_writes_nothing(fault, runs, tmp_path, capsys):
    path = tmp_path / "ticket.safetensors"
    shutil.copy(last(runs["units"]), path)
    ticket = ticket_file.load(path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "flipped":
        flip(path, -5)
    elif fault == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif fault == "absent":
        path.unlink()
    elif fault == "of another model":
        args = json.dumps(ticket.model_args | {"embed_dim": 48})
        ticket_file.save(path, ticket.state, ticket.mask, ticket.metadata | {"model_args": args})
    else:
        ticket_file.save(path, ticket.state, ticket.mask, {k: v for k, v in ticket.metadata.items() if k != "data"})
    for to in ("slim", "timm", "transformers"):
        assert tiny.command("export", path, "--to", to, tmp_path / "out") == 5
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert [p.name for p in tmp_path.iterdir() if p != path] == []


@pytest.mark.parametrize("fault", ["weights", "config", "truncated", "no weights", "format", "no json", "widths"])
def test_a_damaged_slim_folder_is_rejected(fault, runs, tmp_path, capsys):
    folder = tmp_path / "out"
    export(runs["units"], "slim", folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    text = config.read_text()
    if fault == "weights":
        flip(weights, -5)
    elif fault == "config":
        config.write_text(text.replace("0.305", "0.306"))
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "no weights":
        weights.unlink()
    elif fault == "format":
        config.write_text(text.replace("vit_rsst.slim/1", "vit_rsst.slim/9"))
    elif fault == "no json":
        config.write_text(text[:-20])
    else:
        config.write_text(re.sub(r'"blocks.0.mlp": \d+', '"blocks.0.mlp": 10000', text))
    with pytest.raises(Damaged):
        vit_rsst.load(folder)
    assert tiny.command("evaluate", folder) == 5
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "timm", "--round-to", "8"), "--round-to: has no effect with --to timm, only with slim and onnx"),
        (("--to", "slim", "--opset", "20"), "--opset: has no effect with --to slim, only with onnx"),
        (("--to", "slim", "--round-to", "0"), "--round-to: expected a whole number, 1 or more"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(options, message, runs, tmp_path, capsys):
    assert tiny.command("export", runs["units"], tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_unknown_target_is_refused(runs, tmp_path, capsys):
    assert tiny.command("export", runs["units"], "--to", "tim", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert all(name in error for name in TARGETS)
    with pytest.raises(InputError, match="Did you mean 'timm'"):
        export(runs["units"], "tim", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_an_export_that_differs_from_the_ticket_is_discarded(runs, tmp_path, monkeypatch):
    wrong = replace(TARGETS["timm"], logits=lambda folder, images: torch.zeros(len(images), 10))
    monkeypatch.setitem(exporting.TARGETS, "timm", wrong)
    with pytest.raises(RunError, match="does not match the ticket"):
        export(runs["units"], "timm", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_write_error_leaves_nothing_behind(runs, tmp_path, monkeypatch):
    def full(work: Work, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(exporting.TARGETS, "timm", replace(TARGETS["timm"], write=full))
    with pytest.raises(MissingRequirement, match="cannot be written"):
        export(runs["units"], "timm", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_file_modes_follow_the_umask(runs, tmp_path):
    for to in ("slim", "timm", "transformers", "dense"):
        export(runs["units"], to, tmp_path / to)
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / to).iterdir()} == {0o644}


# -- push


class FakeApi:
    """Fake `HfApi` that records its calls; the repository `me/there` exists and is public."""

    calls: list = []  # noqa: RUF012 - the class under test makes its own instance

    def __init__(self, **kwargs: object):
        pass

    def create_repo(self, repo: str, **kwargs: object) -> huggingface_hub.RepoUrl:
        self.calls.append(("create", repo, kwargs))
        self.private = kwargs["private"] and repo != "me/there"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}")

    def repo_info(self, repo: str) -> object:
        return type("Info", (), {"private": self.private})()

    def upload_folder(self, *, folder_path: Path, **kwargs: object) -> None:
        self.calls.append(("upload", sorted(path.name for path in Path(folder_path).iterdir())))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(push, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(push, "get_token", lambda: "hf_token")
    monkeypatch.setattr(push.constants, "HF_HUB_OFFLINE", False)
    return FakeApi


def test_push_is_private_unless_told_otherwise(runs, tmp_path, api, capsys):
    export(runs["units"], "timm", tmp_path / "out")
    assert tiny.command("push", tmp_path / "out", "me/vit") == 0
    assert "(private)" in capsys.readouterr().out
    assert tiny.command("push", last(runs["units"]), "me/vit", "--public") == 0
    assert "(public)" in capsys.readouterr().out
    assert api.calls == [
        ("create", "me/vit", {"private": True, "exist_ok": True}),
        ("upload", ["README.md", "config.json", "model.safetensors"]),
        ("create", "me/vit", {"private": False, "exist_ok": True}),
        ("upload", ["README.md", "round_02.safetensors"]),
    ]


def test_a_dry_run_lists_files_and_sends_nothing(runs, tmp_path, api, capsys):
    export(runs["units"], "timm", tmp_path / "out")
    assert tiny.command("push", tmp_path / "out", "me/vit", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "would upload to me/vit (private); nothing was sent"
    assert [line.split()[0] for line in lines[1:]] == ["README.md", "config.json", "model.safetensors"]
    assert api.calls == []


def test_nothing_is_pushed_to_a_repository_of_the_other_visibility(runs, tmp_path, api, capsys):
    assert tiny.command("push", last(runs["units"]), "me/there") == 2
    assert "already exists and is public" in capsys.readouterr().err
    assert [call[0] for call in api.calls] == ["create"]


def test_exports_and_pushes_contain_no_local_paths(tmp_path, api, monkeypatch):
    path = make_ticket(tmp_path / "t.safetensors", "vit_tiny", {"depth": 2})
    ticket = ticket_file.load(path)
    data = json.loads(ticket.metadata["data"]) | {"source": "cifar10", "path": "/home/somebody/secret/data"}
    ticket_file.save(path, ticket.state, ticket.mask, ticket.metadata | {"data": json.dumps(data)})
    seen = []
    monkeypatch.setattr(
        FakeApi,
        "upload_folder",
        lambda self, *, folder_path, **rest: seen.extend(file.read_bytes() for file in Path(folder_path).iterdir()),
    )
    for to in ("slim", "dense", "timm", "transformers"):
        export(path, to, tmp_path / to)
        seen += [file.read_bytes() for file in (tmp_path / to).rglob("*") if file.is_file()]
    push.push(path, "me/vit")
    assert len(seen) >= 4 * 3 + 2
    assert not [content for content in seen if b"secret" in content]
    assert b"secret" in path.read_bytes()


@pytest.mark.parametrize(
    ("offline", "token", "message"),
    [(True, "hf_x", "HF_HUB_OFFLINE is set"), (False, None, "not logged in to the Hub")],
)
def test_push_without_network_or_token_explains_what_to_do(offline, token, message, runs, api, monkeypatch, capsys):
    monkeypatch.setattr(push.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(push, "get_token", lambda: token)
    assert tiny.command("push", last(runs["units"]), "me/vit") == 3
    assert message in capsys.readouterr().err
    assert api.calls == []


@pytest.mark.parametrize("repo", ["me/vit/x", "a b", "--", ""])
def test_an_invalid_repository_id_is_rejected(repo, runs, api):
    with pytest.raises(InputError, match="not a repository id"):
        push.push(last(runs["units"]), repo)


def test_a_folder_that_is_not_an_export_is_not_pushed(runs, tmp_path, api, capsys):
    for folder in (runs["units"], tmp_path):
        assert tiny.command("push", folder, "me/vit", "--dry-run") == 2
    assert capsys.readouterr().err.count("run `vit-rsst export` first") == 2


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "hf:swin"])
def test_attention_that_torch_cannot_lower_is_exported_in_plain_products(name, tmp_path):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    if name == "hf:swin":
        args = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4]}
        args["window_size"] = 4
    net = zoo.create(*zoo.describe(name, args, 10)).eval()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(images)
        torch.testing.assert_close(onnx_file.Logits(net, onnx_file.PlainAttention)(images), expected)


def test_the_root_cause_of_a_failed_export_is_shown_without_colours():
    error = RuntimeError("step 2/3 failed")
    error.__cause__ = ValueError("\x1b[96mCannot view\x1b[0m a tensor!\nmore")
    assert onnx_file.root_cause(error) == "Cannot view a tensor"


def test_a_full_disk_exits_with_3_and_leaves_nothing(runs, tmp_path, monkeypatch, capsys):
    from safetensors import SafetensorError

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    for place in ("tickets.slim_folder", "export.timm_folder"):
        monkeypatch.setattr(f"vit_rsst.{place}.save_file", full)
    for to in ("slim", "dense", "timm"):
        assert tiny.command("export", runs["units"], "--to", to, tmp_path / "out") == 3
        assert "No space left on device" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
