"""Sources: find the images and labels of a recipe's data, split them, and decode them into memory as uint8.

The only module that imports `datasets`. Streams stand beside this one and share `open_tables`.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from vit_rsst.data.catalog import CATALOG, LABEL_COLUMNS, SourceInfo
from vit_rsst.errors import EnvironmentLacks, InputError
from vit_rsst.seeds import derived_seed

SPLIT_NAMES = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}


@dataclass(frozen=True)
class DataOptions:
    """What to read and how to split it; the fields are those of a recipe's `data` section."""

    source: str
    path: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    val_fraction: float = 0.1
    test_fraction: float | None = None
    train_samples: int | None = None

    @property
    def info(self) -> SourceInfo:
        return CATALOG[self.source]

    @property
    def size(self) -> int:
        """Side of the images in px."""
        return self.image_size or self.info.image_size


@dataclass(frozen=True)
class Table:
    """One split as it lies on disk: encoded images (or arrays) and integer labels."""

    images: Sequence
    labels: np.ndarray
    classes: tuple[str, ...]
    identity: dict


@dataclass(frozen=True)
class Split:
    """Images in memory: uint8, shape (samples, 3, size, size); labels int64, shape (samples,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A source, opened and split but not yet decoded; `train`, `val` and `test` decode when first asked for.

    Attributes:
        rows: split name → (table, row numbers).
        classes: names of the classes, by label.
        identity: what tells this data from any other, for the record of the run.
    """

    options: DataOptions
    rows: dict[str, tuple[Table, np.ndarray]]
    classes: tuple[str, ...]
    identity: dict = field(repr=False)

    def count(self, split: str) -> int:
        return len(self.rows[split][1])

    def decode(self, split: str) -> Split:
        """Decodes one split into memory, on all cores."""
        table, rows = self.rows[split]
        size = self.options.size
        need = len(rows) * 3 * size * size
        free = psutil.virtual_memory().available
        if need > 0.7 * free:
            raise EnvironmentLacks(
                f"data: {len(rows):,} images at {size} px take {need / 2**30:.1f} GiB decoded, "
                f"and {free / 2**30:.1f} GiB of memory are free; use a part "
                "(data.train_samples) or smaller images (data.image_size)."
            )
        images = np.empty((len(rows), 3, size, size), dtype=np.uint8)

        def decode_one(i: int) -> None:
            images[i] = _decode(table.images[int(rows[i])], size, f"{split} row {int(rows[i])}")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(decode_one, range(len(rows)), chunksize=64))
        return Split(torch.from_numpy(images), torch.from_numpy(table.labels[rows].astype(np.int64)))

    @cached_property
    def train(self) -> Split:
        return self.decode("train")

    @cached_property
    def val(self) -> Split:
        return self.decode("val")

    @cached_property
    def test(self) -> Split:
        return self.decode("test")


def open_data(options: DataOptions, seed: int) -> ImageData:
    """Finds the tables of a source and splits them; nothing is decoded.

    The test split is the source's own, or a stratified share of train drawn once for all seeds. The validation split
    is drawn from the rest with `seed`.

    Raises:
        InputError: no such folder, no such column, a label out of range, an empty split.
        EnvironmentLacks: the Hub cannot be reached.
    """
    tables = open_tables(options)
    train = tables["train"]
    fraction = options.test_fraction or options.info.test_fraction
    rest = np.arange(len(train.labels))
    if options.info.test_split in tables and not options.test_fraction:
        test_table = tables[options.info.test_split]
        test = (test_table, np.arange(len(test_table.labels)))
    elif "validation" in tables and not options.test_fraction:  # folders name the split that scores `val` as often
        test = (tables["validation"], np.arange(len(tables["validation"].labels)))
    elif fraction:
        rest, held_out = _stratified(train.labels, fraction)
        test = (train, held_out)
    else:
        raise InputError(
            f"data: {options.path or options.source} has no split named {options.info.test_split!r} "
            f"(found: {', '.join(tables)}); set data.test_fraction=0.2 to hold out a part of train instead."
        )
    order = np.random.default_rng(derived_seed(seed, "validation split")).permutation(len(rest))
    num_val = round(options.val_fraction * len(rest))
    val, kept = rest[np.sort(order[:num_val])], order[num_val:]
    if options.train_samples is not None:
        if options.train_samples > len(kept):
            raise InputError(
                f"data.train_samples: {options.train_samples:,} asked, {len(kept):,} there after validation."
            )
        kept = kept[: options.train_samples]
    rows = {"train": (train, rest[np.sort(kept)]), "val": (train, val), "test": test}
    for name, (table, index) in rows.items():
        _check_labels(name, table, index)
        if table.classes != train.classes:
            raise InputError(
                f"data: the classes of train and {name} differ ({len(train.classes)}: {', '.join(train.classes[:3])}; "
                f"{len(table.classes)}: {', '.join(table.classes[:3])} …): a number means another class in each."
            )
    return ImageData(options, rows, train.classes, train.identity)


