"""Identity: a dataset is known by its content in every split, wherever it lies; a run resumes on no other."""

import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from vit_rsst.data import parquet
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data
from vit_rsst.errors import InputError
from vit_rsst.run.environment import drift


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def write_folders(root: Path) -> Path:
    for s, (split, count) in enumerate((("train", 12), ("val", 4), ("test", 4))):
        for c, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(1000 * s + 100 * c + i).save(root / split / name / f"{i}.png")
    return root


def rows(numbers: list[int], labels: list[int], names: tuple[str, ...] = ("a", "b")) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"image": [picture(n) for n in numbers], "label": labels}, features=features)


def write_parquet(root: Path) -> Path:
    root.mkdir(parents=True)
    rows(list(range(20)), [0, 1] * 10).to_parquet(root / "train-00000-of-00002.parquet")
    rows(list(range(20, 40)), [0, 1] * 10).to_parquet(root / "train-00001-of-00002.parquet")
    rows(list(range(50, 60)), [0, 1] * 5).to_parquet(root / "test.parquet")
    return root


WRITERS = {"folders": write_folders, "parquet": write_parquet}
FIRST, SECOND = "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"


def opened(root: Path, **more: object) -> object:
    return open_data(DataOptions("folder", str(root), image_size=8, val_fraction=0.2, **more), 0)


