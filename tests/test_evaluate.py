"""`vit-rsst evaluate`: everything that can be scored, on one process and on two, as table, JSON and CSV."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import faulty
import pytest
import tiny
import torch

from vit_rsst.data.sources import open_data
from vit_rsst.errors import Damaged, InputError
from vit_rsst.evaluation import evaluate
from vit_rsst.models import published, zoo
from vit_rsst.tickets.trained import open_trained

TARGETS = ["slim", "timm", "transformers", "dense"]
EXACT = ("top1", "top5", "loss", "ece", "calibration", "precision", "recall", "f1", "support", "confusion", "macro_f1")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run over heads and neurons, with its exports beside it."""
    folder = tmp_path_factory.mktemp("evaluated")
    text = tiny.RECIPE.replace("final_sparsity: 0.9", "final_sparsity: 0.4").replace(
        "pruning:\n", "pruning:\n  granularity: head+neuron\n"
    )
    text = text.replace("source: digits", "source: digits, crop_pct: 0.9, interpolation: bicubic")  # exports say both
    assert tiny.command("train", tiny.write_recipe(folder, text)) == 0
    for target in TARGETS:
        assert tiny.command("export", folder / "runs" / "tiny", "--to", target, folder / target) == 0
    return folder / "runs" / "tiny"


def evaluated(output: Path, *argv: object) -> dict:
    assert tiny.command("evaluate", *argv, "--json", output) == 0
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("target", TARGETS)
def test_an_export_has_the_scores_of_its_ticket(run, tmp_path, target):
    expected = evaluated(tmp_path / "ticket.json", run)
    folder = run.parent.parent / target
    found = evaluated(
        tmp_path / "export.json", folder, *(() if target in ("slim", "dense") else ("--source", "digits"))
    )
    assert found["confusion"] == expected["confusion"]
    for name in ("top1", "top5", "loss", "ece", "macro_f1"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    assert found["density"] == pytest.approx(1.0 if target == "slim" else expected["density"])


def test_a_split_that_the_model_does_not_know_is_warned_of(run, tmp_path, capsys):
    for target, split, warned in (("timm", "val", True), ("timm", "test", False), ("dense", "val", False)):
        evaluated(tmp_path / "s.json", run.parent.parent / target, "--source", "digits", "--split", split)
        assert ("does not record how its dataset was split" in capsys.readouterr().err) == warned


def test_any_ticket_and_any_split_can_be_scored(run, tmp_path):
    first = run / "tickets" / "round_00.safetensors"
    sizes = {split: evaluated(tmp_path / "s.json", first, "--split", split)["samples"] for split in ("train", "val")}
    assert sizes == {"train": 1293, "val": 144}
    assert evaluated(tmp_path / "s.json", first)["density"] == 1.0


def test_scores_do_not_depend_on_the_batch(run, tmp_path):
    one, two = (evaluated(tmp_path / "s.json", run, "--batch", batch) for batch in (7, 360))
    assert one["confusion"] == two["confusion"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_the_csv_has_a_row_for_each_class_and_the_means(run, tmp_path, capsys):
    result = evaluated(tmp_path / "s.json", run, "--csv", tmp_path / "s.csv")
    with open(tmp_path / "s.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [*"0123456789", "macro mean", "weighted mean"]
    assert [float(row["f1"]) for row in rows] == [*result["f1"], result["macro_f1"], result["weighted_f1"]]
    assert [int(rows[3][f"taken for {c}"]) for c in "0123456789"] == result["confusion"][3]
    told = capsys.readouterr().out
    assert f"calibration error {100 * result['ece']:.2f}" in told
    assert "images/s" in told


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("timm",), 2, "name the dataset with --source and --data"),
        (("timm", "--source", "digts"), 2, "Did you mean 'digits'?"),
        (("vit_tiny", "--source", "digits"), 2, "has no weights until a recipe trains it"),
        (("slim", "--batch", "0"), 2, "--batch: expected a whole number, 1 or more"),
        (("no-such-model",), 5, "no such ticket"),
    ],
)
def test_what_cannot_be_scored_is_said_in_a_sentence(run, capsys, argv, code, message):
    folder = run.parent.parent / argv[0]
    assert tiny.command("evaluate", folder if folder.exists() else argv[0], *argv[1:]) == code
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_a_model_of_another_number_of_classes_that_does_not_name_them_is_refused(run):
    trained = open_trained(run)
    data = open_data(trained.data, trained.seed)
    other = zoo.create("resnet20", {"num_classes": 7}).eval()
    with pytest.raises(InputError, match="predicts 7 classes, but the dataset has 10; name the dataset"):
        evaluate.check_classes(dataclasses.replace(trained, net=other, classes=[]), data)
    with pytest.raises(Damaged, match="trained on 7 classes"):
        evaluate.check_classes(dataclasses.replace(trained, net=other, classes=[*"abcdefg"]), data)


