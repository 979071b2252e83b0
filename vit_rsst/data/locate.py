"""Opens the splits of a source: of a local folder by its layout, of the Hub by name; not yet divided."""

import contextlib
import csv
import glob
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit_rsst import reach
from vit_rsst.data.blocks import Fields, tar_labels
from vit_rsst.data.columns import (
    LABEL_NAMES,
    MISSING,
    Columns,
    check_labels,
    find_columns,
    read_labels,
    renumbered,
)
from vit_rsst.data.layout import SPLITS, Layout, Part, find_layout, split_word
from vit_rsst.data.listing import list_images
from vit_rsst.data.options import DataOptions
from vit_rsst.data.parquet import ParquetFile, file_digest, images_of, open_files
from vit_rsst.data.tables import Table
from vit_rsst.data.tree import Tree, joined, read_tree, shown
from vit_rsst.errors import InputError, MissingRequirement, RunError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

REMOTE = ("hf://", "s3://", "gs://", "az://", "http://", "https://", "file://")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")


@dataclass(frozen=True)
class Located:
    """One split that is read row after row.

    Attributes:
        rows: as `datasets` streams it; None where its files are read directly.
        columns: which of its columns hold what.
        files: paths or addresses of its shards, in their order.
        digest: tells its content from any other.
        root: folder that the names of shards are told from; None: they are addresses.
    """

    rows: "IterableDataset | None"
    columns: Columns
    files: tuple[str, ...] = ()
    digest: str = ""
    root: str | None = None

    @property
    def num_rows(self) -> int | None:
        """None where that is not known without reading all of it."""
        return None if self.columns.labels is None else sum(map(len, self.columns.labels.values()))

    @property
    def is_unlabelled(self) -> bool:
        """Whether its labels are known, and there is none."""
        known = self.columns.labels
        return known is not None and all((labels == MISSING).all() for labels in known.values())


@dataclass(frozen=True)
class Found:
    """The splits of a source.

    Attributes:
        splits: by `train`, `val` or `test`; all tables, or all to be read row after row.
        where: what a person calls the files of each.
        notes: what is not read and why, and what was a guess.
        named: whether `data.splits` named them.
        is_whole: whether the folder has no splits.
    """

    splits: dict[str, Table | Located]
    where: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    named: bool = False
    is_whole: bool = False

    @property
    def is_stream(self) -> bool:
        return any(isinstance(split, Located) for split in self.splits.values())


