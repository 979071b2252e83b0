"""What lies below a dataset folder, read in one walk: image files by folder, shards, and what is neither.

Links are followed, and a loop ends where a folder lies within itself. Hidden files and the litter of desktops are left
out. A large tree is kept as an index in the cache: next time, only folders whose modification time has changed are read
again. Nothing here knows of classes and splits.
"""

import contextlib
import hashlib
import json
import os
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vit_rsst.data.decoding import suffixes
from vit_rsst.errors import InputError, first_line

LITTER = {"Thumbs.db", "desktop.ini", "Icon\r"}
LITTER_FOLDERS = {
    "__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information",
    ".ipynb_checkpoints", ".git", ".cache", ".thumbnails", ".AppleDouble", ".Spotlight-V100", ".fseventsd",
}  # fmt: skip
"""What systems and tools leave behind; never data."""

KEPT_NAMES = {"metadata.csv", "metadata.jsonl", "dataset_dict.json", "dataset_info.json", "state.json"}
SHARD_SUFFIXES = (".parquet", ".tar")

INDEXED = 100_000
"""A tree of fewer images is walked each time: 0.3 s. In a larger one, sizes are those of the index until a folder's
modification time changes."""

TICK = 2 * 10**9
"""Nanoseconds: a folder that changed so shortly before it was read may change again within the same time stamp."""


@dataclass(frozen=True)
class Folder:
    """One folder of the tree, without those below it.

    Attributes:
        state: modification time in ns, device and inode.
        names: image files, each ended by a zero byte, sorted.
        sizes: of the image files in bytes, int64 (images,).
        folders: names of the folders in it.
        kept: names of shards and of files that describe a dataset.
        others: what else there is: suffix (or a word) → how many.
    """

    state: tuple[int, int, int]
    names: bytes
    sizes: np.ndarray
    folders: tuple[str, ...]
    kept: tuple[str, ...]
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Image files."""
        return len(self.sizes)


@dataclass(frozen=True)
class Tree:
    """All folders below a root, by their path from it ("" is the root), each before those in it."""

    root: str
    folders: dict[str, Folder]

    def below(self, path: str) -> Iterator[tuple[str, Folder]]:
        """The folder of that path and all below it, without hidden ones."""
        pending = [path]
        while pending:
            place = pending.pop()
            yield place, self.folders[place]
            pending += [joined(place, name) for name in reversed(self.inside(place)) if not name.startswith(".")]

    def inside(self, path: str) -> list[str]:
        """Names of the folders in that one; hidden ones too, but no links to a folder that they lie in."""
        return [name for name in self.folders[path].folders if joined(path, name) in self.folders]

    def children(self, path: str) -> list[str]:
        """Those of them that hold images, themselves or below."""
        return [name for name in self.inside(path) if self.images(joined(path, name))]

    def images(self, path: str) -> int:
        """Image files in that folder and below."""
        return sum(folder.count for _, folder in self.below(path))


def joined(folder: str, name: str) -> str:
    """The path from the root of something in a folder of the tree."""
    return f"{folder}/{name}" if folder else name


def shown(path: str) -> str:
    """A path as it can be printed and stored; bytes that are not UTF-8 as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def read_tree(root: Path, cache: Path | None) -> Tree:
    """Walks the folder, helped by the index of an earlier walk.

    Args:
        cache: folder of the indexes; None: no index.

    Raises:
        InputError: a folder cannot be read.
    """
    top = os.path.realpath(root)
    name = hashlib.sha256(os.fsencode(top)).hexdigest()[:32]
    index = None if cache is None else cache / f"{name}.npz"
    known = _load(index) if index is not None and index.is_file() else {}
    tree = Tree(top, dict(_walk(top, known)))
    is_large = sum(folder.count for folder in tree.folders.values()) >= INDEXED
    if index is not None and is_large and any(known.get(path) is not folder for path, folder in tree.folders.items()):
        with contextlib.suppress(OSError):  # an index saves time and nothing else
            _save(tree, index)
    return tree


def _walk(root: str, known: Mapping[str, Folder]) -> Iterator[tuple[str, Folder]]:
    pending: list[tuple[str, frozenset]] = [("", frozenset())]
    while pending:
        path, above = pending.pop()
        full = os.path.join(root, path) if path else root
        try:
            found = os.stat(full)
            state = (found.st_mtime_ns, found.st_dev, found.st_ino)
            if state[1:] in above:  # a link to a folder that it lies in
                continue
            folder = known.get(path)
            if folder is None or folder.state != state:
                folder = _read(full, state)
        except OSError as error:
            raise InputError(f"data.path: {shown(full)} cannot be read ({first_line(error)}).") from error
        yield path, folder
        pending += [(joined(path, name), above | {state[1:]}) for name in reversed(folder.folders)]


def _read(full: str, state: tuple[int, int, int]) -> Folder:
    images, folders, kept, others = [], [], [], Counter()
    decodable = suffixes()
    with os.scandir(full) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir():
                if name not in LITTER_FOLDERS and not name.startswith(".Trash"):
                    folders.append(name)
                continue
            if name.startswith(".") or name in LITTER:
                continue
            suffix = os.path.splitext(name)[1].lower()
            if not entry.is_file():
                others["broken links"] += 1
            elif suffix in decodable:
                images.append((os.fsencode(name), entry.stat().st_size))
            elif suffix in SHARD_SUFFIXES or name in KEPT_NAMES:
                kept.append(name)
            else:
                others[suffix or "files without a suffix"] += 1
    images.sort()
    names = b"".join(name + b"\0" for name, _ in images)
    sizes = np.array([size for _, size in images], dtype=np.int64)
    return Folder(state, names, sizes, tuple(sorted(folders)), tuple(sorted(kept)), dict(others))


def _save(tree: Tree, index: Path) -> None:
    now = time.time_ns()
    # What changed a moment ago is read again next time.
    settled = {path: folder for path, folder in tree.folders.items() if folder.state[0] < now - TICK}
    rows = [
        [path, f.state, f.count, len(f.names), f.folders, f.kept, dict(f.others)] for path, f in settled.items()
    ]  # fmt: skip
    text = json.dumps(rows).encode()  # surrogates, which stand for bytes that are not UTF-8, become escapes
    index.parent.mkdir(parents=True, exist_ok=True)
    draft = index.with_suffix(f".{os.getpid()}.tmp")
    with draft.open("wb") as file:
        np.savez(
            file,
            folders=np.frombuffer(text, np.uint8),
            names=np.frombuffer(b"".join(f.names for f in settled.values()), np.uint8),
            sizes=np.concatenate([np.empty(0, np.int64), *(f.sizes for f in settled.values())]),
        )
    draft.replace(index)


def _load(index: Path) -> dict[str, Folder]:
    """The folders of an index; none where it cannot be read, which costs time alone."""
    try:
        with np.load(index, allow_pickle=False) as stored:
            rows = json.loads(stored["folders"].tobytes())
            names, sizes = stored["names"].tobytes(), stored["sizes"]
        known, image, byte = {}, 0, 0
        for path, state, count, length, folders, kept, others in rows:
            part = names[byte : byte + length], sizes[image : image + count]
            known[path] = Folder(tuple(state), *part, tuple(folders), tuple(kept), others)
            image, byte = image + count, byte + length
        return known
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