def swap(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def replaced(path: Path, number: int) -> None:
    picture(number).save(path)


def flipped(path: Path) -> None:
    """One byte of the pixels changed, at the same size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def relabelled(path: Path, row: int) -> None:
    table = pq.read_table(path)
    labels = table["label"].to_pylist()
    labels[row] = 1 - labels[row]
    column = table.schema.get_field_index("label")
    pq.write_table(table.set_column(column, table.schema.field(column), [labels]), path)


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a training image replaced": ("folders", lambda r: replaced(r / "train/a/3.png", 9000)),
    "one byte of a training image": ("folders", lambda r: flipped(r / "train/b/3.png")),
    "two images change classes": ("folders", lambda r: swap(r / "train/a/3.png", r / "train/b/3.png")),
    "an image moved to the other class": ("folders", lambda r: (r / "train/a/3.png").rename(r / "train/b/x.png")),
    "an image renamed": ("folders", lambda r: (r / "train/a/3.png").rename(r / "train/a/x.png")),
    "a training image added": ("folders", lambda r: picture(9).save(r / "train/a/99.png")),
    "a training image removed": ("folders", lambda r: (r / "train/a/3.png").unlink()),
    "a class renamed": ("folders", lambda r: [(r / s / "b").rename(r / s / "c") for s in ("train", "val", "test")]),
    "a validation image replaced": ("folders", lambda r: replaced(r / "val/a/3.png", 9000)),
    "a validation image removed": ("folders", lambda r: (r / "val/a/3.png").unlink()),
    "a test image replaced": ("folders", lambda r: replaced(r / "test/b/3.png", 9000)),
    "the test images relabelled": ("folders", lambda r: swap(r / "test/a", r / "test/b")),
    "the validation split removed": ("folders", lambda r: shutil.rmtree(r / "val")),
    "a label of a shard": ("parquet", lambda r: relabelled(r / SECOND, 13)),
    "two labels of a shard": ("parquet", lambda r: [relabelled(r / FIRST, i) for i in (4, 5)]),
    "a test label": ("parquet", lambda r: relabelled(r / "test.parquet", 0)),
    "an image of a shard": ("parquet", lambda r: rows([*range(19), 777], [0, 1] * 10).to_parquet(r / FIRST)),
    "a row more": ("parquet", lambda r: rows(list(range(20, 41)), [0, 1] * 10 + [0]).to_parquet(r / SECOND)),
    "shards in another order": ("parquet", lambda r: swap(r / FIRST, r / SECOND)),
    "another test": ("parquet", lambda r: rows(list(range(90, 120)), [0, 1] * 15).to_parquet(r / "test.parquet")),
    "rows in another order": (
        "parquet", lambda r: rows([1, 0, *range(2, 20)], [1, 0] + [0, 1] * 9).to_parquet(r / FIRST)
    ),
    "other names of classes": (
        "parquet",
        lambda r: [rows(list(range(n)), [0, 1] * (n // 2), ("a", "x")).to_parquet(r / f)
                   for f, n in ((FIRST, 20), (SECOND, 20), ("test.parquet", 10))],
    ),
}  # fmt: skip


def test_there_are_twenty_changes_and_more():
    assert len(CHANGES) >= 20


@pytest.mark.parametrize("kind, change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_another_dataset(tmp_path, kind, change):
    root = WRITERS[kind](tmp_path / "set")
    before = opened(root).identity
    change(root)
    after = opened(root).identity
    assert any(f"data.{name}" in drift({"data": before}, {"data": after}) for name in ("rows", "content", "validation"))


MOVES: dict[str, Callable[[Path], Path]] = {
    "renamed": lambda r: r.rename(r.with_name("other")),
    "moved deeper": lambda r: (r.parent / "x/y").mkdir(parents=True) or r.rename(r.parent / "x/y/set"),
    "copied": lambda r: shutil.copytree(r, r.with_name("copy")),
    "copied without times": lambda r: shutil.copytree(r, r.with_name("copy"), copy_function=shutil.copyfile),
    "a trailing slash": lambda r: f"{r}/",
    "by a link": lambda r: r.with_name("link").symlink_to(r) or r.with_name("link"),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_move_is_the_same_dataset(tmp_path, kind, move):
    root = WRITERS[kind](tmp_path / "set")
    before = opened(root).identity
    after = opened(move(root)).identity
    assert before["content"] == after["content"]
    assert "data.content" not in drift({"data": before}, {"data": after})


def test_splits_of_another_name_are_the_same_dataset(tmp_path):
    root = write_folders(tmp_path / "set")
    before = opened(root).identity
    for name, other in (("train", "Training"), ("val", "dev"), ("test", "Testing")):
        (root / name).rename(root / other)
    assert opened(root).identity == before


def test_files_beside_the_images_are_no_part_of_the_dataset(tmp_path):
    root = write_folders(tmp_path / "set")
    before = opened(root).identity
    for name in ("README.md", "train/notes.txt", "train/a/.DS_Store"):
        (root / name).write_text("x", encoding="utf-8")
    assert opened(root).identity == before


def test_large_files_are_known_by_their_labels_and_footer_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "WHOLE", 1024)
    monkeypatch.setattr(parquet, "BLOCK", 256)
    root = write_parquet(tmp_path / "set")
    before = opened(root).identity["content"]
    assert opened(shutil.copytree(root, tmp_path / "copy")).identity["content"] == before
    relabelled(root / SECOND, 13)
    changed = opened(root).identity["content"]
    assert changed["train"] != before["train"]
    assert changed["test"] == before["test"]


def test_a_stream_is_known_as_the_table_of_the_same_files(tmp_path):
    root = write_parquet(tmp_path / "set")
    assert opened(root, streaming=True).identity["content"] == opened(root).identity["content"]


def test_a_record_of_version_0_1_is_compared_by_its_rows_alone(tmp_path):
    now = opened(write_parquet(tmp_path / "set")).identity
    then = {"source": now["source"], "revision": None, "rows": 40, "files": 2, "sha256": "0" * 64, "datasets": "4.0"}
    assert not drift({"data": then}, {"data": now})
    assert "data.rows" in drift({"data": then | {"rows": 41}}, {"data": now})
    with_val = opened(write_folders(tmp_path / "folders")).identity
    assert "data.validation" in drift({"data": then | {"rows": 24}}, {"data": with_val})


def test_a_run_does_not_resume_on_changed_data(tmp_path, capsys):
    root = write_folders(tmp_path / "set")
    train = ("train", tiny.write_recipe(tmp_path), "data.source=folder", "data.image_size=32", "train.global_batch=8")
    assert tiny.command(*train, f"data.path={root}", "train.max_minutes=0.0001") == 75
    replaced(root / "val/a/3.png", 9000)
    assert tiny.command(*train, f"data.path={root}") == 2
    assert "the dataset has changed since the run started" in capsys.readouterr().err
    replaced(root / "val/a/3.png", 1003)
    assert tiny.command(*train, f"data.path={root}") == 0


def test_copies_of_a_split_are_said(tmp_path):
    root = write_folders(tmp_path / "set")
    shutil.rmtree(root / "test")
    shutil.copytree(root / "val", root / "test")
    assert any("hold the same files" in line for line in opened(root).told)
    shutil.rmtree(root / "test")
    (root / "test").symlink_to(root / "val")
    with pytest.raises(InputError, match="belongs to both"):
        opened(root)