def cache_folder() -> Path:
    """Where indexes and copies lie, in the cache of `datasets`."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "vit_rsst"


def locate(options: DataOptions) -> Found:
    """The splits of a source; streams where the options ask for them and there are shards.

    Raises:
        InputError: no such folder, no training split, files that cannot be read, labels that no class has.
        MissingRequirement: the Hub cannot be reached, or the cache cannot be written.
    """
    import datasets

    datasets.disable_progress_bars()
    if options.path is None:
        return _on_the_hub(options)
    folder = check_folder(options.path)
    layout = find_layout(read_tree(folder, cache_folder()), options.splits)
    if "train" not in layout.parts:
        found = ", ".join(f"{name} ({part.where})" for name, part in layout.parts.items()) or "nothing"
        notes = f" ({'; '.join(layout.notes)})" if layout.notes else ""
        raise InputError(
            f"data.path: no training split in {options.path!r} (found: {found}){notes}; expected parquet or tar files "
            "train-*, a folder train/ with one folder a class, or data.splits={train: GLOB, test: GLOB}."
        )
    return _open_layout(layout, options)


def locate_scored(options: DataOptions, split: str) -> Found | None:
    """Images that are only scored: of a folder without a training split; None: it has one.

    The split is the one asked, or for `test` a validation split; a folder of class folders is whatever was asked.

    Raises:
        InputError: no such folder, no such split.
    """
    tree = read_tree(check_folder(str(options.path)), cache_folder())
    if options.splits and _fits(tree, options.splits):
        return None
    layout = find_layout(tree, is_scored=True)
    parts = layout.parts
    if "train" in parts and parts["train"].paths != ("",):
        return None
    found = next((name for name in (split, "val" if split == "test" else split) if name in parts), None)
    part = parts["train"] if "train" in parts else parts.get(found or "")
    if part is None:
        there = ", ".join(f"{name} ({part.where})" for name, part in parts.items()) or "nothing"
        raise InputError(f"--split: {options.path} has no {split} split (found: {there}).")
    notes = list(layout.notes)
    opened = _open_part(tree, split, part, replace(options, streaming=False), None, notes)
    return Found({split: opened}, {split: part.where}, notes, is_whole="train" in parts)


def _fits(tree: Tree, splits: dict[str, str]) -> bool:
    """Whether the folder is laid out as `data.splits` says."""
    try:
        find_layout(tree, splits)
    except InputError:
        return False
    return True


def check_folder(path: str) -> Path:
    """The folder of that path.

    Raises:
        InputError: it is no folder; says what it is, and what is read.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.lower().startswith(REMOTE):
        raise InputError(
            f"data.path: {path!r} is an address, and a local folder is expected; download it first, as with "
            "`hf download REPO --repo-type dataset --local-dir FOLDER`."
        )
    if folder.is_file():
        if path.lower().endswith(ARCHIVES):
            raise InputError(f"data.path: {path!r} is an archive; unpack it, and name the folder.")
        raise InputError(f"data.path: {path!r} is a file; name the folder that it lies in ({folder.parent}).")
    hint = ""
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        hint = (
            "; if it is a dataset of the Hub, download it first (`hf download REPO --repo-type dataset --local-dir …`)"
        )
    raise InputError(f"data.path: there is no folder {path!r} (looked in {folder.resolve().parent}){hint}.")


# -- local folders


def _open_layout(layout: Layout, options: DataOptions) -> Found:
    _check_overlap(layout)
    splits, notes, classes = {}, list(layout.notes), None
    for name, part in layout.parts.items():  # train comes first: its classes are those of the others
        split = _open_part(layout.tree, name, part, options, classes, notes)
        if name != "train" and split.is_unlabelled:
            notes.append(f"not read: {part.where} (images without labels)")
            continue
        splits[name] = split
        if classes is None:
            classes = split.columns.classes if isinstance(split, Located) else split.classes
    where = {name: layout.parts[name].where for name in splits}
    same = [(a, b) for a in splits for b in splits if a < b and splits[a].digest == splits[b].digest]
    notes += [f"{where[a]} and {where[b]} hold the same files: one does not test the other" for a, b in same]
    return Found(splits, where, notes, layout.named)


def _check_overlap(layout: Layout) -> None:
    """No folder or file belongs to two splits, by whatever links.

    Raises:
        InputError: one does.
    """
    owners: dict[object, str] = {}
    for split, part in layout.parts.items():
        for path in part.paths:
            if path in layout.tree.folders:
                own = {f.state[1:]: place for place, f in layout.tree.below(path) if f.count or f.kept}
            else:
                own = {os.path.realpath(os.path.join(layout.tree.root, path)): path}
            for identity, place in own.items():
                if owners.setdefault(identity, split) != split:
                    raise InputError(
                        f"data.path: {shown(place) or layout.tree.root} belongs to both the {owners[identity]} and the "
                        f"{split} split; move one of them, or set data.splits."
                    )


def _open_part(
    tree: Tree, split: str, part: Part, options: DataOptions, classes: Sequence[str] | None, notes: list[str]
) -> Table | Located:
    if part.kind == "folders":
        return _open_classes(tree, split, part, classes, notes)
    if part.kind == "metadata":
        return _open_metadata(tree, split, part, options, classes, notes)
    if part.kind == "disk":
        return _open_saved(tree, split, part, options, classes)
    if part.kind == ".tar":
        return _open_tars(tree, split, part, options, classes)
    files, more = open_files(tree.root, part.paths, options, split, classes)
    notes += more
    return stream_of(files, split, tree.root) if options.streaming else table_of(files, split)


