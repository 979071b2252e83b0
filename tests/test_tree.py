"""The walk of a dataset folder and its index: what is read again, and what is not."""

import os
from pathlib import Path

import numpy as np
import pytest

from vit_rsst.data import tree
from vit_rsst.data.listing import list_images
from vit_rsst.data.tree import Tree, read_tree


@pytest.fixture(autouse=True)
def indexed(monkeypatch):
    monkeypatch.setattr(tree, "INDEXED", 5)


def write(root: Path, *names: str, content: bytes = b"") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def settle(root: Path) -> None:
    """Moves all time stamps into the past, as those of a dataset are."""
    for path in (root, *root.rglob("*")):
        if path.is_dir():
            os.utime(path, (1, 1))


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "set"
    write(folder, *(f"train/{c}/{i}.png" for c in "abc" for i in range(4)), "train/a/deep/x.jpg", "train/b/notes.txt")
    settle(folder)
    return folder


def read_again(monkeypatch) -> list[str]:
    """Names of the folders that are read from now on."""
    seen, real = [], tree._read

    def noting(full: str, state: tuple) -> tree.Folder:
        seen.append(Path(full).name)
        return real(full, state)

    monkeypatch.setattr(tree, "_read", noting)
    return seen


def images(found: Tree) -> list[tuple[str, int]]:
    files = list_images(found, ["train"], {"a": 0, "b": 1, "c": 2})
    return [(files.path(i), int(files.labels[i])) for i in range(len(files))]


def test_the_index_spares_a_second_reading(root, tmp_path, monkeypatch):
    first = read_tree(root, tmp_path / "cache")
    seen = read_again(monkeypatch)
    second = read_tree(root, tmp_path / "cache")
    assert seen == []
    assert images(second) == images(first)
    assert second.folders["train/b"].others == {".txt": 1}
    assert images(read_tree(root, None)) == images(first)
    assert len(seen) == 6, "without a cache everything is read"


@pytest.mark.parametrize(
    "change, folders",
    [
        (lambda r: write(r, "train/b/new.png"), ["b"]),
        (lambda r: (r / "train/b/0.png").unlink(), ["b"]),
        (lambda r: (r / "train/a/0.png").rename(r / "train/c/z.png"), ["a", "c"]),
        (lambda r: write(r, "train/a/more/x.png"), ["a", "more"]),
    ],
)
def test_only_folders_that_have_changed_are_read_again(root, tmp_path, monkeypatch, change, folders):
    read_tree(root, tmp_path / "cache")
    change(root)
    seen = read_again(monkeypatch)
    found = read_tree(root, tmp_path / "cache")
    assert sorted(seen) == folders
    assert images(found) == images(read_tree(root, None))


def test_a_folder_that_has_just_changed_is_not_trusted(root, tmp_path, monkeypatch):
    write(root, "train/b/new.png")
    read_tree(root, tmp_path / "cache")
    seen = read_again(monkeypatch)
    read_tree(root, tmp_path / "cache")
    assert seen == ["b"], "it could have changed again within the same time stamp"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and nothing"])
def test_a_damaged_index_costs_time_alone(root, tmp_path, content):
    expected = images(read_tree(root, tmp_path / "cache"))
    [index] = (tmp_path / "cache").iterdir()
    index.write_bytes(content)
    assert images(read_tree(root, tmp_path / "cache")) == expected


def test_a_cache_that_cannot_be_written_is_done_without(root, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert len(images(read_tree(root, tmp_path / "file" / "cache"))) == 13


def test_a_small_tree_has_no_index(root, tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "INDEXED", 100)
    read_tree(root, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_images_are_found_by_number(root):
    files = list_images(read_tree(root, None), ["train"], {"a": 0, "b": 1, "c": 2})
    assert len(files) == 13
    assert [files.path(i) for i in (0, 3, 4, 5, 12)] == [
        "train/a/0.png", "train/a/3.png", "train/a/deep/x.jpg", "train/b/0.png", "train/c/3.png",
    ]  # fmt: skip
    assert files[4] == {"bytes": None, "path": str(root.resolve() / "train/a/deep/x.jpg")}
    assert files[[12, 0]] == [files[12], files[0]]
    assert files.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 4
    assert np.array_equal(files.sizes, np.zeros(13))