def test_a_model_whose_weights_diverged_is_refused(run, tmp_path, capsys):
    from vit_rsst.tickets import ticket_file

    path = run / "tickets" / "round_00.safetensors"
    ticket = ticket_file.load(path)
    bad = {name: torch.full_like(t, float("nan")) if name == "head.bias" else t for name, t in ticket.state.items()}
    ticket_file.save(tmp_path / "bad.safetensors", bad, ticket.mask, ticket.metadata)
    assert tiny.command("evaluate", tmp_path / "bad.safetensors") == 5
    assert "logits are not finite" in capsys.readouterr().err


@pytest.mark.distributed
def test_two_processes_give_exactly_the_scores_of_one(run, tmp_path):
    argv = ("evaluate", run, "--batch", 50, "--json", tmp_path / "two.json")  # 8 batches, the last one of 10
    job = faulty.command(*argv, ranks=2)
    assert job.codes == [0, 0], job.log[-3000:]
    assert job.log.count("macro mean") == 1, "rank 0 alone prints"
    two = json.loads((tmp_path / "two.json").read_text())
    one = evaluated(tmp_path / "one.json", run, "--batch", 50)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in EXACT:
        assert one[name] == two[name], name


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("access", ["in_memory: true", "streaming: true"])
def test_ten_thousand_images_score_the_same_on_1_2_and_3_processes(tmp_path, access):
    data = tiny.write_images(tmp_path / "data", "cifar10", size=32, scored=10_000)  # 20 batches; 3 ranks get 7, 7 and 6
    source = f"source: cifar10, path: {data}, val_fraction: 0.1, {access}"
    recipe = tiny.write_recipe(tmp_path, tiny.RECIPE.replace("source: digits", source))
    assert tiny.command("train", recipe) == 0
    one = evaluated(tmp_path / "1.json", tmp_path / "runs" / "tiny")
    assert one["samples"] == sum(one["support"]) == 10_000
    for ranks in (2, 3):
        output = tmp_path / f"{ranks}.json"
        job = faulty.command("evaluate", tmp_path / "runs" / "tiny", "--json", output, ranks=ranks)
        assert job.codes == [0] * ranks, job.log[-3000:]
        found = json.loads(output.read_text())
        assert found["processes"] == ranks
        for name in EXACT:
            assert found[name] == one[name], name