def _open_classes(tree: Tree, split: str, part: Part, classes: Sequence[str] | None, notes: list[str]) -> Table:
    """A split of class folders.

    Raises:
        InputError: a class that train does not have.
    """
    live = {name for path in part.paths for name in tree.children(path) if not name.startswith(".")}
    if classes is None:
        classes = tuple(sorted(live))
        if bad := [name for name in classes if shown(name) != name]:
            raise InputError(f"data.path: the name of class {shown(bad[0])!r} is not UTF-8; rename its folder.")
    numbers = {unicodedata.normalize("NFC", name): i for i, name in enumerate(classes)}
    labels = {name: numbers.get(unicodedata.normalize("NFC", name), MISSING) for name in live}
    if strange := sorted(name for name, label in labels.items() if label == MISSING):
        raise InputError(
            f"data: the classes of {part.where} and of train differ: {shown(strange[0])!r} is not among the "
            f"{len(classes)} of train ({', '.join(classes[:3])} …); rename its folder, or move it away."
        )
    if missing := sorted(set(range(len(classes))) - set(labels.values())):
        some = ", ".join(classes[i] for i in missing[:5]) + (" …" if len(missing) > 5 else "")
        notes.append(f"{part.where} has no image of {len(missing)} of {len(classes)} classes: {some}")
    files = list_images(tree, part.paths, labels)
    return Table(files, files.labels, tuple(classes), files.digest(part.paths), files.place)


def _open_metadata(
    tree: Tree, split: str, part: Part, options: DataOptions, classes: Sequence[str] | None, notes: list[str]
) -> Table:
    """Images beside a metadata.csv or metadata.jsonl with the columns file_name and label.

    Raises:
        InputError: a column or a file is missing.
    """
    import pyarrow as pa

    [folder] = part.paths
    rows = _metadata_rows(tree, part.where)
    names = list(rows[0]) if rows else []
    if "file_name" not in names:
        raise InputError(f"data.path: {part.where} has no column file_name (its columns: {', '.join(names)}).")
    others = [name for name in names if name != "file_name"]
    label = options.label_column or next((name for name in LABEL_NAMES if name in others), None)
    label = others[0] if label is None and len(others) == 1 else label
    if label not in others:
        raise InputError(
            f"data.label_column: {part.where} has no column {label or 'label'!r} (its columns: {', '.join(names)}); "
            "name the one to use."
        )

    def place(row: int) -> str:
        return f"{part.where}, row {row}"

    paths = [joined(folder, row["file_name"] or "") for row in rows]
    gone = next((i for i, path in enumerate(paths) if not os.path.isfile(os.path.join(tree.root, path))), None)
    if gone is not None:
        raise InputError(f"data.path: {place(gone)} names {paths[gone]!r}, which is not there; remove the row.")
    if (unnamed := tree.images(folder) - len(set(paths))) > 0:
        notes.append(f"not read: {unnamed:,} images that {part.where} does not name")
    texts = pa.chunked_array([[None if row[label] in (None, "") else str(row[label]) for row in rows]], pa.string())
    labels, found = read_labels(texts, Columns("file_name", label, (), "text"), place)
    if classes is None:
        is_numbers = all(name.lstrip("-").isdigit() for name in found)
        classes = tuple(sorted(found, key=int)) if is_numbers else found
    labels = renumbered(labels, found, classes, place, f"the {split} split")
    images = [{"bytes": None, "path": os.path.join(tree.root, path)} for path in paths]
    digest = hashlib.sha256(repr((label, labels.tolist())).encode())
    for path in paths:
        digest.update(f"{path[len(folder) :]} {os.path.getsize(os.path.join(tree.root, path))}".encode())
    for i in np.sort(np.random.default_rng(0).permutation(len(paths))[:256]).tolist():
        digest.update(Path(images[i]["path"]).read_bytes())
    return Table(_Listed(images), labels, tuple(classes), digest.hexdigest(), partial(_shown_item, paths))


def _shown_item(paths: Sequence[str], number: int) -> str:
    return shown(paths[number])


