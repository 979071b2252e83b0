"""The analysis: counts that a second way of counting confirms, measurements that are there, tables that fit a page."""

import csv
import json
from pathlib import Path

import pytest
import tiny
import torch

from vit_rsst import timing
from vit_rsst.analysis import tables
from vit_rsst.analysis.analyze import analyze
from vit_rsst.analysis.counts import count, training_bytes
from vit_rsst.analysis.subject import open_subject
from vit_rsst.errors import InputError
from vit_rsst.export.exporting import export
from vit_rsst.models import zoo
from vit_rsst.models.complexity import flops, size_of
from vit_rsst.tickets import ticket_file

SMALL = ("--batch", "1", "2")


@pytest.fixture(scope="module")
def slim_folder(units_run, tmp_path_factory) -> Path:
    return export(units_run, "slim", tmp_path_factory.mktemp("slim") / "small", None, None).folder


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET", 0.01)


def test_counts_of_a_ticket_match_its_mask_and_slim_folder(units_run, slim_folder):
    ticket = ticket_file.load(units_run / "tickets" / "round_02.safetensors")
    [found, small] = analyze([str(units_run), str(slim_folder)], is_measured=False)["items"]
    assert found["parameters"]["prunable"] == tiny.NUM_PRUNABLE
    assert found["parameters"]["alive"] == ticket.mask.num_alive
    nonzero = sum(int((tensor != 0).sum()) for name, tensor in ticket.state.items() if name in ticket.mask.masks)
    assert nonzero == ticket.mask.num_alive
    assert small["parameters"]["total"] == found["parameters"]["slim"] < found["parameters"]["total"]
    assert small["flops"]["dense"] == found["flops"]["slim"] < found["flops"]["dense"]
    assert small["parameters"]["alive"] == found["parameters"]["alive"]
    assert found["flops"]["effective"] == pytest.approx(found["flops"]["slim"], rel=1e-6)
    assert found["bytes"]["file"] == (units_run / "tickets" / "round_02.safetensors").stat().st_size
    assert found["bytes"]["slim_fp32"] == small["bytes"]["dense_fp32"]


def test_shares_of_layers_and_kinds_add_up_to_one(units_run):
    item = count(open_subject(str(units_run)))
    for rows in (item["layers"], item["kinds"]):
        assert sum(row["alive"] for row in rows.values()) == item["parameters"]["alive"]
        assert sum(row["share"] for row in rows.values()) == pytest.approx(1.0)
    assert list(item["kinds"]) == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert {unit["kind"]: (unit["left"], unit["units"]) for unit in item["units"]}.keys() == {"head", "neuron"}
    assert all(0 < unit["left"] <= unit["units"] for unit in item["units"])
    [heads] = [unit["left"] for unit in item["units"] if unit["kind"] == "head"]
    assert item["layers"]["blocks.0.attn.proj.weight"]["alive"] == heads * 8 * 24


def test_a_model_a_recipe_and_an_image_size_can_be_named(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    [model, from_recipe, builtin, vit] = [
        count(open_subject(what)) for what in ("resnet20", str(recipe), "digits/quickstart", "vit_tiny")
    ]
    assert [item["kind"] for item in (model, from_recipe, builtin)] == ["model", "recipe", "recipe"]
    assert from_recipe["parameters"]["prunable"] == tiny.NUM_PRUNABLE
    assert from_recipe["training"]["batch"] == 32
    assert builtin["what"] == "digits-quickstart"
    assert vit["parameters"]["density"] == 1.0
    assert open_subject("vit_tiny", 64).net.pos_embed.shape[1] == 1 + 16 * 16
    assert flops(open_subject("resnet20", 64).net, 64) == count(open_subject("resnet20", 64))["flops"]["dense"]
    assert size_of(zoo.create(*zoo.describe("hf:vit", {"image_size": 48}, 10), device="meta")) == 48


def test_training_memory_is_state_and_activations():
    subject = open_subject("resnet20")
    activations = training_bytes(subject) - 4 * 4 * 269_722  # weights, gradients and two moments
    assert activations > 256 * 16 * 32 * 32 * 4  # at least the first layer's output for every image


def test_what_cannot_be_analysed_is_a_one_line_error(units_run, tmp_path, capsys):
    assert tiny.command("analyze", "vit_tini", "--no-latency") == 2
    assert "Did you mean" in capsys.readouterr().err
    assert tiny.command("analyze", units_run, "--no-latency", "--image-size", 40) == 2
    error = capsys.readouterr().err
    assert "does not accept images of 40 px" in error
    assert error.count("\n") == 1
    assert tiny.command("analyze", tmp_path / "missing.safetensors") == 5
    with pytest.raises(InputError, match="at least 1"):
        analyze(["resnet20"], batches=(0,))


def test_the_command_measures_dense_beside_slim_and_writes_json_and_csv(units_run, tmp_path, capsys):
    files = (tmp_path / "out.json", tmp_path / "out.csv")
    assert tiny.command("analyze", units_run, *SMALL, "--json", files[0], "--csv", files[1]) == 0
    shown = capsys.readouterr().out
    result = json.loads(files[0].read_text(encoding="utf-8"))
    [item] = result["items"]
    for name in ("dense", "slim"):
        for batch in ("1", "2"):
            times = item["latency"][name][batch]
            assert 0 < times["low"] <= times["median"] <= times["high"]
            assert times["repeats"] >= timing.FEWEST
        memory = item["memory"][name]
        assert memory["before"] <= memory["inference"]
    assert item["memory"]["dense"]["training"] >= item["memory"]["dense"]["inference"]
    assert item["epoch_seconds"] > 0
    assert {"device", "threads", "torch"} <= result.keys()
    with open(files[1], encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert float(row["latency.slim.2.median"]) == item["latency"]["slim"]["2"]["median"]
    assert int(row["flops.slim"]) == item["flops"]["slim"]
    assert "slim, speedup" in shown
    assert max(map(len, shown.splitlines())) <= tables.WIDTH


def test_tables_of_many_subjects_fit_the_page():
    item = count(open_subject("resnet20"))
    shown = tables.analysis_text({"items": [item | {"what": f"a_model_of_some_length_{i}"} for i in range(9)]})
    assert max(map(len, shown.splitlines())) <= tables.WIDTH
    assert all(f"a_model_of_some_length_{i}" in shown for i in range(9))


def test_latencies_are_measured_in_turns_at_least_five_times(monkeypatch):
    order = []

    class Net(torch.nn.Module):
        def __init__(self, name: str):
            super().__init__()
            self.name = name

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            return images

    monkeypatch.setattr(timing, "BUDGET", 0.0)
    found = timing.latency({"a": Net("a"), "b": Net("b")}, 8, 2, torch.device("cpu"))
    assert "".join(order) == "ab" * (timing.FEWEST + 1)  # the first pass of each is not counted
    assert [times["repeats"] for times in found.values()] == [timing.FEWEST] * 2