PROCESSORS = {
    "as transformers says by default": ({}, (32, 1.0, "squash", "bicubic"), (0.5, 0.5)),
    "not normalised": ({"do_normalize": False}, (32, 1.0, "squash", "bicubic"), (0.0, 1.0)),
    "of older versions": ({"size": 24, "resample": 2}, (24, 1.0, "squash", "bilinear"), (0.5, 0.5)),
    "neither scaled": (
        {"do_rescale": False, "image_mean": [127.5] * 3},
        (32, 1.0, "squash", "bicubic"),
        (0.5, 0.5 / 255),
    ),
    "cut": (
        {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32},
        (32, 0.8, "center", "bicubic"),
        (0.5, 0.5),
    ),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_an_image_processor_of_transformers_is_understood(case):
    changes, shown, (mean, std) = PROCESSORS[case]
    found = published._prepared({"size": {"height": 32, "width": 32}, "resample": 3} | changes, 32)
    assert tuple(found[name] for name in ("image_size", "crop_pct", "crop_mode", "interpolation")) == shown
    assert found["mean"] == pytest.approx((mean,) * 3)
    assert found["std"] == pytest.approx((std,) * 3)


@pytest.fixture(scope="module")
def hub_vit(tmp_path_factory) -> Path:
    """A ViT of transformers whose classes nobody named."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("hub") / "vit"
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}
    net = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes))
    net.save_pretrained(folder)
    return folder


def test_classes_that_nobody_named_are_those_of_the_data(hub_vit, tmp_path):
    assert evaluated(tmp_path / "s.json", hub_vit, "--source", "digits")["classes"] == list("0123456789")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"id2label": {"a": "b"}}, "id2label does not number its classes"),
        ("preprocessor_config.json", {"size": {"longest_edge": 3}}, "cannot read its image processor"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 16}}, "is not square"),
        ("preprocessor_config.json", {"size": 32, "image_mean": [0.5]}, "do not have three channels"),
    ],
)
def test_a_strange_folder_of_transformers_is_one_sentence(hub_vit, tmp_path, capsys, name, changes, message):
    shutil.copytree(hub_vit, tmp_path / "vit")
    file = tmp_path / "vit" / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | changes))
    assert tiny.command("evaluate", tmp_path / "vit", "--source", "digits") == 5
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "code"), [("crop_mode", "border", 2), ("interpolation", "random", 2), ("crop_mode", "squash", 0)]
)
def test_a_folder_of_timm_is_shown_images_as_it_says_or_refused(run, tmp_path, capsys, field, value, code):
    shutil.copytree(run.parent.parent / "timm", tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    config["pretrained_cfg"][field] = value
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    assert tiny.command("evaluate", tmp_path / "timm", "--source", "digits") == code
    assert (f"{field} is {value!r}" in capsys.readouterr().err) == (code == 2)


def test_a_folder_of_timm_with_a_pickle_alone_is_refused_unread(tmp_path, monkeypatch):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}')
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(Damaged, match="is a pickle, which can execute code"):
        published.open_published(str(folder))


# -- images that are only scored


def write_classes(folder: Path, names: list[str], count: int, start: int = 0) -> Path:
    """Class folders; the classes are as bright as their number."""
    from PIL import Image

    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (start + i, 200 * (name > "m"), 20 * number)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A dataset of class folders, and a run on it."""
    place = tmp_path_factory.mktemp("folders")
    write_classes(place / "set" / "train", ["ant", "fox", "yak"], 12)
    write_classes(place / "set" / "val", ["ant", "fox", "yak"], 4, start=50)
    recipe = tiny.write_recipe(place)
    options = ("data.source=folder", f"data.path={place / 'set'}", "data.image_size=32", "train.global_batch=8")
    assert tiny.command("train", recipe, *options, "data.val_fraction=0.2") == 0
    return place / "set", place / "runs" / "tiny"


def test_a_folder_of_test_images_alone_is_scored_whole_and_by_name(folders, tmp_path):
    data, run = folders
    expected = evaluated(tmp_path / "a.json", run)
    assert expected["support"] == [4, 4, 4]
    for place in ("plain", "t/test", "v/val"):
        shutil.copytree(data / "val", tmp_path / place)
        folder = tmp_path / place.split("/")[0]
        found = evaluated(tmp_path / "b.json", run, "--data", folder)
        assert found["confusion"] == expected["confusion"]
    assert evaluated(tmp_path / "b.json", run, "--data", tmp_path / "plain", "--split", "train")["samples"] == 12
    assert evaluated(tmp_path / "b.json", run, "--data", data)["confusion"] == expected["confusion"]


def test_a_class_of_the_model_without_images_has_none(folders, tmp_path):
    data, run = folders
    for name in ("yak", "fox"):
        shutil.copytree(data / "val" / name, tmp_path / "some" / name)
    found = evaluated(tmp_path / "a.json", run, "--data", tmp_path / "some")
    assert found["classes"] == ["ant", "fox", "yak"]
    assert found["support"] == [0, 4, 4]
    shutil.rmtree(tmp_path / "some" / "fox")
    assert evaluated(tmp_path / "a.json", run, "--data", tmp_path / "some")["support"] == [0, 0, 4]


def test_other_names_are_matched_by_position_only_when_asked(folders, tmp_path, capsys):
    data, run = folders
    for name, other in (("ant", "n1"), ("fox", "n2"), ("yak", "n3")):
        shutil.copytree(data / "val" / name, tmp_path / "names" / other)
    assert tiny.command("evaluate", run, "--data", tmp_path / "names") == 5
    assert (
        "the dataset has 3 (n1, n2, n3 …); rename its classes, or pass --classes-by position" in capsys.readouterr().err
    )
    found = evaluated(tmp_path / "b.json", run, "--data", tmp_path / "names", "--classes-by", "position")
    assert "matched by position: 'n1' is taken for 'ant'" in capsys.readouterr().err
    assert found["confusion"] == evaluated(tmp_path / "a.json", run)["confusion"]
    shutil.rmtree(tmp_path / "names" / "n3")
    assert tiny.command("evaluate", run, "--data", tmp_path / "names", "--classes-by", "position") == 2
    assert "predicts 3 classes, but the dataset has 2" in capsys.readouterr().err


def test_a_folder_that_the_run_divided_itself_is_divided_again_where_it_has_moved(tmp_path):
    write_classes(tmp_path / "set", ["ant", "fox"], 20)
    options = ("data.source=folder", f"data.path={tmp_path / 'set'}", "data.image_size=32", "data.test_fraction=0.25")
    assert tiny.command("train", tiny.write_recipe(tmp_path), *options, "train.global_batch=8") == 0
    run = tmp_path / "runs" / "tiny"
    expected = evaluated(tmp_path / "a.json", run)
    shutil.copytree(tmp_path / "set", tmp_path / "moved")
    assert evaluated(tmp_path / "b.json", run, "--data", tmp_path / "moved")["confusion"] == expected["confusion"]
    write_classes(tmp_path / "other", ["ant", "fox"], 3, start=90)
    assert evaluated(tmp_path / "b.json", run, "--data", tmp_path / "other")["samples"] == 6


def test_a_split_that_a_folder_lacks_is_refused(folders, tmp_path, capsys):
    shutil.copytree(folders[0] / "val", tmp_path / "t" / "test")
    assert tiny.command("evaluate", folders[1], "--data", tmp_path / "t", "--split", "train") == 2
    assert "has no train split (found: test (test/))" in capsys.readouterr().err
