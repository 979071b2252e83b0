"""Predictions: the classes that the model gives of image files, however the files hold their pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from vit_rsst.data.images import decode_file
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data
from vit_rsst.data.transforms import normalize
from vit_rsst.errors import InputError
from vit_rsst.evaluation.predict import find_images, predict, predictions_text
from vit_rsst.tickets.trained import open_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    assert tiny.command("train", tiny.write_recipe(folder)) == 0
    return folder / "runs" / "tiny"


def write(folder: Path, name: str, pixels: np.ndarray, mode: str, **options: object) -> Path:
    path = folder / name
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_files_of_digits_get_the_answers_that_the_same_test_images_get(run, tmp_path):
    from sklearn.datasets import load_digits

    trained = open_trained(run)
    data = open_data(trained.data, trained.seed)
    rows = data.rows["test"].index[:70]  # more than one batch
    files = [
        write(tmp_path, f"{i:02d}.png", (load_digits().images[row] * 255 / 16).astype(np.uint8), "L")
        for i, row in enumerate(rows)
    ]
    with torch.no_grad():
        logits = trained.net(normalize(data.test.images[:70], trained.mean, trained.std))
    expected = logits.double().softmax(1)
    found = predict(run, [tmp_path], top=10)["predictions"]
    assert [item["image"] for item in found] == [str(file) for file in files]
    for item, probabilities in zip(found, expected, strict=True):
        assert item["classes"][0]["label"] == int(probabilities.argmax())
        by_label = torch.tensor([c["probability"] for c in sorted(item["classes"], key=lambda c: c["label"])])
        torch.testing.assert_close(by_label.double(), probabilities, atol=1e-6, rtol=1e-5)


def test_every_kind_of_image_file_is_read_as_rgb_of_the_runs_size(tmp_path, pixels):
    files = [
        write(tmp_path, "rgb.png", pixels, "RGB"),
        write(tmp_path, "grey.png", pixels, "L"),
        write(tmp_path, "alpha.png", pixels, "RGBA"),
        write(tmp_path, "grey_alpha.png", pixels, "LA"),
        write(tmp_path, "palette.png", pixels, "P"),
        write(tmp_path, "cmyk.jpg", pixels, "CMYK"),
        write(tmp_path, "photo.jpg", pixels, "RGB"),
    ]
    for file in files:
        found = decode_file(file, DataOptions("folder", image_size=16))
        assert found.shape == (3, 16, 16)
        assert found.dtype == np.uint8
    assert sorted(find_images([tmp_path])) == sorted(files)


def test_a_photograph_is_turned_upright_as_its_camera_says(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    options = DataOptions("folder", image_size=20)
    turned = decode_file(write(tmp_path, "turned.png", pixels, "RGB", exif=exif), options)
    upright = decode_file(write(tmp_path, "upright.png", np.rot90(pixels, -1), "RGB"), options)
    assert np.array_equal(turned, upright)


def test_what_is_no_image_is_named_in_one_sentence(run, tmp_path, capsys):
    text = tmp_path / "notes.png"
    text.write_text("no image", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for wrong in (text, tmp_path / "empty", tmp_path / "missing.png"):
        assert tiny.command("predict", run, wrong) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(wrong) in error
    with pytest.raises(InputError, match="at least 1"):
        predict(run, [text], top=0)
    assert tiny.command("predict", tmp_path / "missing.safetensors", text) == 5


def test_the_command_prints_the_classes_and_writes_them_as_json(run, tmp_path, capsys):
    file = write(tmp_path, "seven.png", np.zeros((8, 8), np.uint8), "L")
    assert tiny.command("predict", run, file, "--top", 3, "--json", tmp_path / "out.json") == 0
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert predictions_text(written) == capsys.readouterr().out.rstrip("\n")
    [item] = written["predictions"]
    probabilities = [c["probability"] for c in item["classes"]]
    assert len(probabilities) == 3
    assert probabilities == sorted(probabilities, reverse=True)
    assert written["model"].endswith("round_02.safetensors")


def test_a_result_that_cannot_be_written_is_refused_before_any_work(run, tmp_path, capsys):
    for wrong in (tmp_path / "missing" / "out.json", tmp_path):
        assert tiny.command("predict", run, tmp_path / "no_image.png", "--json", wrong) == 2
        assert "cannot be written" in capsys.readouterr().err


def test_what_cannot_be_decoded_is_skipped_and_counted(run, tmp_path, pixels, capsys):
    (tmp_path / "set").mkdir()
    good = [write(tmp_path / "set", f"{i}.png", pixels, "RGB") for i in range(3)]
    (tmp_path / "set" / "broken.png").write_bytes(good[0].read_bytes()[:100])
    (tmp_path / "set" / "empty.jpg").write_bytes(b"")
    assert tiny.command("predict", run, tmp_path / "set", "--json", tmp_path / "out.json") == 0
    told = capsys.readouterr().err
    assert "2 of 5 images skipped" in told
    assert "broken.png cannot be decoded" in told
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [item["image"] for item in written["predictions"]] == [str(file) for file in good]
    assert len(written["skipped"]) == 2


def test_linked_folders_are_searched_and_hidden_files_are_not(tmp_path, pixels):
    (tmp_path / "else" / "deep").mkdir(parents=True)
    (tmp_path / "set").mkdir()
    write(tmp_path / "else" / "deep", "a.png", pixels, "RGB")
    write(tmp_path / "set", "b.avif", pixels, "RGB")
    write(tmp_path / "set", "._c.png", pixels, "RGB")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "else")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    found = [path.relative_to(tmp_path / "set").as_posix() for path in find_images([tmp_path / "set"])]
    assert found == ["b.avif", "link/deep/a.png"]
