"""The image files of one split of class folders, with their labels, and what tells them from any other.

The first folder below the split's is the class, and everything below that one belongs to it, as torchvision's
ImageFolder has it. Files lie in the order of their folders, then of their names.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vit_rsst.data.tree import Tree, joined, shown

SAMPLED = 256
"""Files of a split whose content is part of its identity."""


@dataclass(frozen=True, eq=False)
class ImageFiles(Sequence):
    """Image files by number; each is `{"bytes": None, "path": …}`, an image as `datasets` gives it undecoded.

    A few bytes a file are all that it takes: folders once, names as one run of bytes.

    Attributes:
        root: what paths are told from.
        folders: paths from the root, without its name.
        counts: files in each folder, int64 (folders,).
        names: each ended by a zero byte, folder after folder.
        sizes: in bytes, int64 (files,).
        labels: of each folder, int64 (folders,).
    """

    root: str
    folders: tuple[str, ...]
    counts: np.ndarray
    names: bytes
    sizes: np.ndarray
    folder_labels: np.ndarray

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.flatnonzero(np.frombuffer(self.names, np.uint8) == 0)

    @cached_property
    def _last(self) -> np.ndarray:
        return np.cumsum(self.counts)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (files,)."""
        return np.repeat(self.folder_labels, self.counts)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int | Sequence[int]) -> dict | list[dict]:
        if isinstance(index, int | np.integer):
            return {"bytes": None, "path": os.path.join(self.root, self.path(int(index)))}
        return [self[int(i)] for i in index]

    def path(self, index: int) -> str:
        """From the root."""
        begin = self._ends[index - 1] + 1 if index else 0
        name = os.fsdecode(self.names[begin : self._ends[index]])
        return joined(self.folders[int(np.searchsorted(self._last, index, "right"))], name)

    def place(self, index: int) -> str:
        """What a message calls it."""
        return shown(self.path(index))

    def digest(self, base: Sequence[str]) -> str:
        """Changes with every name, size and label, and with the content of 256 files; not with where the root lies.

        Args:
            base: folders of the split, whose own names do not count.
        """
        digest = hashlib.sha256()
        for folder, count, label in zip(self.folders, self.counts, self.folder_labels, strict=True):
            digest.update(
                f"{len(_within(folder, base))} {count} {label} ".encode() + os.fsencode(_within(folder, base))
            )
        digest.update(self.names)
        digest.update(self.sizes.astype("<i8").tobytes())
        chosen = np.random.default_rng(0).permutation(len(self))[:SAMPLED]
        for i in np.sort(chosen).tolist():
            with open(self[i]["path"], "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def _within(folder: str, base: Sequence[str]) -> str:
    return next(
        (folder[len(path) :].lstrip("/") for path in base if path and f"{folder}/".startswith(f"{path}/")), folder
    )


def list_images(tree: Tree, split: Sequence[str], labels: Mapping[str, int]) -> ImageFiles:
    """The images of a split.

    Args:
        split: its folders, from the root of the tree.
        labels: class by name of its folder; folders of other names are left out.
    """
    found = [
        (path, folder, labels[name])
        for part in split
        for name in sorted(tree.children(part), key=lambda name: f"{name}/")
        if name in labels
        for path, folder in sorted(tree.below(joined(part, name)), key=lambda item: f"{item[0]}/")
        if folder.count
    ]
    return ImageFiles(
        tree.root,
        tuple(path for path, _, _ in found),
        np.array([folder.count for _, folder, _ in found], dtype=np.int64),
        b"".join(folder.names for _, folder, _ in found),
        np.concatenate([np.empty(0, np.int64), *(folder.sizes for _, folder, _ in found)]),
        np.array([label for _, _, label in found], dtype=np.int64),
    )
