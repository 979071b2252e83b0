"""Figures: drawn during and after a run by default, from any run folder, and never at the run's cost."""

import base64
import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import tiny
import torch

from vit_rsst import train
from vit_rsst.errors import InputError
from vit_rsst.evaluation.evaluate import outcomes_of
from vit_rsst.models import zoo
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.report import canvas, curves, history, pictures, watching
from vit_rsst.tickets import rounds, ticket_file

DRAWN = tiny.RECIPE.replace("figures: false", "figures: true")
UNITS = DRAWN.replace("pruning:\n", "pruning:\n  granularity: head+neuron\n").replace("0.9", "0.5")
MODEL = {"confusion", "confused", "attention", "dense_beside_pruned"}
CURVES = {"curves", "rate_and_penalty", "accuracy_by_density", "layers", "sizes"}


def trained(folder: Path, text: str = DRAWN, *overrides: str) -> Path:
    assert tiny.command("train", tiny.write_recipe(folder, text), *overrides) == 0
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("figures"), UNITS)


def names(run: Path) -> set[str]:
    return {path.stem for path in (run / "figures").glob("*.svg")}


def test_a_run_draws_its_figures_by_default(run):
    assert names(run) == MODEL | CURVES | {"units"}
    assert not [event for event in tiny.events(run) if event["event"] == "warning"]
    for path in (run / "figures").glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert text.rstrip().endswith("</svg>"), path
        assert canvas.GROUND in text, "it has a background in any viewer"
        assert "http" not in re.sub(r'(xmlns\S*|rdf:\w+)="[^"]*"|<!DOCTYPE[^>]*>', "", text), path


@pytest.mark.parametrize(("share", "expected"), [(1e9, CURVES), (0.0, set())])
def test_figures_are_drawn_after_a_round_if_time_allows(tmp_path, monkeypatch, share, expected):
    monkeypatch.setattr(watching, "SHARE", share)
    monkeypatch.setattr(watching.Watcher, "finish", lambda self: None)
    assert names(trained(tmp_path)) == expected


def test_a_failing_figure_is_one_warning_and_the_run_continues(tmp_path, monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(watching, "SHARE", 1e9)
    monkeypatch.setattr(pictures, "PICTURES", ())
    drawings = [dataclasses.replace(d, draw=broken) if d.name == "layers" else d for d in curves.DRAWINGS]
    monkeypatch.setattr(curves, "DRAWINGS", drawings)
    run = trained(tmp_path, DRAWN, "pruning.schedule.rounds=1")
    assert tiny.status(run)["state"] == "finished"
    warnings = [event["text"] for event in tiny.events(run) if event["event"] == "warning"]
    assert warnings == ["figures: cannot draw layers (no ink)"]
    assert capsys.readouterr().err.count("no ink") == 1
    assert names(run) == CURVES - {"layers"}


def test_figures_do_not_change_a_run(tmp_path, run):
    other = trained(tmp_path, UNITS, "tracking.figures=false")
    assert not (other / "figures").exists()
    for path in sorted((run / "tickets").glob("*.safetensors")):
        with_figures, without = ticket_file.load(path), ticket_file.load(other / "tickets" / path.name)
        assert with_figures.metadata == without.metadata
        for name, tensor in with_figures.state.items():
            assert torch.equal(tensor, without.state[name]), (path.name, name)


def test_without_matplotlib_a_run_says_so_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watching, "is_possible", lambda: False)
    run = trained(tmp_path)
    assert not (run / "figures").exists()
    assert "pip install 'vit_rsst[report]'" in capsys.readouterr().out


def test_only_the_main_process_draws(tmp_path):
    s = dataclasses.make_dataclass("S", ["accelerator"])(
        dataclasses.make_dataclass("A", ["is_main_process"])(False)
    )  # fmt: skip
    recipe = dataclasses.make_dataclass("R", ["tracking"])(dataclasses.make_dataclass("T", ["figures"])(True))
    assert train.make_watcher(s, recipe) is None


def test_the_histogram_counts_living_weights_by_size():
    weights = {"w": torch.tensor([[1.0, -0.1, 0.01], [1e-12, 0.3, 5.0]])}  # straight-through: 0.3 lives on
    mask = MaskSet({"w": torch.tensor([[True, True, True], [True, False, True]])})
    condemned = MaskSet({"w": torch.tensor([[False, False, True], [True, False, False]])})
    found = watching.histogram(weights, mask, condemned)
    assert len(found["edges"]) == len(found["kept"]) + 1
    placed = {
        part: [edge for edge, n in zip(found["edges"], found[part], strict=False) if n]
        for part in ("kept", "condemned")
    }
    assert placed == {"kept": [-1.0, 0.0, 0.625], "condemned": [-8.0, -2.0]}
    assert "condemned" not in watching.histogram(weights, mask, None)


def test_histograms_show_the_condemned_shrink(run):
    moments = [event for event in history.read(run).weights if event.get("condemned")]
    assert len(moments) > 1
    means = [
        sum(n * e for n, e in zip(m["condemned"], m["edges"], strict=False)) / sum(m["condemned"]) for m in moments[:2]
    ]
    assert means[1] < means[0]


def test_the_confusion_matrix_is_that_of_evaluate(run, tmp_path):
    assert tiny.command("evaluate", run, "--json", tmp_path / "e.json") == 0
    expected = json.loads((tmp_path / "e.json").read_text())
    found = history.read(run).scores
    assert found["confusion"] == expected["confusion"]
    assert found["ticket"] == "round_02.safetensors"


