"""Where the files of a source lie, which split each belongs to, and which columns hold image and label."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vit_rsst import reach
from vit_rsst.data.catalog import LABEL_COLUMNS
from vit_rsst.data.options import DataOptions
from vit_rsst.errors import InputError, MissingRequirement, first_line

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

SPLIT_NAMES = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
BUILDERS = {"parquet": "parquet", "tar": "webdataset"}
"""Suffix of the files → builder of `datasets`."""

TAIL_BYTES = 2**16


@dataclass(frozen=True)
class Located:
    """One split as `datasets` opens it.

    Attributes:
        rows: read at random, or row after row.
        files: names of its shards in their order; empty for class folders.
    """

    rows: "Dataset | IterableDataset"
    files: tuple[str, ...] = ()

    @property
    def is_stream(self) -> bool:
        return not hasattr(self.rows, "num_rows")


@dataclass(frozen=True)
class Columns:
    """Which column holds what.

    Attributes:
        image, label: their names.
        classes: names of the classes, by label.
    """

    image: str
    label: str
    classes: tuple[str, ...]


def locate(options: DataOptions) -> dict[str, Located]:
    """The splits of a source by name, `train` among them; streams where the options ask for them.

    Class folders are listed, never streamed: their files are opened one by one anyway.

    Raises:
        InputError: no such folder, no training split, files that cannot be read.
        MissingRequirement: the Hub cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    if options.path is None:
        return _on_the_hub(options)
    folder = Path(options.path).expanduser()
    if not folder.is_dir():
        raise InputError(f"data.path: there is no folder {options.path!r} (looked in {folder.resolve().parent}).")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs of a failure is in its exception
    try:
        found = _shards(folder, options.streaming) or _class_folders(folder)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"data.path: {options.path} cannot be read ({first_line(error.__cause__ or error)}); check its files, "
            "which have to be those of one data set."
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    if "train" not in found:
        raise InputError(
            f"data.path: no training split in {options.path!r} (found: {', '.join(found) or 'nothing'}); expected "
            "parquet or tar files train-*, or a folder train/ with one folder a class."
        )
    return found


def _on_the_hub(options: DataOptions) -> dict[str, Located]:
    import datasets

    if options.info.hub_id is None:
        raise InputError(f"data.path: the source {options.source!r} needs a local folder (evaluate: --data FOLDER).")
    reach.prefer_cache()
    try:
        builder = datasets.load_dataset_builder(options.info.hub_id, revision=options.revision)
        splits = datasets.load_dataset(options.info.hub_id, revision=options.revision, streaming=options.streaming)
    except (OSError, RuntimeError, ValueError) as error:  # datasets and huggingface_hub raise all three
        raise MissingRequirement(
            f"data.source: {options.info.hub_id!r} cannot be read from the Hub ({first_line(error)}). Check the "
            "network, data.revision and, for gated sets, that their terms are accepted on their page and HF_TOKEN is "
            "set; or name a local copy with data.path=FOLDER (evaluate: --data FOLDER)."
        ) from error
    files = builder.config.data_files or {}
    return {name: Located(rows, tuple(map(str, files.get(name, ())))) for name, rows in splits.items()}


def _shards(folder: Path, streaming: bool) -> dict[str, Located]:
    """Parquet files or tars; one call a split, or the features of the first file would stand for all."""
    import datasets

    for suffix, builder in BUILDERS.items():
        files: dict[str, list[str]] = {}
        for file in sorted(folder.rglob(f"*.{suffix}")):
            if split := _split_of(file, folder):
                files.setdefault(split, []).append(str(file))
        if files:
            return {
                split: Located(
                    datasets.load_dataset(builder, data_files={split: f}, split=split, streaming=streaming), tuple(f)
                )
                for split, f in files.items()
            }
    return {}


def _split_of(file: Path, folder: Path) -> str | None:
    """By a word of the file's name, such as `train-00000-of-00008`, or by its folder's."""
    words = re.split(r"[-_.]", file.name)[:-1] + list(reversed(file.relative_to(folder).parts[:-1]))
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def _class_folders(folder: Path) -> dict[str, Located]:
    import datasets

    parts = {SPLIT_NAMES[d.name]: d for d in sorted(folder.iterdir()) if d.is_dir() and d.name in SPLIT_NAMES}
    if not parts and any(child.is_dir() for child in folder.iterdir()):
        parts = {"train": folder}
    return {
        split: Located(datasets.load_dataset("imagefolder", data_dir=str(d), split="train", drop_labels=False))
        for split, d in parts.items()
    }


def columns(features: "Features | None", options: DataOptions) -> Columns:
    """Finds the image and the label column from the features.

    Raises:
        InputError: none or several, or labels without names and no `data.num_classes`.
    """
    from datasets import ClassLabel, Image, Value

    features = features or {}
    image = _column(features, lambda f: isinstance(f, Image), "image", options.image_column, options)
    label = options.label_column or LABEL_COLUMNS.get(options.source)
    named = {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)}
    if not named and options.num_classes:  # tars hold plain numbers
        label = _column(features, lambda f: isinstance(f, Value) and "int" in f.dtype, "label", label, options)
        return Columns(image, label, tuple(map(str, range(options.num_classes))))
    label = label if label in features else options.label_column
    label = _column(features, lambda f: isinstance(f, ClassLabel), "label", label, options)
    classes = tuple(features[label].names)
    if options.num_classes and options.num_classes != len(classes):
        raise InputError(
            f"data.num_classes: {options.num_classes} asked, and {options.where} names {len(classes)}; leave it out."
        )
    return Columns(image, label, classes)


def _column(features: dict, fits: Callable[[object], bool], what: str, asked: str | None, options: DataOptions) -> str:
    candidates = [name for name, feature in features.items() if fits(feature)]
    if asked is not None:
        if asked in candidates:
            return asked
        raise InputError(
            f"data.{what}_column: no such column {asked!r} in {options.where}; "
            f"candidates: {', '.join(candidates) or 'none'} of {', '.join(features)}."
        )
    if len(candidates) == 1:
        return candidates[0]
    kind = {"image": "an Image", "label": "a ClassLabel"}[what]
    raise InputError(
        f"data.{what}_column: {len(candidates)} columns of {options.where} hold {kind} "
        f"({', '.join(candidates) or 'columns: ' + ', '.join(features)}); name the one to use"
        f"{', or set data.num_classes where labels are plain numbers' if what == 'label' and not candidates else ''}."
    )


def identity(located: Located, options: DataOptions) -> dict:
    """What tells this data from any other later: the files' names, sizes, heads and tails, or the Hub's commit."""
    import datasets

    digest = hashlib.sha256(repr(located.rows.features).encode())
    for name in sorted(located.files):
        digest.update(Path(name).name.encode())
        if (file := Path(name)).is_file():
            with file.open("rb") as opened:
                digest.update(f"{file.stat().st_size}".encode() + opened.read(TAIL_BYTES))
                opened.seek(-min(TAIL_BYTES, file.stat().st_size), 2)
                digest.update(opened.read())
    if not located.files:
        for column in located.rows.with_format("arrow")[:256].columns:
            digest.update(str(column[:16]).encode())
    return {
        "source": options.info.hub_id if options.path is None else str(Path(options.path).expanduser().resolve()),
        "revision": options.revision,
        "rows": getattr(located.rows, "num_rows", None),
        "files": len(located.files),
        "sha256": digest.hexdigest(),
        "datasets": datasets.__version__,
    }
