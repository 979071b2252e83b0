"""Which column holds the image and which the label, and what the values of a label column mean.

Numbers of classes are what every reader above works with. They come from `ClassLabel` columns (matched by name, so that
files and splits may order their names differently), from text (the classes of the training split, sorted), and from
integers, booleans and floats that are whole, whose number of classes `data.num_classes` says.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from vit_rsst.data.catalog import LABEL_COLUMNS
from vit_rsst.data.options import DataOptions
from vit_rsst.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

LABEL_NAMES = ("label", "labels", "class", "target", "category", "fine_label")
"""Names by which a column of plain values is taken for the labels, the first that is there."""

IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
"""Likewise for a column of raw bytes."""


MISSING = -1
"""A label that is not there; the Hub's unlabelled splits hold it as well."""


@dataclass(frozen=True)
class Columns:
    """Which column holds what.

    Attributes:
        image, label: their names.
        classes: names of the classes, by label; empty where they are not known from the columns alone.
        kind: of the labels: `names` (a ClassLabel), `text`, `int`, `bool` or `float`.
        labels: of each local parquet file by its path, int64 (rows,): numbers of `classes`, whatever the column holds;
            None where they are known only once a row is read.
    """

    image: str
    label: str
    classes: tuple[str, ...]
    kind: str = "names"
    labels: Mapping[str, np.ndarray] | None = field(default=None, compare=False, repr=False)


def features_of(schema: "pa.Schema") -> "Features":
    """Features of a file; those that the Hub wrote beside it, as far as they can be read."""
    from datasets import Features

    try:
        return Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, AttributeError, json.JSONDecodeError):
        return Features.from_arrow_schema(schema.remove_metadata())


def find_columns(features: "Features | None", options: DataOptions, where: str | None = None) -> Columns:
    """Finds the image and the label column.

    Args:
        where: what a message calls the data.

    Raises:
        InputError: none or several fit, or labels are plain numbers and there is no `data.num_classes`.
    """
    features, where = dict(features or {}), where or options.where
    features = {name: feature for name, feature in features.items() if not name.startswith("__")}
    image = _image_column(features, options, where)
    label = _label_column({n: f for n, f in features.items() if n != image}, options, where)
    kind = _label_kind(features[label])
    if kind == "names":
        classes = tuple(features[label].names)
        if options.num_classes and options.num_classes != len(classes):
            raise InputError(
                f"data.num_classes: {options.num_classes} asked, and {label!r} of {where} names {len(classes)}; leave "
                "it out."
            )
        return Columns(image, label, classes)
    if kind == "text":
        return Columns(image, label, (), kind)
    number = 2 if kind == "bool" else options.num_classes
    if number is None:
        raise InputError(
            f"data.num_classes: {label!r} of {where} holds {_said(features[label])}, plain numbers without names; set "
            "how many classes there are."
        )
    return Columns(image, label, tuple(map(str, range(number))), kind)


def _image_column(features: dict, options: DataOptions, where: str) -> str:
    real = [name for name, feature in features.items() if _is_image(feature)]
    raw = [name for name, feature in features.items() if _is_raw(feature)]
    if (asked := options.image_column) is not None:
        if asked in (*real, *raw):
            return asked
        if asked in features:
            raise InputError(
                f"data.image_column: {asked!r} of {where} holds {_said(features[asked])}, not images; expected encoded "
                f"image files ({', '.join((*real, *raw)) or 'there are none'}). Write them as such, as with "
                "`datasets`: dataset.cast_column(NAME, datasets.Image()).to_parquet(FILE)."
            )
        raise InputError(
            f"data.image_column: no such column {asked!r} in {where}; candidates: {', '.join((*real, *raw)) or 'none'} "
            f"of {', '.join(features)}."
        )
    fitting = real or [name for name in IMAGE_NAMES if name in raw][:1] or raw
    if len(fitting) == 1:
        return fitting[0]
    raise InputError(
        f"data.image_column: {len(fitting)} columns of {where} hold images ({_columns_text(features, fitting)}); "
        + ("name the one to use." if fitting else "expected an Image() of `datasets`, or the bytes of image files.")
    )


def _label_column(features: dict, options: DataOptions, where: str) -> str:
    kinds = {name: kind for name, feature in features.items() if (kind := _label_kind(feature))}
    if (asked := options.label_column) is not None:
        if asked in kinds:
            return asked
        if asked in features:
            raise InputError(
                f"data.label_column: {asked!r} of {where} holds {_said(features[asked])}, not labels; expected a "
                f"ClassLabel, text, integers or booleans (candidates: {', '.join(kinds) or 'none'})."
            )
        raise InputError(
            f"data.label_column: no such column {asked!r} in {where}; candidates: {', '.join(kinds) or 'none'} of "
            f"{', '.join(features)}."
        )
    named = [name for name, kind in kinds.items() if kind == "names"]
    if (habit := LABEL_COLUMNS.get(options.source)) in named:
        return habit
    plain = [name for name in LABEL_NAMES if name in kinds][:1]
    numbers = [name for name, kind in kinds.items() if kind in ("int", "bool")] if options.num_classes else []
    fitting = named or plain or numbers
    if len(fitting) == 1:
        return fitting[0]
    rest = "" if fitting else ", and set data.num_classes where labels are plain numbers"
    raise InputError(
        f"data.label_column: {len(fitting)} columns of {where} hold a label ({_columns_text(features, fitting)}); name "
        f"the one to use{rest}."
    )


