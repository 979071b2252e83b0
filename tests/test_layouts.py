"""What a dataset folder is read as: classes and images of every split, or the sentence that it is refused with."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data
from vit_rsst.data.tables import Rows
from vit_rsst.errors import InputError
from vit_rsst.tickets.trained import open_trained


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def content(number: int) -> bytes:
    """A PNG of 8 px that differs from number to number."""
    import io

    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def files(root: Path, *names: str, start: int = 0) -> None:
    for number, name in enumerate(names, start):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number) if path.suffix not in (".txt", ".csv", ".heic", "") else b"text")


def split(root: Path, name: str, classes: str | list[str], count: int, pattern: str = "{}.png", start: int = 0) -> None:
    """Class folders of so many images each."""
    for c, label in enumerate(classes):
        names = [os.path.join(name, label, pattern.format(i)) for i in range(count)]
        files(root, *names, start=start + 100 * c)


def shard(path: Path, labels: list, feature: object = None, image: str = "image", start: int = 0, **more: list) -> None:
    """A parquet file as `datasets` writes it; without a feature, as pandas does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": content(start + i), "path": None} for i in range(len(labels))]
    if feature is None:
        pq.write_table(pa.table({image: [i["bytes"] for i in images], "label": labels, **more}), path)
        return
    features = datasets.Features({image: datasets.Image(), "label": feature})
    for name, values in more.items():
        features[name] = datasets.Value("string" if isinstance(values[0], str) else "int64")
    datasets.Dataset.from_dict({image: images, "label": labels, **more}, features=features).to_parquet(path)


NAMES = datasets.ClassLabel(names=["cat", "dog"])
INT, TEXT = datasets.Value("int64"), datasets.Value("string")
TEN = [0, 1] * 5


@dataclass(frozen=True)
class Case:
    """A layout and what it is read as.

    Attributes:
        make: writes it below a folder.
        expected: classes by a blank, and images of train before validation is held out, validation (0: held out of
            train) and test (0: held out of train); or the pattern of the refusal.
        told: what is said before the first step.
        more: options.
        as_torchvision: whether torchvision's ImageFolder reads train, and test, likewise.
    """

    make: Callable[[Path], object]
    expected: tuple[str, int, int, int] | str
    told: str = ""
    more: dict = field(default_factory=dict)
    as_torchvision: tuple[str, ...] = ()


def both(train: str, other: str, classes: str | list[str] = "ab", **more: object) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        split(root, train, classes, 10, **more)
        split(root, other, classes, 3, start=50, **more)

    return make