def open_tables(options: DataOptions) -> dict[str, Table]:
    """The splits of a source by name, `train` among them."""
    if options.path is None and options.source == "digits":
        return {"train": _digits(options.size)}
    return {name: _table(split, options) for name, split in _load_splits(options).items()}


def _digits(size: int) -> Table:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [
        np.asarray(Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR))
        for image in digits.images
    ]
    stacked = np.repeat(np.stack(images)[:, None], 3, axis=1)  # (samples, 3, size, size)
    identity = {"source": "scikit-learn digits", "rows": len(stacked)}
    return Table(stacked, digits.target, tuple(map(str, digits.target_names)), identity)


def _load_splits(options: DataOptions) -> dict[str, object]:
    """The splits as `datasets.Dataset`, from a local folder or from the Hub."""
    import datasets

    datasets.disable_progress_bars()
    if options.path is None:
        if options.info.hub_id is None:
            raise InputError(f"data.path: the source {options.source!r} needs the path of a local folder.")
        try:
            return dict(datasets.load_dataset(options.info.hub_id, revision=options.revision))
        except (OSError, RuntimeError, ValueError) as error:  # datasets and huggingface_hub raise all three
            raise EnvironmentLacks(
                f"data.source: {options.info.hub_id!r} cannot be read from the Hub ({_first_line(error)}). Check the "
                "network and, for gated sets, the token; or name a local copy with data.path=FOLDER."
            ) from error
    folder = Path(options.path).expanduser()
    if not folder.is_dir():
        raise InputError(f"data.path: there is no folder {options.path!r} (looked in {folder.resolve().parent}).")
    parquet: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        if split := SPLIT_NAMES.get(file.name.split("-")[0].split(".")[0]):
            parquet.setdefault(split, []).append(str(file))
    try:
        found = _parquet(parquet) if parquet else _class_folders(folder)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"data.path: {options.path} cannot be read ({_first_line(error.__cause__ or error)}); check its files."
        ) from error
    if "train" not in found:
        raise InputError(
            f"data.path: no training split in {options.path!r} (found: {', '.join(found) or 'nothing'}); expected "
            "parquet files train-*.parquet, or a folder train/ with one folder a class."
        )
    return found


def _parquet(files: dict[str, list[str]]) -> dict[str, object]:
    """One call a split: in one for all, the features of the first file stand for those of the others."""
    import datasets

    return {split: datasets.load_dataset("parquet", data_files={split: f}, split=split) for split, f in files.items()}


def _class_folders(folder: Path) -> dict[str, object]:
    import datasets

    parts = {SPLIT_NAMES[d.name]: d for d in sorted(folder.iterdir()) if d.is_dir() and d.name in SPLIT_NAMES}
    if not parts and any(child.is_dir() for child in folder.iterdir()):
        parts = {"train": folder}
    return {
        split: datasets.load_dataset("imagefolder", data_dir=str(d), split="train", drop_labels=False)
        for split, d in parts.items()
    }


def _table(split: object, options: DataOptions) -> Table:
    """Finds the image and the label column from the features."""
    from datasets import ClassLabel, Image

    features = split.features
    image = _column(features, Image, options.image_column, "image_column", options)
    label = options.label_column or LABEL_COLUMNS.get(options.source)
    label = _column(features, ClassLabel, label if label in features else options.label_column, "label_column", options)
    encoded = split.cast_column(image, Image(decode=False)).with_format(None)[image]
    # A missing label is None there, which no label of a class is; −1 is what the Hub's unlabelled splits hold.
    labels = np.asarray([-1 if value is None else value for value in split.with_format(None)[label]], dtype=np.int64)
    return Table(encoded, labels, tuple(features[label].names), _identity(split, options))


