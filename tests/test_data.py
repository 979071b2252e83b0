"""Data: digits, local folders in the Hub's layout, class folders, their faults, and how batches are dealt to ranks."""

import io
import os
import random
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow.parquet
import pytest
import tiny
import torch
from PIL import Image
from torchvision.transforms import functional

from vit_rsst.data.dealing import Dealing, steps_per_epoch
from vit_rsst.data.decoding import auto_augment
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import InMemoryLoader, evaluation_batches
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data, open_tables
from vit_rsst.data.tables import Rows, Split
from vit_rsst.data.transforms import Augmentation, normalize
from vit_rsst.errors import InputError, MissingRequirement
from vit_rsst.progress import Progress

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def refusal(options: DataOptions, kind: type = InputError) -> str:
    """The sentence that data are refused with, opened and decoded."""

    def read() -> None:
        data = open_data(options, 0)
        for split in data.rows:
            data.decode(split)

    with pytest.raises(kind) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the digits


def rows(data: ImageData) -> dict[str, set[int]]:
    return {split: set(rows.index.tolist()) for split, rows in data.rows.items()}


def test_the_digits_are_split_in_1293_144_and_360_without_overlap():
    data = open_data(DataOptions("digits"), 0)
    parts = rows(data)
    assert {split: len(part) for split, part in parts.items()} == {"train": 1293, "val": 144, "test": 360}
    assert [data.count(split) for split in ("train", "val", "test")] == [1293, 144, 360]
    assert parts["train"] | parts["val"] | parts["test"] == set(range(1797))
    assert data.classes == tuple("0123456789")


def test_the_test_split_is_the_same_for_every_seed_and_the_validation_split_is_not():
    first, again, other = (rows(open_data(DataOptions("digits"), seed)) for seed in (0, 0, 1))
    assert first == again
    assert other["test"] == first["test"]
    assert other["val"] != first["val"]
    assert len(other["val"] & first["val"]) < 50, "drawn anew, 14 in common by chance"


def test_the_test_split_holds_every_class_in_proportion():
    data = open_data(DataOptions("digits"), 0)
    table, index = data.rows["test"].table, data.rows["test"].index
    every, tested = Counter(table.labels.tolist()), Counter(table.labels[index].tolist())
    assert len(tested) == 10
    assert all(abs(tested[c] - every[c] * 360 / 1797) < 1 for c in every)


def test_the_digits_are_grey_images_of_three_equal_channels_with_their_own_labels():
    from sklearn.datasets import load_digits

    data = open_data(DataOptions("digits"), 0)
    index = data.rows["val"].index
    assert data.val.images.shape == (144, 3, 32, 32)
    assert data.val.images.dtype.is_floating_point is False
    assert data.val.labels.tolist() == load_digits().target[index].tolist()
    images = data.val.images
    assert (images[:, 0] == images[:, 1]).all()
    assert (images[:, 0] == images[:, 2]).all()
    means = images.float().mean((1, 2, 3)) / 255
    expected = load_digits().images[index].mean((1, 2)) / 16
    assert np.abs(means.numpy() - expected).max() < 0.02


def test_a_part_of_the_training_images_leaves_the_other_splits_alone():
    whole, part = (rows(open_data(DataOptions("digits", train_samples=n), 0)) for n in (None, 100))
    assert len(part["train"]) == 100
    assert part["train"] < whole["train"]
    assert (part["val"], part["test"]) == (whole["val"], whole["test"])


def test_more_training_samples_than_there_are_are_refused_with_the_number():
    text = refusal(DataOptions("digits", train_samples=1294))
    assert "1,294 asked, 1,293 there" in text
    assert open_data(DataOptions("digits", train_samples=1293), 0).count("train") == 1293


def test_a_validation_split_without_a_sample_is_refused():
    text = refusal(DataOptions("digits", val_fraction=1e-4))
    assert "the val split is empty" in text
    assert "data.val_fraction" in text


@pytest.mark.parametrize("fraction", [0.5, 0.1])
def test_fractions_decide_the_sizes(fraction):
    data = open_data(DataOptions("digits", test_fraction=fraction, val_fraction=0.25), 0)
    test = round(1797 * fraction)
    assert data.count("test") == test
    assert data.count("val") == round((1797 - test) * 0.25)