def _metadata_rows(tree: Tree, path: str) -> list[dict]:
    full = Path(tree.root, path)
    try:
        with full.open(encoding="utf-8-sig", newline="") as file:
            if path.endswith(".csv"):
                return list(csv.DictReader(file))
            return [json.loads(line) for line in file if line.strip()]
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(f"data.path: {path} cannot be read ({first_line(error)}).") from error


class _Listed(list):
    """A list that can be asked for several items."""

    def __getitem__(self, index: int | slice | Sequence[int]) -> object:
        if isinstance(index, int | slice | np.integer):
            return super().__getitem__(index)
        return [super(_Listed, self).__getitem__(i) for i in index]


def table_of(files: Sequence[ParquetFile], split: str) -> Table:
    """Parquet files of a split as one table, with their images in the cache."""
    labels, digest, place = _labels_of(files, split)
    return Table(images_of(files, cache_folder()), labels, files[0].columns.classes, digest, place)


def _labels_of(files: Sequence[ParquetFile], split: str) -> tuple[np.ndarray, str, Callable[[int], str]]:
    """Labels of all files, what tells their content from any other, and what messages call a row."""
    place = partial(_place, np.cumsum([0, *(file.rows for file in files)]), [file.name for file in files])
    labels = np.concatenate([file.labels for file in files])
    if split == "train" or not (labels == MISSING).all():
        check_labels(labels, files[0].columns, place)
    return labels, hashlib.sha256("".join(file.digest for file in files).encode()).hexdigest(), place


def _place(starts: np.ndarray, names: Sequence[str], row: int) -> str:
    number = int(np.searchsorted(starts, row, "right")) - 1
    return f"{names[number]}, row {row - starts[number]}"


def stream_of(files: Sequence[ParquetFile], split: str, root: str) -> Located:
    """Parquet files of a split, to be read row after row; their labels are known."""
    _, digest, _ = _labels_of(files, split)
    paths = tuple(file.path for file in files)
    columns = replace(files[0].columns, labels={file.path: file.labels for file in files})
    return Located(_stream("parquet", paths), columns, paths, digest, root)


def _stream(builder: str, paths: Sequence[str]) -> "IterableDataset":
    import datasets

    return datasets.load_dataset(
        builder, data_files={"train": list(map(glob.escape, paths))}, split="train", streaming=True
    )


def _open_tars(
    tree: Tree, split: str, part: Part, options: DataOptions, classes: Sequence[str] | None
) -> Table | Located:
    import datasets

    paths = tuple(os.path.join(tree.root, path) for path in part.paths)
    with read_by_datasets(part.where):
        rows = datasets.load_dataset(
            "webdataset", data_files={split: list(map(glob.escape, paths))}, split=split, streaming=options.streaming
        )
        known = replace(options, num_classes=options.num_classes or 2) if options.streaming else options
        columns = find_columns(rows.features, known, part.where)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{os.path.getsize(path)}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
    if not options.streaming:
        return _table_of_dataset(rows, columns, split, part.where, digest.hexdigest(), classes)
    labels = tar_labels(paths, Fields(columns.image, columns.label))
    number = options.num_classes or 1 + max((int(found.max(initial=0)) for found in labels.values()), default=0)
    columns = replace(columns, classes=tuple(classes or map(str, range(number))), labels=labels)
    starts = np.cumsum([0, *map(len, labels.values())])
    check_labels(np.concatenate(list(labels.values())), columns, partial(_place, starts, part.paths))
    return Located(rows, columns, paths, digest.hexdigest(), tree.root)


def _open_saved(tree: Tree, split: str, part: Part, options: DataOptions, classes: Sequence[str] | None) -> Table:
    """A folder that save_to_disk wrote."""
    import datasets

    folder = Path(tree.root, part.paths[0])
    with read_by_datasets(part.where):
        rows = datasets.load_from_disk(str(folder))
        columns = find_columns(rows.features, options, part.where)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.arrow")):
        digest.update(file_digest(str(file), b"").encode())
    return _table_of_dataset(rows, columns, split, part.where, digest.hexdigest(), classes)


