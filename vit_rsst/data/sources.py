"""Opens a source and splits it into train, val and test. Nothing is decoded here."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import getitem
from pathlib import Path

import numpy as np

from vit_rsst.data.columns import renumbered
from vit_rsst.data.images import ImageData
from vit_rsst.data.locate import Found, Located, locate, locate_scored, read_by_datasets
from vit_rsst.data.options import DataOptions, Imbalance
from vit_rsst.data.streams import Stream, open_stream
from vit_rsst.data.tables import Rows, Table
from vit_rsst.errors import InputError
from vit_rsst.seeds import derived_seed


def open_data(options: DataOptions, seed: int, buffer: int = 4096) -> ImageData:
    """Finds the tables or streams of a source and splits them; nothing is decoded.

    The test split is the source's own, or a share of train drawn once for all seeds. The validation split is drawn
    from the rest: with `seed` from a table, by a hash of each row's id from a stream.

    Args:
        buffer: images that a stream is mixed with.

    Raises:
        InputError: no such folder, no such column, a label out of range, an empty split.
        MissingRequirement: the Hub cannot be reached.
    """
    found = _found(options)
    roles = decide_roles(options, found)
    return (
        _split_streams(options, found, roles, buffer) if found.is_stream else _split_tables(options, found, roles, seed)
    )


def match_classes(data: ImageData, split: str, classes: Sequence[str]) -> ImageData:
    """The data with the labels of a split as numbers of other classes, matched by name.

    Raises:
        InputError: it has images of a class that is not among them.
    """
    rows = data.rows[split]
    if tuple(classes) == data.classes:
        return data
    what = f"the {split} split"
    if isinstance(rows, Rows):
        labels = np.full(len(rows.table.labels), -1)
        labels[rows.index] = rows.table.labels[rows.index]
        labels = renumbered(labels, data.classes, classes, rows.table.place, what)
        matched = replace(rows, table=replace(rows.table, labels=labels, classes=tuple(classes)))
    elif rows.columns.labels is None:
        raise InputError(
            f"data: the classes of {what} differ, and those of a remote stream are matched by position only."
        )
    else:
        known = {
            file: renumbered(labels, data.classes, classes, lambda row, file=file: f"{file}, row {row}", what)
            for file, labels in rows.columns.labels.items()
        }
        matched = replace(rows, columns=replace(rows.columns, labels=known, classes=tuple(classes)))
    return replace(data, rows={**data.rows, split: matched}, classes=tuple(classes))


def open_tables(options: DataOptions) -> dict[str, Table]:
    """The splits of a source that is read at random, by `train`, `val` and `test`; not divided."""
    return _found(options).splits


def open_scored(options: DataOptions, seed: int, split: str, content: str | None = None) -> ImageData:
    """A split to score: as the source is divided for training, or all images of a folder without splits.

    Args:
        content: of the training split of the run, if known: a folder of the same images is divided as there.

    Raises:
        InputError: see `open_data`; no such split.
    """
    found = None if options.path is None else locate_scored(options, split)
    if found is None:
        return open_data(options, seed)
    table = found.splits[split]
    if options.test_fraction and content in (None, table.digest) and found.is_whole:
        return open_data(options, seed)
    rows = Rows(split, table, np.flatnonzero(table.labels >= 0))
    if not rows.count:
        raise InputError(f"data: {found.where[split]} has no labelled image.")
    told = f"{split:5} {rows.count:,} images, {_num_classes(rows)} classes, from {found.where[split]}"
    return ImageData(options, {split: rows}, table.classes, {"content": {split: table.digest}}, (told, *found.notes))


def _found(options: DataOptions) -> Found:
    if options.path is None and options.source == "digits":
        return Found({"train": _digits(options.size)}, {"train": "the embedded digits"})
    return locate(options)


@dataclass(frozen=True)
class Roles:
    """What the splits of a source are for.

    Attributes:
        test: the split that scores tickets; None: a share of train.
        val: the validation split; None: a share of train.
        notes: what follows from that.
    """

    test: str | None
    val: str | None
    notes: list[str] = field(default_factory=list)


def decide_roles(options: DataOptions, found: Found) -> Roles:
    """Which split scores and which validates.

    A test split scores and a validation split validates. Without a test split, the validation split scores, and
    validation images are held out of train; so for ImageNet-1k, whose test split has no public labels.
    `data.test_fraction` holds the test images out of train instead.

    Raises:
        InputError: nothing scores, or it is not plain what does.
    """
    where, there, notes = found.where, found.splits, []
    if options.test_fraction:
        if "val" in there and "test" not in there and not found.named:
            raise InputError(
                f"data.test_fraction: {where['val']} is a split of its own and scores, unless it is named as the "
                "validation split: leave data.test_fraction out, or set data.splits={train: GLOB, val: GLOB}."
            )
        test, val = None, "val" if "val" in there else None
    elif "val" in there and ("test" not in there or options.info.test_split == "validation"):
        test, val = "val", None
        notes.append(f"{where['val']} scores; validation images are held out of {where['train']}")
    elif "test" in there:
        test, val = "test", "val" if "val" in there else None
    elif options.test_share:
        return Roles(None, None)
    else:
        more = f" ({'; '.join(found.notes)})" if found.notes else ""
        raise InputError(
            f"data: {options.where} has no labelled split named {options.info.test_split!r} (found: "
            f"{', '.join(where.values())}){more}; set data.test_fraction=0.2 to hold out a part of train instead, or "
            "name the files by data.splits."
        )
    if "test" in there and test != "test":
        notes.append(f"not read: {where['test']} (the test images are {where[test] if test else 'held out of train'})")
    if val and options.val_fraction is not None:
        notes.append(f"data.val_fraction has no effect: {where[val]} is the validation split")
    return Roles(test, val, notes)


def _split_tables(options: DataOptions, found: Found, roles: Roles, seed: int) -> ImageData:
    train, notes = found.splits["train"], []
    _check_train(train.labels, train.classes)
    whole = {name: Rows(name, table, np.arange(len(table.labels))) for name, table in found.splits.items()}
    rest = whole["train"].index
    if roles.test:
        test = replace(whole[roles.test], name="test")
    else:
        rest, held_out = _stratified(train.labels, options.test_share)
        test = Rows("test", train, held_out)
    kept = np.random.default_rng(derived_seed(seed, "validation split")).permutation(len(rest))
    if roles.val:
        val = whole[roles.val]
    else:
        chosen, kept = _validation(train.labels[rest], kept, round(options.val_share * len(rest)), notes)
        val = Rows("val", train, rest[chosen])
    if options.train_samples is not None:
        if options.train_samples > len(kept):
            raise InputError(
                f"data.train_samples: {options.train_samples:,} asked, {len(kept):,} there after validation."
            )
        kept = kept[: options.train_samples]
    kept = kept[_imbalanced(train.labels[rest[kept]], len(train.classes), options.imbalance)]
    rows = {"train": Rows("train", train, rest[np.sort(kept)]), "val": val, "test": test}
    for name, part in rows.items():
        if not part.count:
            raise _empty(name)
    return ImageData(options, rows, train.classes, _identity(options, found, roles), _told(rows, found, roles, notes))


def _validation(labels: np.ndarray, order: np.ndarray, number: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(validation rows, sorted; training rows, in the order drawn), as positions of `labels`.

    The first of the order validate; where that would leave a class without a training image, its last one stays.
    """
    val, kept = order[:number], order[number:]
    lost = np.setdiff1d(labels, labels[kept])
    if len(lost):
        staying = np.array([np.flatnonzero(labels[val] == label)[-1] for label in lost])
        kept = np.concatenate([kept, val[staying]])
        val = np.delete(val, staying)
        notes.append(
            f"{len(lost)} classes have so few images that all would validate; one of each stays in train: the "
            f"validation split has {len(val):,} images instead of {number:,}"
        )
    return np.sort(val), kept