def test_images_larger_than_the_free_memory_are_refused_before_they_are_decoded(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    text = refusal(DataOptions("digits"), MissingRequirement)
    assert "data.train_samples" in text
    assert "1,293 images at 32 px" in text


# -- local folders of parquet, in the Hub's layout


def solid(colour: tuple[int, int, int], size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def write_parquet(
    folder: Path, split: str, labels: list[int], names: tuple[str, ...] = ("cat", "dog"), **columns: object
) -> Path:
    """data/SPLIT-00000-of-00001.parquet with the columns img and label; each image is as grey as its row number."""
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    content = {"img": [solid((i, i, i)) for i in range(len(labels))], "label": labels}
    for name, (feature, values) in columns.items():
        features[name], content[name] = feature, values
    made = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    path = folder / "data" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    made.to_parquet(path)
    return path


def rewrite(path: Path, column: str, values: list) -> None:
    """Replaces a column of a parquet file, past all that `datasets` checks when it writes."""
    table = pyarrow.parquet.read_table(path)
    place = table.schema.get_field_index(column)
    field = table.schema.field(place)
    changed = table.set_column(place, field, pyarrow.array(values, field.type))
    pyarrow.parquet.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


LABELS = [0, 1] * 10


@pytest.fixture
def folder(tmp_path) -> Path:
    write_parquet(tmp_path / "set", "train", LABELS)
    write_parquet(tmp_path / "set", "test", [1, 0, 1, 0])
    return tmp_path / "set"


def options(folder: Path, source: str = "folder", **more: object) -> DataOptions:
    return DataOptions(source, str(folder), **{"image_size": 8, "val_fraction": 0.2, **more})


def test_a_folder_in_the_layout_of_the_hub_is_read_with_its_classes_and_its_order(folder):
    data = open_data(options(folder, "cifar10"), 0)
    assert data.classes == ("cat", "dog")
    assert [data.count(split) for split in ("train", "val", "test")] == [16, 4, 4]
    assert data.test.labels.tolist() == [1, 0, 1, 0]
    assert data.test.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    index = data.rows["train"].index
    assert data.train.images[:, 0, 0, 0].tolist() == index.tolist()
    assert data.train.labels.tolist() == [LABELS[i] for i in index]
    parts = rows(data)
    assert parts["train"] | parts["val"] == set(range(20))


def test_the_fine_labels_of_cifar100_are_meant_unless_the_recipe_says_otherwise(tmp_path):
    names = {"fine_label": [f"fine {i}" for i in range(4)], "coarse_label": ["coarse 0", "coarse 1"]}
    features = datasets.Features(
        {"img": datasets.Image(), **{k: datasets.ClassLabel(names=v) for k, v in names.items()}}
    )
    content = {"img": [solid(RED)] * 12, "fine_label": [0, 1, 2, 3] * 3, "coarse_label": [0, 0, 1, 1] * 3}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / f"{split}.parquet")
    fine = open_data(options(tmp_path, "cifar100"), 0)
    assert fine.classes == ("fine 0", "fine 1", "fine 2", "fine 3")
    assert fine.test.labels.tolist() == [0, 1, 2, 3] * 3
    coarse = open_data(options(tmp_path, "cifar100", label_column="coarse_label"), 0)
    assert coarse.classes == ("coarse 0", "coarse 1")
    assert coarse.test.labels.tolist() == [0, 0, 1, 1] * 3
    text = refusal(options(tmp_path))
    assert "data.label_column: 2 columns" in text
    assert "fine_label, coarse_label" in text


@pytest.mark.fault("F13")
def test_a_column_that_is_not_there_is_named_with_the_candidates(folder):
    text = refusal(options(folder, image_column="picture"))
    assert "data.image_column: no such column 'picture'" in text
    assert "candidates: img of img, label" in text
    text = refusal(options(folder, label_column="class"))
    assert "data.label_column: no such column 'class'" in text
    assert "candidates: label" in text


@pytest.mark.fault("F13")
def test_two_image_columns_are_a_question(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path, split, LABELS, depth=(datasets.Image(), [solid(BLUE)] * 20))
    text = refusal(options(tmp_path))
    assert "data.image_column: 2 columns" in text
    assert "img, depth" in text
    data = open_data(options(tmp_path, image_column="depth"), 0)
    assert data.test.images[0, :, 0, 0].tolist() == list(BLUE)


def test_a_set_without_class_names_is_refused(tmp_path):
    content = {"img": [solid(RED)] * 4, "number": [0, 1, 0, 1]}
    features = datasets.Features({"img": datasets.Image(), "number": datasets.Value("int64")})
    datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / "train.parquet")
    text = refusal(options(tmp_path))
    assert "data.label_column: 0 columns" in text
    assert "number holds int64" in text


