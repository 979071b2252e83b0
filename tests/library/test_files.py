"""`vit_rsst.save`, `load`, `slim` and `analyze`: what a training script keeps, and what the command line reads."""

import json

import pytest
import timm
import tiny
import torch
from toys_of_others import tiny_bert, vit

import vit_rsst
from vit_rsst.errors import Damaged, InputError
from vit_rsst.models import zoo

TINY = {"name": "vit_tiny", "args": tiny.MODEL_ARGS}
DATA = {"source": "digits", "classes": [*"0123456789"]}


def tiny_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return zoo.create(*zoo.describe("vit_tiny", tiny.MODEL_ARGS, 10)).eval()


def logits(model: torch.nn.Module, size: int = 32) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


def test_a_saved_model_is_loaded_and_scored_and_exported_by_the_command_line(tmp_path):
    model = tiny_vit()
    vit_rsst.prune(model, 0.5)
    path = vit_rsst.save(model, tmp_path / "own.safetensors", data=DATA, **TINY)
    assert path.stat().st_size < 20_000 + sum(3 * p.numel() for p in model.parameters())
    assert torch.equal(logits(vit_rsst.load(path)), logits(model))
    assert tiny.command("evaluate", path, "--json", tmp_path / "scores.json") == 0
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["samples"] == 360
    assert tiny.command("export", path, "--to", "dense", tmp_path / "dense") == 0
    assert torch.equal(logits(vit_rsst.load(tmp_path / "dense")), logits(model))


def test_what_timm_notes_in_a_model_is_enough_to_build_it_again(tmp_path):
    model = timm.create_model("test_vit", img_size=32, num_classes=7).eval()
    vit_rsst.prune(model, 0.5)
    path = vit_rsst.save(model, tmp_path / "timm.safetensors")
    assert torch.equal(logits(vit_rsst.load(path)), logits(model))


def test_a_slim_model_computes_the_same_is_smaller_and_is_saved_by_its_widths(tmp_path):
    model = tiny_vit()
    vit_rsst.prune(model, {"head": 0.34, "neuron": 0.5}, granularity="head+neuron")
    small, report = vit_rsst.slim(model)
    assert torch.allclose(logits(small), logits(model), atol=1e-6)
    assert report.units == {"blocks.0.attn": ("head", 3, 2), "blocks.0.mlp": ("neuron", 24, 12)}
    assert report.parameters == tuple(sum(p.numel() for p in one.parameters()) for one in (model, small))
    assert str(report).endswith("2 of 3 heads left, 12 of 24 neurons left")
    loaded = vit_rsst.load(vit_rsst.save(small, tmp_path / "small.safetensors", **TINY))
    assert torch.equal(logits(loaded), logits(small))


def test_a_model_without_dead_units_comes_back_as_a_copy():
    model = vit().eval()
    small, report = vit_rsst.slim(model)
    assert small is not model
    assert str(report).endswith("no dead units")


def test_a_ticket_without_an_architecture_goes_into_a_model_that_is_passed(tmp_path):
    model = vit()
    vit_rsst.prune(model, 0.5)
    path = vit_rsst.save(model, tmp_path / "own.safetensors")
    with pytest.raises(InputError, match=r"^load\(path=…\): .*own.safetensors does not name its architecture; pass"):
        vit_rsst.load(path)
    loaded = vit_rsst.load(path, vit())
    assert torch.equal(logits(loaded, 8), logits(model.eval(), 8))
    with pytest.raises(Damaged, match="does not match this model"):
        vit_rsst.load(path, tiny_vit())


def test_a_language_model_is_saved_and_loaded(tmp_path):
    model = tiny_bert()
    vit_rsst.prune(model, 0.5, protect=["classifier*"])
    loaded = vit_rsst.load(vit_rsst.save(model, tmp_path / "bert.safetensors"), tiny_bert())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_analysis_counts_zeros_and_prints_a_table():
    model = tiny_vit()
    vit_rsst.prune(model, 0.5, granularity="neuron")
    found = vit_rsst.analyze(model)
    assert found["parameters"]["prunable"] == tiny.NUM_PRUNABLE
    assert found["flops"]["slim"] < found["flops"]["dense"]
    assert "density of prunable weights" in str(found)
    with pytest.raises(InputError, match=r"^analyze\(image_size=…\): VisionTransformer does not take images of 20 px"):
        vit_rsst.analyze(model, 20)
    words = vit_rsst.analyze(tiny_bert())
    assert "flops" not in words
    assert "parameters" in str(words)
    assert "FLOPs" not in str(words)


WRONG = [
    ({"name": "vit_tiny"}, "save(name=…): vit_tiny with these args is not the model to save: cls_token"),
    (
        TINY | {"args": tiny.MODEL_ARGS | {"num_heads": 4}},
        "save(name=…): vit_tiny with these args is not the model",
    ),
    ({"name": "vit_tinny"}, "save(name=…): unknown model 'vit_tinny'; expected"),
    ({"args": {"depth": 1}}, "save(args=…): has no effect without name; set it, or omit args."),
    (TINY | {"data": {"source": "digits"}}, "save(data=…): 'classes' is missing."),
    (TINY | {"data": DATA | {"source": "digit"}}, "save(data=…): unknown source 'digit'; expected"),
    (TINY | {"data": DATA | {"sourc": 1}}, "save(data=…): unknown field 'sourc'; expected"),
]


@pytest.mark.parametrize("words, sentence", WRONG)
def test_a_wrong_description_is_one_sentence_and_writes_nothing(tmp_path, words, sentence):
    with pytest.raises(InputError) as caught:
        vit_rsst.save(tiny_vit(), tmp_path / "x.safetensors", **words)
    assert str(caught.value).startswith(sentence)
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_is_named(tmp_path):
    for path in (tmp_path / "no" / "x.safetensors", tmp_path / "x.pt"):
        with pytest.raises(InputError, match=r"^save\(path=…\): .*expected NAME.safetensors in an existing folder\.$"):
            vit_rsst.save(tiny_vit(), path)
    with pytest.raises(Damaged, match="no such ticket"):
        vit_rsst.load(tmp_path / "x.safetensors")
