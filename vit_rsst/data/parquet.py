"""Local parquet files: their columns, compared file by file, their labels and their identity; images by row group.

Labels are read whole before anything else, so that whatever is wrong with one is known with its file and row. Images
are read group by group, or at random from a copy in the cache that is named by the file's content.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vit_rsst.data.columns import Columns, exactly, features_of, find_columns, read_labels, renumbered
from vit_rsst.data.decoding import Encoded
from vit_rsst.data.options import DataOptions
from vit_rsst.data.tree import shown
from vit_rsst.errors import InputError, MissingRequirement, first_line

WHOLE = 16 * 2**20
"""Bytes: a file of at most so many is identified by every one of them."""

BLOCK, BLOCKS = 2**16, 64
"""Of a larger file: bytes of a block, and how many, beside its footer and its labels."""

BATCH = 64


@dataclass(frozen=True, eq=False)
class ParquetFile:
    """One file of a split.

    Attributes:
        path: where it lies.
        name: from the root of the data, for messages.
        groups: rows of each row group.
        columns: which hold image and label, and the classes that the labels index.
        labels: int64 (rows,); −1 where there is none.
        digest: tells its content from any other.
    """

    path: str
    name: str
    groups: tuple[int, ...]
    columns: Columns
    labels: np.ndarray
    digest: str

    @property
    def rows(self) -> int:
        return len(self.labels)

    def images(self, group: int | None = None, batch: int = BATCH) -> Iterator[list[Encoded]]:
        """The encoded images of a row group, or of all, in the order of the rows, `batch` at a time.

        Raises:
            InputError: the file cannot be read.
        """
        for part in self._batches(group, batch):
            yield part.to_pylist()

    def _batches(self, group: int | None, batch: int) -> Iterator[pa.StructArray]:
        groups = None if group is None else [group]
        with readable(self.path), pq.ParquetFile(self.path) as file:
            for part in file.iter_batches(batch, groups, columns=[self.columns.image]):
                yield _as_images(part.column(0), os.path.dirname(self.path))


def _as_images(column: pa.Array, folder: str) -> pa.StructArray:
    """{bytes, path} of every row; paths that stand alone are told from the folder of the file."""
    if pa.types.is_struct(column.type):
        bytes_ = column.field("bytes").cast(pa.binary())
        has_path = column.type.get_field_index("path") >= 0
        paths = column.field("path").cast(pa.string()) if has_path else pa.nulls(len(column), pa.string())
        if bytes_.null_count and has_path:
            pairs = zip(bytes_.is_valid().to_pylist(), paths.to_pylist(), strict=True)
            full = [path if has_bytes or path is None else os.path.join(folder, path) for has_bytes, path in pairs]
            paths = pa.array(full, pa.string())
    else:
        bytes_, paths = column.cast(pa.binary()), pa.nulls(len(column), pa.string())
    return pa.StructArray.from_arrays([bytes_, paths], ["bytes", "path"])


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns what is wrong with a file into a sentence that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"data.path: {shown(path)} cannot be read ({first_line(error)}); replace it, or move it away."
        ) from error


def open_files(
    root: str, paths: Sequence[str], options: DataOptions, split: str, classes: Sequence[str] | None = None
) -> tuple[list[ParquetFile], list[str]]:
    """The files of a split with one meaning of labels, and notes on what is not read.

    Args:
        root: the folder that `paths` are told from.
        split: its name, for messages.
        classes: those of the training split, which the labels are matched with; None: this is the training split.

    Raises:
        InputError: a file cannot be read, or its columns, types or classes differ from those of the first.
    """
    with ThreadPoolExecutor(8) as pool:
        schemas = list(pool.map(lambda path: _schema(root, path), paths))
        first = find_columns(features_of(schemas[0]), options, shown(paths[0]))
        found = [first]
        for path, schema in zip(paths[1:], schemas[1:], strict=True):
            found.append(_same_columns(first, schema, options, shown(path), shown(paths[0])))
        opened = list(pool.map(lambda item: _open(root, *item), zip(paths, found, strict=True)))
    if classes is None and first.kind == "text":
        classes = sorted({name for file in opened for name in file.columns.classes})
        if options.num_classes not in (None, len(classes)):
            raise InputError(
                f"data.num_classes: {options.num_classes} asked, and {first.label!r} has {len(classes)} texts "
                f"({', '.join(classes[:3])} …); leave it out."
            )
    classes = tuple(first.classes if classes is None else classes)
    return [_matched(file, classes, split) for file in opened], _notes(paths, schemas)


def _schema(root: str, path: str) -> pa.Schema:
    full = os.path.join(root, path)
    with readable(full):
        return pq.read_schema(full)


def _same_columns(first: Columns, schema: pa.Schema, options: DataOptions, name: str, first_name: str) -> Columns:
    """The columns of a further file.

    Raises:
        InputError: they are not there, or hold something else.
    """
    for column in (first.image, first.label):
        if column not in schema.names:
            raise InputError(
                f"data.path: {name} has no column {column!r} (its columns: {', '.join(schema.names)}), which "
                f"{first_name} has; rewrite it with the same columns, or move it away."
            )
    found = find_columns(features_of(schema), exactly(first, options), name)
    if found.kind != first.kind:
        said = {"names": "ClassLabel", "text": "text", "int": "integers", "bool": "booleans", "float": "floats"}
        raise InputError(
            f"data.path: the column {first.label!r} holds {said[found.kind]} in {name}, and {said[first.kind]} in "
            f"{first_name}; rewrite one of them."
        )
    if found.kind == "names" and set(found.classes) != set(first.classes):
        other = sorted(set(found.classes) ^ set(first.classes))
        raise InputError(
            f"data.path: {name} and {first_name} name different classes ({', '.join(other[:3])}); they are not of one "
            "dataset."
        )
    return found


def _open(root: str, path: str, columns: Columns) -> ParquetFile:
    full, name = os.path.join(root, path), shown(path)
    with readable(full), pq.ParquetFile(full) as file:
        groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        column = file.read(columns=[columns.label]).column(0)
        labels, names = read_labels(column, columns, lambda row: f"{name}, row {row}")
        digest = file_digest(full, labels.astype("<i8").tobytes())
    return ParquetFile(full, name, groups, replace(columns, classes=names), labels, digest)


def _matched(file: ParquetFile, classes: tuple[str, ...], split: str) -> ParquetFile:
    labels = renumbered(
        file.labels, file.columns.classes, classes, lambda row: f"{file.name}, row {row}", f"the {split} split"
    )
    return replace(file, labels=labels, columns=replace(file.columns, classes=classes))


def _notes(paths: Sequence[str], schemas: Sequence[pa.Schema]) -> list[str]:
    """A line where files have other columns than the first."""
    expected = set(schemas[0].names)
    for path, schema in zip(paths, schemas, strict=True):
        if other := sorted(set(schema.names) ^ expected):
            return [f"{shown(path)} has other columns than {shown(paths[0])} ({', '.join(other[:3])}): not read"]
    return []


def file_digest(path: str, labels: bytes) -> str:
    """Of a small file all bytes; of a large one its size, its end, its labels and blocks drawn by a fixed seed."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size}".encode() + labels)
        file.seek(-8, os.SEEK_END)
        footer = min(int.from_bytes(file.read(4), "little") + 8, WHOLE)  # of parquet: sizes and statistics
        places = np.sort(np.random.default_rng(0).integers(0, size - BLOCK, BLOCKS)).tolist()
        for place, length in [*((place, BLOCK) for place in places), (size - footer, footer)]:
            file.seek(place)
            digest.update(file.read(length))
    return digest.hexdigest()