@pytest.mark.fault("F14")
@pytest.mark.parametrize("split, bad", [("train", -2), ("test", 2)])
def test_a_label_out_of_range_is_named_with_its_row(folder, split, bad):
    path = folder / "data" / f"{split}-00000-of-00001.parquet"
    labels = pyarrow.parquet.read_table(path)["label"].to_pylist()
    labels[3] = bad
    rewrite(path, "label", labels)
    text = refusal(options(folder))
    assert f"label {bad} in data/{split}-00000-of-00001.parquet, row 3 is not among" in text
    assert "2 classes" in text


def test_a_missing_label_is_named_with_its_row(folder):
    rewrite(folder / "data" / "test-00000-of-00001.parquet", "label", [1, 0, None, 0])
    assert "the label in data/test-00000-of-00001.parquet, row 2 is missing" in refusal(options(folder))


@pytest.mark.fault("F15")
def test_an_empty_test_split_is_refused(folder):
    write_parquet(folder, "test", [])
    assert re.search(r"\btest\b.*(empty|no data|no rows)", refusal(options(folder)))


@pytest.mark.fault("F14")
def test_splits_whose_classes_differ_are_refused(folder):
    write_parquet(folder, "test", [1, 0, 1, 0], names=("cat", "cow"))
    text = refusal(options(folder))
    assert "the classes of the test split and of train differ: 'cow'" in text
    assert "row 0" in text


def test_splits_that_order_their_classes_differently_are_matched_by_name(folder):
    write_parquet(folder, "test", [1, 0, 1, 0], names=("dog", "cat"))
    data = open_data(options(folder), 0)
    assert [data.classes[label] for label in data.test.labels] == ["cat", "dog", "cat", "dog"]


def test_a_folder_without_a_training_split_is_refused(tmp_path):
    write_parquet(tmp_path, "test", LABELS)
    text = refusal(options(tmp_path))
    assert "no training split" in text
    assert "found: test" in text
    (tmp_path / "empty").mkdir()
    assert "found: nothing" in refusal(options(tmp_path / "empty"))


def test_a_folder_that_is_not_there_is_refused_with_where_it_was_looked_for(tmp_path):
    text = refusal(options(tmp_path / "nowhere"))
    assert "data.path: there is no folder" in text
    assert f"looked in {tmp_path}" in text


def test_a_set_without_a_test_split_needs_a_test_fraction(tmp_path):
    write_parquet(tmp_path, "train", LABELS)
    assert "data.test_fraction=0.2" in refusal(options(tmp_path))
    data = open_data(options(tmp_path, test_fraction=0.2), 0)
    assert [data.count(split) for split in ("train", "val", "test")] == [13, 3, 4]
    assert sorted(data.test.labels.tolist()) == [0, 0, 1, 1]
    parts = rows(data)
    assert parts["train"] | parts["val"] | parts["test"] == set(range(20))


def test_a_test_fraction_wins_over_the_test_split_of_the_source(folder):
    data = open_data(options(folder, test_fraction=0.5), 0)
    assert data.count("test") == 10
    assert not rows(data)["test"] & rows(data)["train"]


def test_a_class_too_rare_to_be_divided_is_refused(tmp_path):
    write_parquet(tmp_path, "train", [0] * 19 + [1])
    assert "cannot hold every class" in refusal(options(tmp_path, test_fraction=0.2))


def test_validation_scores_the_tickets_where_there_is_no_test_split(tmp_path):
    write_parquet(tmp_path, "train", LABELS)
    write_parquet(tmp_path, "validation", [1, 1, 0])
    assert open_data(options(tmp_path), 0).test.labels.tolist() == [1, 1, 0]