def _told(rows: dict, found: Found, roles: Roles, notes: Sequence[str] = ()) -> tuple[str, ...]:
    """A line for each split, and for what is not read."""
    sources = {"train": "train", "val": roles.val, "test": roles.test}
    fields = {"val": "data.val_fraction", "test": "data.test_fraction"}
    lines = []
    for name, source in sources.items():
        where = f"from {found.where[source]}" if source else f"held out of {found.where['train']} ({fields[name]})"
        count = rows[name].count
        number = "images" if count is None else f"{count:,} images"
        lines.append(f"{name:5} {number}, {_num_classes(rows[name])} classes, {where}")
    return (*lines, *found.notes, *roles.notes, *notes)


def _num_classes(rows: Rows | Stream) -> int:
    return len(np.unique(rows.table.labels[rows.index])) if isinstance(rows, Rows) else len(rows.columns.classes)


def _identity(options: DataOptions, found: Found, roles: Roles) -> dict:
    """What tells this data from any other later: content by split, wherever it lies; and where it was found."""
    train = found.splits["train"]
    content = {name: found.splits[name].digest for name in filter(None, ("train", roles.val, roles.test))}
    published = options.info.hub_id or "scikit-learn digits"
    return {
        "source": str(Path(options.path).expanduser().resolve()) if options.path else published,
        "revision": options.revision,
        "rows": len(train.labels) if isinstance(train, Table) else train.num_rows,
        "content": content,
        "sha256": hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest(),
        "validation": "val" if roles.val else "train",
    }