def test_images_are_found_by_position_in_the_split(run):
    exhibit = pictures.Exhibit.of(run, torch.device("cpu"))
    positions = torch.tensor([3, 200, 7]).numpy()
    picked = exhibit.pictures(positions)
    assert torch.equal(picked.images, exhibit.data.test.images[positions])
    one_by_one = dataclasses.replace(exhibit.data)
    object.__setattr__(one_by_one, "samples", lambda split: one_by_one.rows[split])
    again = dataclasses.replace(exhibit, data=one_by_one).pictures(positions)
    assert torch.equal(again.images, picked.images)
    assert again.labels.tolist() == picked.labels.tolist()


def test_corrupt_images_shift_no_position(run, tmp_path):
    """Positions count decodable images, as the outcomes do."""
    exhibit = pictures.Exhibit.of(run, torch.device("cpu"))
    whole, rows = exhibit.data.test, exhibit.data.rows["test"]
    images = [image if i not in (0, 2, 5) else {"bytes": b"no image", "path": None}
              for i, image in enumerate(rows.table.images[rows.index])]  # fmt: skip
    table = dataclasses.replace(rows.table, images=Encoded(images), labels=rows.table.labels[rows.index])
    options = dataclasses.replace(exhibit.data.options, max_corrupt=0.1)
    spoilt = {"test": dataclasses.replace(rows, table=table, index=torch.arange(len(images)).numpy())}
    data = dataclasses.replace(exhibit.data, rows=spoilt, options=options)
    trained = dataclasses.replace(exhibit.trained, data=options)
    exhibit = dataclasses.replace(exhibit, data=data, trained=trained)
    assert len(exhibit.outcomes) == len(images) - 3
    picked = exhibit.pictures(torch.tensor([0, 2, 1, 9]).numpy())
    assert torch.equal(picked.images, whole.images[[1, 4, 3, 12]])
    assert picked.labels.tolist() == whole.labels[[1, 4, 3, 12]].tolist()
    assert exhibit.samples.labels.unique().numel() == pictures.SHOWN
    one_by_one = outcomes_of(trained, data, "test", 1, torch.device("cpu"))[0]  # the first batch is empty
    assert one_by_one.labels.tolist() == exhibit.outcomes.labels.tolist()


class Encoded(list):
    """Images indexed by rows, like a table."""

    def __getitem__(self, rows: list[int]) -> list:
        return [list.__getitem__(self, row) for row in rows]


@pytest.mark.parametrize(
    ("densities", "expected"),
    [
        ([1.0, 1.0], [1.0]),
        ([1.0, 0.56, 0.32, 0.18, 0.1], [1.0, 0.56, 0.32, 0.18, 0.1]),
        ([1.0, 0.98, 0.5, 0.45, 0.11, 0.1], [1.0, 0.5, 0.1]),
    ],
)
def test_density_ticks_do_not_overlap(densities, expected):
    assert curves._apart(densities) == expected


def test_thirty_rounds_and_one_epoch_stay_legible():
    rows = [rounds.RoundRow(i, 1, 0.926**i, 50.0, 90.0, 1.0, None, None, None, 1, 1.0, 1) for i in range(31)]
    events = [{"event": "epoch", "step": 2, "round": 0, "epoch": 1, "train/loss": 2.0, "val/loss": 2.1}]
    run_history = history.History(Path(), {}, {}, {}, events, rows)
    with canvas.drawing():
        figure = curves.accuracy_by_density(run_history)
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in figure.axes[1].get_xticklabels()]
        loss = curves.curves(run_history).axes[0]
    assert all(a.x1 < b.x0 or b.x1 < a.x0 for a, b in itertools.pairwise(boxes))
    assert loss.get_xticks().tolist() == [1]
    assert [line.get_marker() for line in loss.lines] == ["o", "o"]


def test_a_model_without_attention_has_no_maps(run):
    exhibit = pictures.Exhibit.of(run, torch.device("cpu"))
    resnet = dataclasses.replace(exhibit.trained, net=zoo.create("resnet20", {"num_classes": 10}).eval())
    with canvas.drawing():
        assert pictures.attended(exhibit) is not None
        assert pictures.attended(dataclasses.replace(exhibit, trained=resnet)) is None
        assert pictures.dense_beside_pruned(dataclasses.replace(exhibit, dense=resnet)) is None
        assert pictures.dense_beside_pruned(dataclasses.replace(exhibit, dense=None)) is None


def test_a_folder_with_a_truncated_line_is_still_read(run, tmp_path):
    for name in ("recipe.yaml", "status.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "epoch", "step": 99, "val/to')
    run_history = history.read(tmp_path)
    assert (len(run_history.epochs), run_history.rows, run_history.scores) == (6, [], {})
    with canvas.drawing():
        drawn = {drawing.name for drawing in curves.DRAWINGS if drawing.draw(run_history) is not None}
    assert drawn == {"curves", "rate_and_penalty", "sizes"}


def test_a_folder_that_is_not_a_run_is_rejected(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        history.read(tmp_path)


def test_the_text_of_a_figure_follows_the_scheme_of_the_page(run):
    text = (run / "figures" / "curves.svg").read_text(encoding="utf-8")
    embedded = base64.b64decode(canvas.data_uri(text).removeprefix("data:image/svg+xml;base64,")).decode()
    assert embedded.count(canvas.INK) == 1, "in the style sheet alone"
    assert canvas.GROUND not in embedded
    assert embedded.count("var(--ink)") == text.count(canvas.INK) > 10


def test_a_single_round_without_removal_draws_nothing():
    row = rounds.RoundRow(0, 1.0, 1.0, 50.0, 90.0, 1.0, None, None, None, 1, 1.0, 1)
    run_history = history.History(Path(), {}, {}, {}, [], [row], [{"layers": {}, "units": {}}])
    assert [drawing.name for drawing in curves.DRAWINGS if drawing.draw(run_history) is not None] == []