def test_imagenet_is_scored_on_its_validation_split(tmp_path):
    for split, labels in (("train", LABELS), ("test", [0, 0]), ("validation", [1, 1, 0])):
        write_parquet(tmp_path, split, labels)
    assert open_data(options(tmp_path, "imagenet1k"), 0).test.labels.tolist() == [1, 1, 0]
    assert open_data(options(tmp_path, "cifar10"), 0).test.labels.tolist() == [0, 0]


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing", None])
def test_a_damaged_parquet_file_is_one_sentence(folder, content):
    path = folder / "data" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-50] if content is None else content)
    assert str(folder) in refusal(options(folder))


def test_data_that_cannot_be_had_from_the_hub_are_said_with_the_way_out(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    text = refusal(DataOptions("cifar10"), MissingRequirement)
    assert "uoft-cs/cifar10" in text
    assert "data.path=FOLDER" in text


def test_the_identity_of_data_changes_with_the_data(folder):
    first, again = (open_data(options(folder), 0).identity for _ in range(2))
    assert first == again
    assert first["rows"] == 20
    assert first["source"] == str(folder)
    write_parquet(folder, "train", [*LABELS, 1])
    assert open_data(options(folder), 0).identity != first


# -- class folders


def write_classes(folder: Path, **images: int) -> None:
    for number, (name, count) in enumerate(images.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            solid((RED, GREEN, BLUE)[number % 3]).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
def test_folders_of_classes_are_read(tmp_path, held_out):
    write_classes(tmp_path / "set" / "train", ant=10, bee=10)
    write_classes(tmp_path / "set" / held_out, ant=2, bee=3)
    data = open_data(options(tmp_path / "set"), 0)
    assert data.classes == ("ant", "bee")
    assert [data.count(split) for split in ("train", "val", "test")] == [16, 4, 5]
    assert data.test.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.test.images[0, :, 0, 0].tolist() == list(RED)
    assert data.test.images[4, :, 0, 0].tolist() == list(GREEN)


def test_folders_of_classes_without_splits_are_all_training_images(tmp_path):
    write_classes(tmp_path / "set", ant=10, bee=10)
    assert "data.test_fraction" in refusal(options(tmp_path / "set"))
    assert open_data(options(tmp_path / "set", test_fraction=0.2), 0).count("test") == 4


def test_a_class_that_the_held_out_images_lack_does_not_shift_the_labels_of_the_others(tmp_path):
    write_classes(tmp_path / "set" / "train", ant=10, bee=10, cow=10)
    write_classes(tmp_path / "set" / "val", ant=2, cow=3)
    try:
        data = open_data(options(tmp_path / "set"), 0)
    except InputError as error:
        assert "classes" in str(error)  # noqa: PT017 - refusing is as good
    else:
        assert [data.classes[label] for label in data.test.labels] == ["ant"] * 2 + ["cow"] * 3


# -- decoding


def encoded(picture: Image.Image, kind: str = "PNG", **more: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def decoded(tmp_path: Path, content: object, size: int = 8) -> np.ndarray:
    """The image that a file's bytes become: it is the whole test split of a folder."""
    if not (tmp_path / "one" / "data").exists():
        write_parquet(tmp_path / "one", "train", [0, 1] * 5)
    path = write_parquet(tmp_path / "one", "test", [0])
    rewrite(path, "img", [content if content is None else {"bytes": content, "path": None}])
    [image] = open_data(options(tmp_path / "one", image_size=size), 0).test.images.numpy()
    return image


def palette(transparent: bool) -> bytes:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    return encoded(picture, transparency=1) if transparent else encoded(picture)


CMYK = Image.new("CMYK", (8, 8), (0, 255, 255, 0))


@pytest.mark.parametrize(
    "content, expected, tolerance",
    [
        (encoded(solid((10, 20, 30))), (10, 20, 30), 0),
        (encoded(Image.new("L", (8, 8), 100)), (100, 100, 100), 0),
        (encoded(Image.new("1", (8, 8), 1)), (255, 255, 255), 0),
        (encoded(Image.new("LA", (8, 8), (100, 50))), (100, 100, 100), 0),
        (encoded(Image.new("RGBA", (8, 8), (10, 20, 30, 50))), (10, 20, 30), 0),
        (palette(transparent=False), (10, 20, 30), 0),
        (palette(transparent=True), (10, 20, 30), 0),
        (encoded(CMYK, "TIFF"), RED, 0),
        (encoded(CMYK, "JPEG"), RED, 3),
        (encoded(Image.new("L", (8, 8), 100), "JPEG"), (100, 100, 100), 1),
    ],
    ids=["RGB", "grey", "1 bit", "grey+alpha", "RGBA", "palette", "palette+alpha", "CMYK", "CMYK JPEG", "grey JPEG"],
)
def test_an_image_of_any_mode_becomes_rgb(tmp_path, content, expected, tolerance):
    image = decoded(tmp_path, content)
    assert image.shape == (3, 8, 8)
    assert np.abs(image.astype(int) - np.array(expected).reshape(3, 1, 1)).max() <= tolerance


def test_a_grey_image_of_16_bits_keeps_its_greys(tmp_path):
    values = np.full((8, 8), 20_000, dtype=np.uint16)
    image = decoded(tmp_path, encoded(Image.fromarray(values)))
    assert abs(int(image[0, 0, 0]) - 20_000 * 255 // 65_535) <= 1, "Pillow clips at 255 when it converts"


def bands(width: int, height: int) -> bytes:
    """Three bands along the longer side: red, green, blue."""
    array = np.zeros((height, width, 3), np.uint8)
    third = max(width, height) // 3
    for i, colour in enumerate((RED, GREEN, BLUE)):
        part = slice(i * third, (i + 1) * third)
        if width > height:
            array[:, part] = colour
        else:
            array[part] = colour
    return encoded(Image.fromarray(array))


@pytest.mark.parametrize("width, height", [(48, 16), (16, 48), (96, 32), (12, 4)])
def test_the_shorter_side_is_fitted_and_the_middle_is_kept(tmp_path, width, height):
    image = decoded(tmp_path, bands(width, height), size=16)
    assert image.shape == (3, 16, 16)
    middle = image[:, 4:12, 4:12].astype(int)
    assert np.abs(middle - np.array(GREEN).reshape(3, 1, 1)).max() <= 2


@pytest.mark.parametrize("width, height", [(17, 16), (33, 100), (16, 17), (1, 500), (499, 500)])
def test_an_image_of_any_size_becomes_a_square(tmp_path, width, height):
    assert decoded(tmp_path, encoded(Image.new("RGB", (width, height), GREEN)), size=16).shape == (3, 16, 16)


def test_an_image_of_the_right_size_is_not_touched(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = decoded(tmp_path, encoded(Image.fromarray(array)), size=16)
    assert (image == array.transpose(2, 0, 1)).all()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


PHOTO = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)), "JPEG")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "content",
    [
        PHOTO[: len(PHOTO) // 2],
        PHOTO[:100],
        b"no image",
        b"",
        None,
        PNG + chunk(b"IHDR", b"\0\0\0\x08"),
        PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b""),
    ],
    ids=["half", "head", "text", "empty", "missing", "short header", "too large"],
)
def test_an_image_that_cannot_be_decoded_is_named_with_its_row(folder, content):
    path = folder / "data" / "test-00000-of-00001.parquet"
    images = pyarrow.parquet.read_table(path)["img"].to_pylist()
    images[2] = content if content is None else {"bytes": content, "path": None}
    rewrite(path, "img", images)
    text = refusal(options(folder))
    assert "data/test-00000-of-00001.parquet, row 2 cannot be decoded" in text


# -- loaders: from rows to the micro-batches of each rank


def numbered(count: int) -> Split:
    """Images of which each pixel is the number of its row, with that number as label."""
    numbers = torch.arange(count)
    return Split(numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous(), numbers)


def loader(rank: int, world: int, accumulation: int, augmentation: Augmentation | None = None) -> InMemoryLoader:
    dealing = Dealing.of(24, 24 // world // accumulation, world)
    assert dealing.accumulation == accumulation
    return InMemoryLoader(
        dealing, rank, torch.device("cpu"), 0, augmentation or Augmentation(), (0.0,) * 3, (1.0,) * 3,
        split=numbered(100),
    )  # fmt: skip


def dealt(world: int, accumulation: int, epoch: int = 0, **more: object) -> list[torch.Tensor]:
    """The global batches of an epoch, put together again from what the ranks get: images, flat, one row a sample."""
    progress = Progress(4, (9,), epoch=epoch)
    ranks = [list(loader(rank, world, accumulation, **more).steps(progress)) for rank in range(world)]
    assert all(len(steps) == 4 and all(len(step) == accumulation for step in steps) for steps in ranks)
    batches = []
    for step in range(4):
        parts = [ranks[rank][step][micro] for micro in range(accumulation) for rank in range(world)]
        images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        batches.append(torch.cat([labels[:, None].float(), images.flatten(1)], dim=1))
    return batches


@pytest.mark.parametrize("world, accumulation", [(1, 2), (2, 1), (2, 3), (4, 2), (8, 1), (3, 8)])
@pytest.mark.parametrize(
    "augmentation", [Augmentation(), Augmentation(padding=2, hflip=0.5)], ids=["plain", "augmented"]
)
def test_any_number_of_ranks_trains_on_the_same_global_batches(world, accumulation, augmentation):
    alone = dealt(1, 1, augmentation=augmentation)
    for batch, single in zip(dealt(world, accumulation, augmentation=augmentation), alone, strict=True):
        assert torch.equal(batch, single)


def test_an_epoch_meets_no_sample_twice_and_each_epoch_has_its_own_order():
    first, second = (torch.cat([batch[:, 0] for batch in dealt(1, 1, epoch)]).tolist() for epoch in (0, 1))
    assert len(first) == len(set(first)) == 4 * 24, "the tail of 4 samples is dropped"
    assert first != second
    assert sorted(first) != first
    assert set(first) != set(second), "another tail is dropped"


def test_images_and_labels_stay_together():
    for batch in dealt(2, 2):
        assert torch.allclose(batch[:, 1] * 255, batch[:, 0])


@pytest.mark.parametrize("step", [1, 3])
def test_an_epoch_begun_in_its_middle_goes_on_as_it_would_have(step):
    augmentation = Augmentation(padding=2, hflip=0.5)
    whole = list(loader(0, 2, 1, augmentation).steps(Progress(4, (9,), epoch=2)))
    rest = list(loader(0, 2, 1, augmentation).steps(Progress(4, (9,), epoch=2, step=step)))
    assert len(rest) == 4 - step
    for one, other in zip(rest, whole[step:], strict=True):
        assert torch.equal(one[0][0], other[0][0])
        assert torch.equal(one[0][1], other[0][1])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 9, 10, 11, 95])