def _column(features: dict, kind: type, asked: str | None, field_name: str, options: DataOptions) -> str:
    candidates = [name for name, feature in features.items() if isinstance(feature, kind)]
    if asked is not None:
        if asked in candidates:
            return asked
        raise InputError(
            f"data.{field_name}: no such column {asked!r} in {options.path or options.source}; "
            f"candidates: {', '.join(candidates) or 'none'} of {', '.join(features)}."
        )
    if len(candidates) == 1:
        return candidates[0]
    raise InputError(
        f"data.{field_name}: {len(candidates)} columns of {options.path or options.source} hold a {kind.__name__} "
        f"({', '.join(candidates) or 'columns: ' + ', '.join(features)}); name the one to use."
    )


def _identity(split: object, options: DataOptions) -> dict:
    """Builder, rows and a fingerprint of the files: enough to see later whether the data were the same."""
    import datasets

    files = sorted({str(item["filename"]) for item in split.cache_files})
    digest = hashlib.sha256(repr((split.features, split.num_rows)).encode())
    for key in sorted(split.info.download_checksums or {}):
        digest.update(f"{os.path.basename(key)}".encode())
    for column in split.with_format("arrow")[:256].columns:
        digest.update(str(column[:16]).encode())
    return {
        "source": options.info.hub_id if options.path is None else str(Path(options.path).expanduser().resolve()),
        "revision": options.revision,
        "rows": split.num_rows,
        "sha256_of_head": digest.hexdigest(),
        "cache_files": len(files),
        "datasets": datasets.__version__,
    }


def decode_file(path: Path, options: DataOptions) -> np.ndarray:
    """An image file as uint8 (3, size, size), prepared as the images of the source are.

    Raises:
        InputError: the file cannot be read as an image.
    """
    from PIL import Image

    # The digits are enlarged more softly than photographs.
    resampling = Image.Resampling.BILINEAR if options.source == "digits" else Image.Resampling.BICUBIC
    return _decode({"bytes": None, "path": str(path)}, options.size, str(path), resampling)


def _decode(image: object, size: int, place: str, resampling: int = 3) -> np.ndarray:
    """One image as uint8 (3, size, size): RGB, upright, shorter side resized and centre cropped where the size differs.

    Args:
        resampling: of Pillow; 3 is bicubic.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(image, np.ndarray):
        return image
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as opened:
            ImageOps.exif_transpose(opened, in_place=True)  # as cameras mark it, and as `datasets` decodes it
            # 16 bits a pixel: Pillow would clip them at 255
            grey = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)) if opened.mode[0] == "I" else opened
            picture = grey.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, TypeError, ValueError, SyntaxError) as error:
        raise InputError(f"data: the image in {place} cannot be decoded ({_first_line(error)}).") from error
    if picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), resampling).crop((left, top, left + size, top + size))
    return np.asarray(picture).transpose(2, 0, 1)


def _stratified(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out), sorted, every class in proportion; the same for every seed of a run."""
    from sklearn.model_selection import train_test_split

    try:
        rest, held_out = train_test_split(
            np.arange(len(labels)), test_size=round(fraction * len(labels)), random_state=0, stratify=labels
        )
    except ValueError as error:
        raise InputError(f"data.test_fraction: the classes cannot be divided by {fraction:.3g} ({error}).") from error
    return np.sort(rest), np.sort(held_out)


def _check_labels(name: str, table: Table, rows: np.ndarray) -> None:
    if not len(rows):
        raise InputError(f"data: the {name} split is empty; check data.val_fraction and data.test_fraction.")
    wrong = rows[(table.labels[rows] < 0) | (table.labels[rows] >= len(table.classes))]
    if len(wrong):
        raise InputError(
            f"data: label {table.labels[wrong[0]]} in row {wrong[0]} of the {name} split is not among the "
            f"{len(table.classes)} classes ({len(wrong)} such rows)."
        )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