def images_of(files: Sequence[ParquetFile], cache: Path) -> Sequence[Encoded]:
    """The encoded images of all files by row, from copies in the cache, made where they are not there yet.

    Raises:
        MissingRequirement: the cache cannot be written.
        InputError: a file cannot be read.
    """
    from datasets import Dataset, concatenate_datasets

    copies = [_copy(file, cache) for file in files if file.rows]
    if not copies:
        return []
    return concatenate_datasets([Dataset.from_file(str(copy)) for copy in copies])["image"]


def _folder_of_paths(file: ParquetFile) -> str:
    """Where the paths of images without bytes are told from; empty where there are none."""
    with readable(file.path), pq.ParquetFile(file.path) as opened:
        first = next(opened.iter_batches(1, columns=[file.columns.image]), None)
    if first is None or not pa.types.is_struct(first.schema.types[0]) or first.column(0).field("bytes").null_count == 0:
        return ""
    return os.path.dirname(file.path)


def _copy(file: ParquetFile, cache: Path) -> Path:
    """The images of a file in Arrow's format, which is read at random without being loaded."""
    name = hashlib.sha256(f"{file.digest} {file.columns.image} {_folder_of_paths(file)}".encode())
    copy, field = cache / f"{name.hexdigest()[:32]}.arrow", pa.struct({"bytes": pa.binary(), "path": pa.string()})
    if copy.is_file():
        return copy
    draft = copy.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as opened, pa.ipc.new_stream(opened, pa.schema({"image": field})) as writer:
            for images in file._batches(None, BATCH):
                writer.write_batch(pa.record_batch([images.cast(field)], names=["image"]))
        draft.replace(copy)
    except OSError as error:
        raise MissingRequirement(
            f"data: the cache {cache} cannot be written ({first_line(error)}); name another folder by "
            "HF_DATASETS_CACHE, or make room."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return copy