def test_evaluation_meets_every_sample_once_over_all_ranks(world, count):
    met = []
    for rank in range(world):
        for images, labels in evaluation_batches(
            numbered(count), 10, rank=rank, num_processes=world, device=torch.device("cpu"), mean=(0,) * 3, std=(1,) * 3
        ):
            assert len(labels) <= 10
            assert torch.allclose(images[:, 0, 0, 0] * 255, labels.float())
            met += labels.tolist()
    assert sorted(met) == list(range(count))


def test_a_global_batch_is_divided_into_what_fits_a_device():
    assert str(Dealing.of(256, 32, 2)) == "256 = 32 a device × 2 processes × 4 accumulated"
    assert Dealing.of(256, None, 4) == Dealing(256, 64, 4, 1)


@pytest.mark.parametrize("batch, per_device, processes", [(256, 48, 2), (10, None, 3), (4, None, 8), (16, 32, 1)])
def test_a_batch_that_cannot_be_divided_is_refused_with_the_arithmetic(batch, per_device, processes):
    with pytest.raises(InputError, match=rf"train\.global_batch: {batch} cannot be divided into {processes} processes"):
        Dealing.of(batch, per_device, processes)


def test_an_epoch_is_whole_global_batches():
    assert steps_per_epoch(1293, 64, None) == 20
    assert steps_per_epoch(1293, 64, 5) == 5
    assert steps_per_epoch(1293, 64, 500) == 20
    with pytest.raises(InputError, match="1294 is more than the 1293 training images"):
        steps_per_epoch(1293, 1294, None)