def _imbalanced(labels: np.ndarray, num_classes: int, imbalance: Imbalance) -> np.ndarray:
    """Positions that stay, in order: of each class its first ones, as many as the imbalance leaves it."""
    if imbalance.kind is None:
        return np.arange(len(labels))
    places = [np.flatnonzero(labels == c) for c in range(num_classes)]
    counts = imbalance.counts(max(map(len, places)), num_classes)
    return np.sort(np.concatenate([place[:count] for place, count in zip(places, counts, strict=True)]))


def _split_streams(options: DataOptions, found: Found, roles: Roles, buffer: int) -> ImageData:
    """Train is streamed without the rows held out, which are read once into a table of the cache."""
    train, classes = found.splits["train"], found.splits["train"].columns.classes
    if train.columns.labels is not None:
        _check_train(np.concatenate(list(train.columns.labels.values())), classes)
    if len(classes) < 2:
        raise _one_class(classes[0])

    opened = open_stream(train, train.columns, train.root, (0.0, 1.0), buffer)

    def part(begin: float, end: float) -> Stream:
        return replace(opened, part=(begin, end))

    def whole(name: str, split: Table | Located) -> Rows | Stream:
        if isinstance(split, Table):
            return Rows(name, split, np.arange(len(split.labels)))
        return open_stream(split, split.columns, split.root, (0.0, 1.0), buffer)

    begin, rows = 0.0, {}
    if roles.test:
        rows["test"] = whole("test", found.splits[roles.test])
    else:
        begin = options.test_share
        rows["test"] = _held_out("test", part(0.0, begin), train)
    end = begin
    if roles.val:
        rows["val"] = whole("val", found.splits[roles.val])
    else:
        end = begin + options.val_share * (1.0 - begin)
        rows["val"] = _held_out("val", part(begin, end), train)
    rows["train"] = part(end, 1.0)
    for name, split in rows.items():
        if split.count == 0:
            raise _empty(name)
    return ImageData(options, rows, classes, _identity(options, found, roles), _told(rows, found, roles))


def _held_out(name: str, stream: Stream, located: Located) -> Rows:
    """The rows of a stream's part as a table, encoded, in the cache of `datasets`: read once for all runs."""
    from datasets import Dataset, Features, Image, Value

    features = Features({"image": Image(decode=False), "label": Value("int64"), "place": Value("string")})
    # Other files, other columns, another part: another table.
    known = repr((located.digest, stream.columns, stream.part))
    fingerprint = hashlib.sha256(known.encode()).hexdigest()[:32]
    with read_by_datasets(f"the {name} split"):
        held = Dataset.from_generator(_as_rows, features, gen_kwargs={"stream": stream}, fingerprint=fingerprint)
    places = held["place"]
    table = Table(
        held["image"],
        np.asarray(held["label"][:], dtype=np.int64),
        stream.columns.classes,
        located.digest,
        partial(getitem, places),
    )
    return Rows(name, table, np.arange(len(table.labels)))


def _as_rows(stream: Stream) -> Iterator[dict]:
    for sample in stream.walk(None):
        yield {"image": sample.image, "label": sample.label, "place": sample.place}


def _digits(size: int) -> Table:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [
        np.asarray(Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR))
        for image in digits.images
    ]
    stacked = np.repeat(np.stack(images)[:, None], 3, axis=1)  # (samples, 3, size, size)
    digest = hashlib.sha256(stacked.tobytes()).hexdigest()
    return Table(stacked, digits.target, tuple(map(str, digits.target_names)), digest, "digit {}".format)


def _stratified(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out), sorted, every class in proportion; the same for every seed of a run."""
    from sklearn.model_selection import train_test_split

    try:
        rest, held_out = train_test_split(
            np.arange(len(labels)), test_size=round(fraction * len(labels)), random_state=0, stratify=labels
        )
    except ValueError as error:
        raise InputError(
            f"data.test_fraction: {fraction:.3g} of {len(labels):,} images cannot hold every class (the smallest has "
            f"{np.bincount(labels).min()} of them); add a test split, or leave such classes out."
        ) from error
    return np.sort(rest), np.sort(held_out)


def _check_train(labels: np.ndarray, classes: Sequence[str]) -> None:
    """There is something to tell apart.

    Raises:
        InputError: there are no images, or all are of one class.
    """
    there = np.unique(labels)
    if not len(there):
        raise _empty("train")
    if len(there) == 1:
        raise _one_class(classes[there[0]])


def _one_class(name: str) -> InputError:
    return InputError(
        f"data: all training images are of one class, {name!r}: there is nothing to tell apart; expected at least two, "
        "as one folder a class, or another data.label_column."
    )


def _empty(name: str) -> InputError:
    ways_out = {
        "train": "hold out less with data.val_fraction or data.test_fraction",
        "val": "hold out more of train, as with data.val_fraction=0.2",
        "test": "hold out a part of train instead, as with data.test_fraction=0.2",
    }
    return InputError(f"data: the {name} split is empty; {ways_out[name]}, or bring more images.")