def _table_of_dataset(
    rows: "Dataset", columns: Columns, split: str, where: str, digest: str, classes: Sequence[str] | None
) -> Table:
    """A split that `datasets` reads at random."""
    from datasets import Image

    place = partial("{}, row {}".format, where.rstrip("/"))
    column = rows.select_columns([columns.label]).with_format("arrow")[:].column(0)
    labels, names = read_labels(column, columns, place)
    classes = tuple(names if classes is None else classes)
    labels = renumbered(labels, names, classes, place, f"the {split} split")
    if split == "train" or not (labels == MISSING).all():
        check_labels(labels, replace(columns, classes=classes), place)
    if isinstance(rows.features[columns.image], Image):
        rows = rows.cast_column(columns.image, Image(decode=False))
    images = rows.with_format(None)[columns.image]
    digest = hashlib.sha256(f"{digest} {len(labels)}".encode() + labels.astype("<i8").tobytes()).hexdigest()
    return Table(images, labels, classes, digest, place)


@contextlib.contextmanager
def read_by_datasets(where: str) -> Iterator[None]:
    """Says what `datasets` could not do, by the cause that it wraps, with the files that it read."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs of a failure is in its exception
    try:
        yield
    except InputError:
        raise
    except PermissionError as error:
        raise _unwritable(error, where) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, RunError):
            raise cause from error
        if isinstance(cause, PermissionError):
            raise _unwritable(cause, where) from error
        raise InputError(f"data.path: {where} cannot be read ({first_line(cause)}); check its files.") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _unwritable(error: PermissionError, where: str) -> MissingRequirement:
    place = shown(str(error.filename or where))
    return MissingRequirement(
        f"data: {place} cannot be accessed ({first_line(error)}); if that is the cache, name another folder for it by "
        "HF_DATASETS_CACHE."
    )


# -- the Hub


def _on_the_hub(options: DataOptions) -> Found:
    import datasets

    if options.info.hub_id is None:
        raise InputError(f"data.path: the source {options.source!r} needs a local folder (evaluate: --data FOLDER).")
    reach.prefer_cache()
    try:
        builder = datasets.load_dataset_builder(options.info.hub_id, revision=options.revision)
        opened = datasets.load_dataset(options.info.hub_id, revision=options.revision, streaming=options.streaming)
    except PermissionError as error:
        raise MissingRequirement(
            f"data: the cache cannot be written ({first_line(error)}); name another folder by HF_HOME."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # datasets and huggingface_hub raise all three
        raise MissingRequirement(
            f"data.source: {options.info.hub_id!r} cannot be read from the Hub ({first_line(error)}). Check the "
            "network, data.revision and, for gated sets, that their terms are accepted on their page and HF_TOKEN is "
            "set; or name a local copy with data.path=FOLDER (evaluate: --data FOLDER)."
        ) from error
    files, splits, notes, classes = builder.config.data_files or {}, {}, [], None
    named = {split_word(name): name for name in opened}
    for split in filter(named.get, SPLITS):
        name = named[split]
        where = f"{name} of {options.info.hub_id}"
        columns = find_columns(opened[name].features, options, where)
        shards = tuple(map(str, files.get(name, ())))
        digest = hashlib.sha256(repr((sorted(shards), columns)).encode()).hexdigest()  # addresses hold the commit
        if options.streaming:
            splits[split] = Located(opened[name], columns, shards, digest)
            continue
        table = _table_of_dataset(opened[name], columns, split, where, digest, classes)
        if split != "train" and table.is_unlabelled:
            notes.append(f"not read: {where} (images without labels)")
            continue
        splits[split], classes = table, table.classes if classes is None else classes
    if "train" not in splits:
        raise InputError(f"data: {options.info.hub_id} has no training split (found: {', '.join(opened)}).")
    return Found(splits, {split: f"{named[split]} of {options.info.hub_id}" for split in splits}, notes)