# -- transforms


def test_crop_and_flip_are_those_of_torchvision_one_by_one():
    images = torch.randint(0, 256, (16, 3, 8, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    augmentation = Augmentation(padding=3, hflip=0.5)
    drawn = augmentation.draw(16, seed=1)
    offsets, flips, _ = drawn
    assert 3 < flips.sum() < 13
    assert {0, 6} <= set(offsets.flatten().tolist()) <= set(range(7))
    found = augmentation.moved(images, drawn)
    for i, image in enumerate(images):
        top, left = offsets[i].tolist()
        expected = functional.crop(functional.pad(image, [3, 3, 3, 3]), top, left, 8, 10)
        expected = functional.hflip(expected) if flips[i] else expected
        assert torch.equal(found[i], expected), i


def test_without_padding_and_flips_images_pass_untouched():
    images = numbered(5).images
    augmentation = Augmentation()
    assert augmentation.moved(images, augmentation.draw(5, 0)) is images
    flipping = Augmentation(hflip=1.0)
    ramp = torch.arange(8, dtype=torch.uint8).expand(2, 3, 8, 8)
    assert flipping.moved(ramp, flipping.draw(2, 0))[0, 0, 0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_normalisation_is_that_of_torchvision():
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    expected = functional.normalize(functional.convert_image_dtype(images, torch.float32), mean, std)
    torch.testing.assert_close(normalize(images, mean, std), expected)


# -- the real sets


def real_data(name: str) -> Path:
    root = os.environ.get("VIT_RSST_TEST_DATA")
    path = Path(root) if root else tiny.REPOSITORY.parent / "shared" / "data"
    if not (path / name).is_dir():
        pytest.skip(f"no real {name}: {path / name} is not there; VIT_RSST_TEST_DATA names another place")
    return path / name


def test_real_cifar10_is_read_as_published():
    data = open_data(DataOptions("cifar10", str(real_data("cifar10")), train_samples=200), 0)
    assert " ".join(data.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert [data.count(split) for split in ("train", "val", "test")] == [200, 5_000, 10_000]
    table = data.rows["train"].table
    assert Counter(table.labels.tolist()) == dict.fromkeys(range(10), 5_000)
    assert data.train.images.shape == (200, 3, 32, 32)
    mean = data.train.images.float().mean((0, 2, 3)) / 255
    assert np.abs(mean.numpy() - np.array([0.4914, 0.4822, 0.4465])).max() < 0.05
    assert data.identity["rows"] == 50_000


def test_real_photographs_are_decoded_at_the_size_of_imagenet():
    chosen = DataOptions("imagenet1k", str(real_data("imagenet1k-sample")))
    table = open_tables(chosen)["train"]
    assert len(table.classes) == 1000
    assert sorted(table.labels.tolist()) == list(range(1000))
    data = ImageData(chosen, {"train": Rows("train", table, np.arange(0, 1000, 50))}, table.classes, {})
    assert data.train.images.shape == (20, 3, 224, 224)
    assert data.train.labels.tolist() == table.labels[::50].tolist()
    spread = data.train.images.float().std((1, 2, 3))
    assert spread.min() > 10, "photographs, not blank images"


@pytest.mark.parametrize("config", ["rand-m10-inc1-p1", "rand-m1-p1", "original", "v0", "augmix-m10"])
def test_augmentations_of_timm_take_every_magnitude(config):
    """At the ends of its range timm asks Pillow to keep no bit, which Pillow 13 refuses."""
    vary = auto_augment(config, 32, (0.5, 0.5, 0.5))
    picture = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    for seed in range(60):
        random.seed(seed)
        np.random.seed(seed)
        assert vary(picture).size == (32, 32)


# -- the validation split, and the cache


def test_a_class_keeps_a_training_image_whatever_is_held_out(tmp_path):
    write_parquet(tmp_path, "train", [0] * 30 + [1] * 2)
    write_parquet(tmp_path, "test", LABELS)
    for seed in range(12):
        data = open_data(options(tmp_path, val_fraction=0.5), seed)
        assert set(data.train.labels.tolist()) == {0, 1}
        assert data.count("train") + data.count("val") == 32
        is_said = any("one of each stays in train" in line for line in data.told)
        assert is_said == (data.count("val") < 16)


def test_a_cache_that_cannot_be_written_is_not_the_datasets_fault(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    text = refusal(options(folder), MissingRequirement)
    assert "the cache" in text
    assert "HF_DATASETS_CACHE" in text
    assert "data.path" not in text


@pytest.mark.parametrize(
    "path, said",
    [
        ("hf://datasets/a/b", "is an address.*download it first"),
        ("s3://bucket/set", "is an address"),
        ("uoft-cs/cifar10", "if it is a dataset of the Hub, download it first"),
    ],
)
def test_an_address_given_as_a_path_is_said_to_be_one(path, said):
    assert re.search(said, refusal(DataOptions("folder", path)))


def test_an_archive_given_as_a_path_is_said_to_be_one(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"PK")
    assert "is an archive; unpack it" in refusal(options(tmp_path / "set.zip"))