def _columns_text(features: dict, fitting: Sequence[str]) -> str:
    if fitting:
        return ", ".join(fitting)
    return "columns: " + (", ".join(f"{name} holds {_said(feature)}" for name, feature in features.items()) or "none")


def _is_image(feature: object) -> bool:
    from datasets import Image

    return isinstance(feature, Image)


def _is_raw(feature: object) -> bool:
    """Bytes of image files: as they are, or beside their path."""
    from datasets import Value

    if isinstance(feature, dict):
        return isinstance(feature.get("bytes"), Value) and "binary" in feature["bytes"].dtype
    return isinstance(feature, Value) and "binary" in feature.dtype


def _label_kind(feature: object) -> str | None:
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        return "names"
    if not isinstance(feature, Value):
        return None
    words = {"string": "text", "int": "int", "bool": "bool", "float": "float"}  # uint8 and large_string too
    return next((kind for word, kind in words.items() if word in feature.dtype), None)


def _said(feature: object) -> str:
    dtype = getattr(feature, "dtype", None)
    words = {"string": "text", "large_string": "text", "binary": "bytes", "large_binary": "bytes", "float64": "floats"}
    if isinstance(feature, dict):
        return f"a struct of {', '.join(feature)}"
    return words.get(dtype) or (dtype if isinstance(dtype, str) and dtype != "dict" else type(feature).__name__)


# -- values


def read_labels(
    column: "pa.ChunkedArray", columns: Columns, place: Callable[[int], str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers, and the names that they index: those of the columns, or the sorted texts.

    Args:
        place: what a message calls a row.

    Returns:
        int64 (rows,), −1 where there is none; the classes.

    Raises:
        InputError: a float that is not whole.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if columns.kind == "text":
        texts = column.cast(pa.string()).combine_chunks()
        texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
        names = sorted(text for text in pc.unique(texts).to_pylist() if text is not None)
        found = pc.index_in(texts, value_set=pa.array(names, pa.string()))
        return np.asarray(pc.fill_null(found, MISSING), dtype=np.int64), tuple(names)
    if columns.kind == "float":
        values = np.asarray(pc.fill_null(column, float("nan")), dtype=np.float64)
        fractions = np.flatnonzero(np.isfinite(values) & (values != np.rint(values)))
        if len(fractions):
            raise InputError(
                f"data.label_column: {columns.label!r} holds floats, and {values[fractions[0]]} in "
                f"{place(int(fractions[0]))} is not whole; expected the number of a class."
            )
        return np.where(np.isfinite(values), values, MISSING).astype(np.int64), columns.classes
    numbers = pc.fill_null(column.cast(pa.int64()), MISSING)
    return np.asarray(numbers, dtype=np.int64), columns.classes


def renumbered(
    labels: np.ndarray, names: Sequence[str], classes: Sequence[str], place: Callable[[int], str], what: str
) -> np.ndarray:
    """Labels that index `names` as labels that index `classes`, matched by name.

    Args:
        what: what a message calls these labels, such as "the val split".

    Raises:
        InputError: an image of a class that is not among `classes`.
    """
    if tuple(names) == tuple(classes):
        return labels
    numbers = {name: i for i, name in enumerate(classes)}
    table = np.array([*(numbers.get(name, MISSING) for name in names), MISSING], dtype=np.int64)
    inside = (labels >= 0) & (labels < len(names))
    strange = np.flatnonzero(inside & (table[np.where(inside, labels, -1)] == MISSING))
    if len(strange):
        name = names[labels[strange[0]]]
        raise InputError(
            f"data: the classes of {what} and of train differ: {name!r} ({place(int(strange[0]))}) is not among the "
            f"{len(classes)} of train ({', '.join(classes[:3])} …); rename it, or leave it out."
        )
    return np.where(inside, table[np.where(inside, labels, -1)], labels)


def check_labels(labels: np.ndarray, columns: Columns, place: Callable[[int], str]) -> None:
    """Every label is there and is the number of a class.

    Raises:
        InputError: one is missing or out of range; says its file and row.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= len(columns.classes)))
    if not len(wrong):
        return
    first = int(wrong[0])
    number = f" ({len(wrong):,} such rows)" if len(wrong) > 1 else ""
    if labels[first] == MISSING:
        raise InputError(f"data: the label in {place(first)} is missing{number}; add it, or leave the row out.")
    if columns.kind == "names":
        way_out = "correct the row"
    else:
        way_out = f"labels are 0 … {len(columns.classes) - 1}: correct the row, or data.num_classes"
    raise InputError(
        f"data: label {labels[first]} in {place(first)} is not among the {len(columns.classes)} classes{number}; "
        f"{way_out}."
    )


def exactly(columns: Columns, options: DataOptions) -> DataOptions:
    """The options for the further files of a split, which hold the same columns."""
    return replace(options, image_column=columns.image, label_column=columns.label)