def many(*makers: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for maker in makers:
            maker(root)

    return make


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(root / target)

    return make


def nothing(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).mkdir(parents=True)


def texts(*names: str) -> Callable[[Path], None]:
    return lambda root: files(root, *names)


def text(name: str, content: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")

    return make


def shards(**of: list) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for number, (name, labels) in enumerate(of.items()):
            shard(root / f"{name.replace('__', '/')}.parquet", labels, NAMES, start=100 * number)

    return make


def plain(labels: list, feature: object = None, **more: list) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        shard(root / "train.parquet", labels, feature, **more)
        shard(root / "test.parquet", labels, feature, start=50, **more)

    return make


def unlabelled(root: Path) -> None:
    shard(root / "test.parquet", [-1] * 4, NAMES, start=70)


def flat(root: Path) -> None:
    split(root, "", "ab", 10)


FRACTION = {"test_fraction": 0.2}
TRAIN_TEST = ("train", "test")

CASES = {
    # class folders and their splits
    "train and test": Case(both("train", "test"), ("a b", 20, 0, 6), as_torchvision=TRAIN_TEST),
    "train and val": Case(both("train", "val"), ("a b", 20, 0, 6), "val/ scores", as_torchvision=("train", "val")),
    "train, val and test": Case(
        many(both("train", "val"), lambda r: split(r, "test", "ab", 2, start=80)), ("a b", 20, 6, 4)
    ),
    "Training and Testing": Case(both("Training", "Testing"), ("a b", 20, 0, 6)),
    "TRAIN and TEST": Case(both("TRAIN", "TEST"), ("a b", 20, 0, 6)),
    "training_set and test_set": Case(both("training_set", "test_set"), ("a b", 20, 0, 6)),
    "train2017 and val2017": Case(both("train2017", "val2017"), ("a b", 20, 0, 6)),
    "Train and dev": Case(both("Train", "dev"), ("a b", 20, 0, 6)),
    "train and eval": Case(both("train", "eval"), ("a b", 20, 0, 6)),
    "train and another folder": Case(
        many(both("train", "test"), lambda r: split(r, "extra", "ab", 4)), ("a b", 20, 0, 6), r"not read: extra/ \(8 "
    ),
    "two training folders": Case(both("train", "Training"), "train/|Training/.*each be the train split"),
    "plain class folders": Case(flat, ("a b", 20, 0, 0), more=FRACTION, as_torchvision=("",)),
    "plain class folders without a test": Case(flat, r"no labelled split named 'test'.*data\.test_fraction"),
    "val and a test fraction": Case(both("train", "val"), r"data\.test_fraction: val/ .*data\.splits", more=FRACTION),
    "test and a test fraction": Case(both("train", "test"), ("a b", 20, 0, 0), "not read: test/", more=FRACTION),
    "test alone": Case(lambda r: split(r, "test", "ab", 3), r"no training split.*found: test"),
    "an empty folder": Case(nothing("x"), "no training split.*found: nothing"),
    # words of splits that are names of classes and images
    "a class called train": Case(
        both("train", "test", ["tank", "train"]), ("tank train", 20, 0, 6), as_torchvision=TRAIN_TEST
    ),
    "plain folders, one called train": Case(
        lambda r: split(r, "", ["bus", "car", "train"], 10), ("bus car train", 30, 0, 0), more=FRACTION
    ),
    "plain folders, one called test tube": Case(
        lambda r: split(r, "", ["beaker", "test tube"], 10), ("beaker|test tube", 20, 0, 0), more=FRACTION
    ),
    "a class called dev": Case(both("train", "val", ["dev", "x"]), ("dev x", 20, 0, 6)),
    "bullet_train": Case(both("train", "val", ["bullet_train", "bus"]), ("bullet_train bus", 20, 0, 6)),
    "images called train_N": Case(both("train", "val", pattern="train_{}.png"), ("a b", 20, 0, 6)),
    "ImageNet's own names": Case(
        both("train", "val", ["n01", "n02"], pattern="ILSVRC2012_val_{:08d}.JPEG"), ("n01 n02", 20, 0, 6),
        as_torchvision=("train", "val"),
    ),
    # names
    "a space, a bracket, colons": Case(both("train", "val", ["a [1]", "b::c"]), ("a [1]|b::c", 20, 0, 6)),
    "dots and dunders": Case(both("train", "val", ["__other__", "a.b"]), ("__other__ a.b", 20, 0, 6)),
    "numbers": Case(both("train", "val", ["0", "1", "10", "2"]), ("0 1 10 2", 40, 0, 12), as_torchvision=("train",)),
    "accents, composed in one split only": Case(
        many(
            lambda r: split(r, "train", ["caf\u00e9", "x"], 10),
            lambda r: split(r, "val", ["cafe\u0301", "x"], 3, start=50),
        ),
        ("caf\u00e9 x", 20, 0, 6),
    ),
    "a name that is not UTF-8": Case(
        many(both("train", "val"), lambda r: (r / "train/a/caf\udce9.png").write_bytes(content(9))), ("a b", 21, 0, 6)
    ),
    "a class that is not UTF-8": Case(both("train", "val", ["caf\udce9", "x"]), r"caf\\\\xe9.*not UTF-8"),
    # what lies below a class
    "train/CLASS/images": Case(
        many(
            lambda r: split(r, "train", ["n1", "n2"], 10, "images/{}.png"),
            lambda r: split(r, "val", ["n1", "n2"], 3, start=50),
        ),
        ("n1 n2", 20, 0, 6), "folders within a class belong to it", as_torchvision=("train",),
    ),
    "deeper folders of other names": Case(
        many(both("train", "val"), lambda r: files(r, "train/a/more/x.png", "train/b/even/more/y.png", start=70)),
        ("a b", 22, 0, 6), "train/a/more is 'a'", as_torchvision=("train",),
    ),
    "the same folders in each class": Case(
        lambda r: [split(r, fold, "ab", 5, start=10 * i) for i, fold in enumerate(("fold1", "fold2"))],
        "fold1, fold2 hold the same folders", more=FRACTION,
    ),
    "splits within classes": Case(
        lambda r: [split(r, c, ["train", "test"], 5) for c in "ab"], "expected train/CLASS/", more=FRACTION
    ),
    "a folder around the splits": Case(
        lambda r: both("inner/train", "inner/test")(r), r"one class, inner.*data\.path=.*/inner\?", more=FRACTION
    ),
    "one class": Case(lambda r: split(r, "", ["a"], 10), "one class, a; expected", more=FRACTION),
    "one class in train": Case(both("train", "val", ["a"]), "one class, train/a; expected"),
    # links
    "a class that is a link": Case(
        many(lambda r: split(r, "else", "c", 10), both("d/train", "d/val"), link("d/train/c", "else/c")),
        ("a b c", 30, 0, 6), "val/ has no image of 1 of 3 classes: c", {"inside": "d"}, ("train",),
    ),
    "a link to the folder that it lies in": Case(
        many(both("train", "val"), link("train/a/loop", "train")), ("a b", 20, 0, 6)
    ),
    "images that are links": Case(
        many(both("train", "val"), link("train/a/x.png", "val/a/0.png")), ("a b", 21, 0, 6), as_torchvision=("train",)
    ),
    "a broken link": Case(many(both("train", "val"), link("train/a/x.png", "gone")), ("a b", 20, 0, 6), "broken links"),
    "val is a link to train": Case(
        many(lambda r: split(r, "train", "ab", 10), link("val", "train")), "belongs to both the train and the val split"
    ),
    "val holds a class of train by a link": Case(
        many(both("train", "val"), lambda r: split(r, "val", "b", 1), lambda r: split(r, "train", "c", 4),
             link("val/c", "train/c")),
        "belongs to both",
    ),
    # files
    "suffixes of Pillow": Case(
        many(both("train", "val"), lambda r: files(r, "train/a/x.JPG", "train/b/y.jfif", "train/b/z.avif", start=40)),
        ("a b", 23, 0, 6),
    ),
    "hidden files and litter": Case(
        many(both("train", "val"), texts("train/a/._0.png", "train/.DS_Store", "train/a/Thumbs.db",
                                         "train/__MACOSX/a/._0.png", "train/a/.ipynb_checkpoints/0-checkpoint.png")),
        ("a b", 20, 0, 6),
    ),
    "other suffixes": Case(
        many(both("train", "val"), texts("train/a/x.heic", "train/b/y.txt", "readme.txt", "all.zip")),
        ("a b", 20, 0, 6), r"not read: 2 \.txt, 1 \.\w+, 1 \.\w+",
    ),
    "a class of other suffixes": Case(
        many(both("train", "val"), texts("train/c/x.heic", "train/c/y.heic")), r"class 'c' has no image.*2 \.heic"
    ),
    "a class without suffixes": Case(many(both("train", "val"), texts("train/c/x")), "class 'c' has no image"),
    "an empty class": Case(many(both("train", "val"), nothing("train/c")), "class 'c' has no image"),
    "a hidden class": Case(both("train", "val", [".net", "a", "b"]), r"hidden folder with images, train/\.net"),
    "a hidden cache": Case(
        many(both("train", "val"), lambda r: split(r, ".cache", "ab", 4)), ("a b", 20, 0, 6)
    ),
    "images beside the classes": Case(
        many(both("train", "val"), lambda r: files(r, "train/x.png", "y.png", start=90)), ("a b", 20, 0, 6),
        "not read: 1 images in train/",
    ),
    "images without folders": Case(lambda r: files(r, "x.png", "y.png"), "no folders; expected one folder a class"),
    "Kaggle's flat train": Case(
        lambda r: files(r, "train/cat.0.jpg", "train/dog.0.jpg", "test/1.jpg"), "expected one folder a class"
    ),
    # labels of the held-out splits
    "a flat test beside val": Case(
        many(both("train", "val"), lambda r: files(r, *(f"test/images/{i}.png" for i in range(5)), start=80)),
        ("a b", 20, 0, 6), r"not read: test/ \(5 images without one folder a class: no labels\)",
    ),
    "a flat test alone": Case(
        many(lambda r: split(r, "train", "ab", 10), lambda r: files(r, "test/1.png", start=80)),
        r"no labelled split.*test/ \(1 images without one folder a class",
    ),
    "a class that train lacks": Case(
        many(both("train", "val"), lambda r: split(r, "val", "c", 2)), "val/ and of train differ: 'c' is not among"
    ),
    "a class that val lacks": Case(
        many(both("train", "val"), lambda r: split(r, "train", "c", 10, start=300)), ("a b c", 30, 0, 6), "classes: c"
    ),
    # metadata
    "metadata.csv": Case(
        many(lambda r: files(r, *(f"train/{i}.png" for i in range(10))),
             text("train/metadata.csv", "file_name,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(10))),
             lambda r: files(r, *(f"test/{i}.png" for i in range(4)), start=40),
             text("test/metadata.csv", "file_name,label\n" + "".join(f"{i}.png,{'ba'[i % 2]}\n" for i in range(4)))),
        ("a b", 10, 0, 4),
    ),
    "metadata.jsonl of numbers": Case(
        many(lambda r: files(r, *(f"{i}.png" for i in range(33))),
             text("metadata.jsonl", "".join(f'{{"file_name": "{i}.png", "label": {i % 11}}}\n' for i in range(33)))),
        ("0 1 2 3 4 5 6 7 8 9 10", 33, 0, 0), more={"test_fraction": 0.34},
    ),
    "metadata.csv that names a file that is gone": Case(
        many(lambda r: files(r, "train/0.png"), text("train/metadata.csv", "file_name,label\n0.png,a\n1.png,b\n")),
        "row 1 names 'train/1.png', which is not there",
    ),
    "metadata.csv and class folders": Case(
        many(both("train", "val"), text("train/metadata.csv", "file_name,label\na/0.png,x\n")),
        "could each say the classes",
    ),
    # parquet
    "parquet": Case(shards(train=TEN, test=[1, 0, 1]), ("cat dog", 10, 0, 3)),
    "parquet in shards": Case(
        shards(**{f"data__{n}": TEN for n in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")}),
        ("cat dog", 20, 0, 10),
    ),
    "parquet named by folders": Case(
        shards(default__train__0000=TEN, default__train__0001=TEN, default__test__0000=TEN), ("cat dog", 20, 0, 10)
    ),
    "parquet with a name before the split": Case(
        shards(**{"pets-train": TEN, "pets-test": TEN}), ("cat dog", 10, 0, 10)
    ),
    "a shard is missing": Case(
        shards(**{"train-00000-of-00003": TEN, "train-00002-of-00003": TEN, "test": TEN}), "2 of 3 shards of the train"
    ),
    "a sample beside the split": Case(
        shards(train=TEN, train_sample=[0, 1], test=TEN), ("cat dog", 10, 0, 10), r"not read: train_sample\.parquet"
    ),
    "a copy of a shard": Case(
        shards(**{"train-00000-of-00001": TEN, "old__train-00000-of-00001": TEN, "test": TEN}),
        "copies or configurations",
    ),
    "several configurations": Case(
        shards(en__train=TEN, fr__train=TEN, en__test=TEN, fr__test=TEN), "copies or configurations"
    ),
    "parquet and class folders": Case(many(shards(train=TEN, test=TEN), both("train", "val")), "as class folders"),
    "one parquet file of another name": Case(shards(pets=TEN * 2), ("cat dog", 20, 0, 0), "", FRACTION),
    "an unlabelled test": Case(
        many(shards(train=TEN, validation=TEN), unlabelled),
        ("cat dog", 10, 0, 10), r"not read: test\.parquet \(images without labels\)",
    ),
    "an unlabelled test alone": Case(many(shards(train=TEN), unlabelled), "no labelled split"),
    "classes in another order": Case(
        many(shards(train=TEN),
             lambda r: shard(r / "test.parquet", [0] * 4, datasets.ClassLabel(names=["dog", "cat"]), start=60)),
        ("cat dog", 10, 0, 4),
    ),
    "shards of other classes": Case(
        many(shards(**{"train-0": TEN, "test": TEN}),
             lambda r: shard(r / "train-1.parquet", TEN, datasets.ClassLabel(names=["cat", "cow"]))),
        r"train-1\.parquet and train-0\.parquet name different classes \(cow, dog\)",
    ),
    "a shard of more columns": Case(
        many(shards(**{"train-0": TEN, "test": TEN}),
             lambda r: shard(r / "train-1.parquet", TEN, NAMES, id=list(range(10)))),
        ("cat dog", 20, 0, 10), r"train-1\.parquet has other columns than train-0\.parquet \(id\)",
    ),
    "a shard of fewer columns": Case(
        many(shards(**{"train-0": TEN, "test": TEN}), lambda r: shard(r / "train-1.parquet", TEN, NAMES, image="img")),
        r"train-1\.parquet has no column 'image'",
    ),
    "a shard of other types": Case(
        many(shards(**{"train-0": TEN, "test": TEN}), lambda r: shard(r / "train-1.parquet", ["cat", "dog"] * 5, TEXT)),
        r"holds text in train-1\.parquet, and ClassLabel in train-0",
    ),
    # columns
    "text labels": Case(plain(["dog", "cat"] * 5, TEXT), ("cat dog", 10, 0, 10)),
    "pandas' bytes and integers": Case(plain(TEN), ("0 1", 10, 0, 10), more={"num_classes": 2}),
    "integers without their number": Case(plain(TEN), r"data\.num_classes: 'label' of train\.parquet holds int64"),
    "pandas' bytes and text": Case(plain(["dog", "cat"] * 5), ("cat dog", 10, 0, 10)),
    "booleans": Case(plain([True, False] * 5), ("0 1", 10, 0, 10)),
    "whole floats": Case(plain([0.0, 1.0] * 5), ("0 1", 10, 0, 10), more={"num_classes": 2}),
    "floats": Case(plain([0.0, 0.5] * 5), r"0\.5 in train\.parquet, row 1 is not whole", more={"num_classes": 2}),
    "label, id and width": Case(
        plain(TEN, INT, id=list(range(10)), width=[8] * 10), ("0 1", 10, 0, 10), more={"num_classes": 2}
    ),
    "a class label beside integers, asked": Case(
        plain(TEN, NAMES, fine=[i % 4 for i in range(10)]), ("0 1 2 3", 10, 0, 10),
        more={"label_column": "fine", "num_classes": 4},
    ),
    "a missing label": Case(plain(["cat", None] * 5), r"label in train\.parquet, row 1 is missing \(5 such rows\)"),
    "a label out of range": Case(
        plain([1, 2] * 5), r"label 2 in train\.parquet, row 1 .*0 … 1", more={"num_classes": 2}
    ),
    "vectors of labels": Case(
        plain([[0, 1]] * 10), r"data\.label_column: 'label' of train\.parquet holds \w+, not labels",
        more={"label_column": "label"},
    ),
    "pixels instead of files": Case(
        lambda r: pq.write_table(pa.table({"image": [[1, 2]] * 4, "label": [0, 1] * 2}), r / "train.parquet"),
        r"data\.image_column: 0 columns", more={"num_classes": 2},
    ),
    # save_to_disk
    "save_to_disk": Case(
        lambda r: datasets.DatasetDict(
            {n: datasets.Dataset.from_dict(
                {"image": [{"bytes": content(i), "path": None} for i in range(10)], "label": TEN},
                features=datasets.Features({"image": datasets.Image(), "label": NAMES})) for n in ("train", "test")}
        ).save_to_disk(r / "d"),
        ("cat dog", 10, 0, 10), more={"inside": "d"},
    ),
    # splits by name
    "folds by data.splits": Case(
        lambda r: [split(r, f"fold{i}", "ab", 5, start=10 * i) for i in (1, 2, 3)], ("a b", 20, 0, 10),
        more={"splits": {"train": "fold[12]", "test": "fold3/**"}},
    ),
    "three folders by data.splits": Case(
        lambda r: [split(r, name, "ab", 5, start=10 * i) for i, name in enumerate("xyz")], ("a b", 10, 10, 10),
        more={"splits": {"train": "x", "val": "y", "test": "z/*"}},
    ),
    "files by data.splits": Case(
        shards(en__train=TEN, fr__train=TEN, fr__test=TEN), ("cat dog", 10, 0, 10),
        more={"splits": {"train": "fr/train*", "test": "**/test.parquet"}},
    ),
    "val by data.splits, and a test fraction": Case(
        both("train", "val"), ("a b", 20, 6, 0), more={"splits": {"train": "train", "val": "val"}, **FRACTION}
    ),
    "data.splits that match nothing": Case(
        both("train", "val"), r"data\.splits\.test: 'tset' matches nothing",
        more={"splits": {"train": "train", "test": "tset"}},
    ),
    "data.splits that overlap": Case(
        both("train", "val"), "belongs to both", more={"splits": {"train": ".", "test": "val"}}
    ),
}  # fmt: skip


def test_there_are_sixty_layouts_and_more():
    assert len(CASES) >= 60


def made(case: Case, tmp_path: Path) -> tuple[Path, dict]:
    root = tmp_path / "set"
    root.mkdir()
    case.make(root)
    more = dict(case.more)
    return root / more.pop("inside", ""), more


def expected_classes(text: str) -> tuple[str, ...]:
    return tuple(text.split("|" if "|" in text else " "))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_layout_is_read_whole_or_refused(case, tmp_path):
    root, more = made(case, tmp_path)
    options = DataOptions("folder", str(root), image_size=8, val_fraction=0.2, **more)
    if isinstance(case.expected, str):
        with pytest.raises(InputError, match=case.expected) as caught:
            open_data(options, 0)
        assert "\n" not in str(caught.value)
        return
    data = open_data(options, 0)
    names, train, val, test = case.expected
    assert data.classes == expected_classes(names)
    counts = {name: data.count(name) for name in ("train", "val", "test")}
    held_out = (0 if val else counts["val"]) + (0 if test else counts["test"])
    assert (counts["train"] + held_out, val and counts["val"], test and counts["test"]) == (train, val, test)
    assert all(counts.values())
    assert re.search(case.told, "\n".join(data.told))
    for name in data.rows:
        data.decode(name)


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.as_torchvision], ids=[n for n, c in CASES.items() if c.as_torchvision]
)
def test_what_torchvision_reads_is_read_the_same(case, tmp_path):
    from torchvision.datasets import ImageFolder

    root, more = made(case, tmp_path)
    data = open_data(DataOptions("folder", str(root), image_size=8, val_fraction=0.2, **more), 0)
    for name, ours in zip(case.as_torchvision, (data.rows["train"], data.rows["test"]), strict=False):
        theirs = ImageFolder(str(root / name))
        assert isinstance(ours, Rows)
        found = [ours.table.images[i]["path"] for i in range(len(ours.table.labels))]
        labels = dict(zip(map(os.path.realpath, found), ours.table.labels.tolist(), strict=True))
        assert {os.path.realpath(path): label for path, label in theirs.samples} == labels
        if name == case.as_torchvision[0]:
            assert tuple(theirs.classes) == data.classes


BY_COMMAND = [
    "train and test", "Training and Testing", "a class called train", "train/CLASS/images", "a class that is a link",
    "a flat test beside val", "text labels", "metadata.csv", "classes in another order", "save_to_disk",
    "folds by data.splits", "an unlabelled test", "one class", "a class of other suffixes", "several configurations",
]  # fmt: skip


@pytest.mark.parametrize("name", BY_COMMAND)
def test_the_command_trains_on_what_is_read_and_says_it(name, tmp_path, capsys):
    import json

    case = CASES[name]
    root, more = made(case, tmp_path)
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in more.items()]
    code = tiny.command(
        "train", tiny.write_recipe(tmp_path), "data.source=folder", f"data.path={root}", "data.image_size=32",
        "data.val_fraction=0.2", "train.global_batch=4", "train.epochs=1", "train.steps_per_epoch=1",
        "train.round_epochs=1", "pruning.schedule.rounds=1", *overrides,
    )  # fmt: skip
    printed = capsys.readouterr()
    if isinstance(case.expected, str):
        assert code == 2
        assert re.search(case.expected, printed.err)
        assert not (tmp_path / "runs").exists()
        return
    assert code == 0
    assert tuple(open_trained(tmp_path / "runs" / "tiny").classes) == expected_classes(case.expected[0])
    told = printed.out[: printed.out.index("run folder")]
    assert re.search(r"^  train .* images, \d+ classes, from ", told, re.M)
    assert re.search(case.told, told)
