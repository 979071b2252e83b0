"""Opens a source and splits it into train, val and test. Nothing is decoded here."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from vit_rsst.data.images import ImageData
from vit_rsst.data.locate import Located, columns, identity, locate
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
    if options.path is None and options.source == "digits":
        return _split_tables(options, {"train": _digits(options.size)}, seed)
    found = locate(options)
    if found["train"].is_stream:
        return _split_streams(options, found, buffer)
    return _split_tables(options, {name: _table(split, options) for name, split in found.items()}, seed)


def open_tables(options: DataOptions) -> dict[str, Table]:
    """The splits of a source by name, `train` among them."""
    if options.path is None and options.source == "digits":
        return {"train": _digits(options.size)}
    return {name: _table(split, options) for name, split in locate(options).items()}


def _test_split(options: DataOptions, found: Sequence[str]) -> str | None:
    """The split that scores tickets; None: a share of train.

    Raises:
        InputError: there is neither.
    """
    if options.test_fraction:
        return None
    for name in (options.info.test_split, "validation"):  # folders name the split that scores `val` as often
        if name in found:
            return name
    if options.test_share:
        return None
    raise InputError(
        f"data: {options.where} has no split named {options.info.test_split!r} "
        f"(found: {', '.join(found)}); set data.test_fraction=0.2 to hold out a part of train instead."
    )


def _split_tables(options: DataOptions, tables: dict[str, Table], seed: int) -> ImageData:
    train = tables["train"]
    rest = np.arange(len(train.labels))
    if name := _test_split(options, list(tables)):
        test = Rows("test", tables[name], np.arange(len(tables[name].labels)))
    else:
        rest, held_out = _stratified(train.labels, options.test_share)
        test = Rows("test", train, held_out)
    order = np.random.default_rng(derived_seed(seed, "validation split")).permutation(len(rest))
    num_val = round(options.val_share * len(rest))
    val, kept = rest[np.sort(order[:num_val])], order[num_val:]
    if options.train_samples is not None:
        if options.train_samples > len(kept):
            raise InputError(
                f"data.train_samples: {options.train_samples:,} asked, {len(kept):,} there after validation."
            )
        kept = kept[: options.train_samples]
    _check_rows(Rows("train", train, rest[kept]))
    kept = kept[_imbalanced(train.labels[rest[kept]], len(train.classes), options.imbalance)]
    rows = {"train": Rows("train", train, rest[np.sort(kept)]), "val": Rows("val", train, val), "test": test}
    for part in rows.values():
        _check_rows(part)
        _check_classes(train.classes, part.name, part.table.classes)
    return ImageData(options, rows, train.classes, train.identity)


def _imbalanced(labels: np.ndarray, num_classes: int, imbalance: Imbalance) -> np.ndarray:
    """Positions that stay, in order: of each class its first ones, as many as the imbalance leaves it."""
    if imbalance.kind is None:
        return np.arange(len(labels))
    places = [np.flatnonzero(labels == c) for c in range(num_classes)]
    counts = imbalance.counts(max(map(len, places)), num_classes)
    return np.sort(np.concatenate([place[:count] for place, count in zip(places, counts, strict=True)]))


def _split_streams(options: DataOptions, found: dict[str, Located], buffer: int) -> ImageData:
    """Train is streamed without the rows held out, which are read once into a table of the cache."""
    train, root = found["train"], options.path
    meant = columns(train.rows.features, options)
    begin, rows = 0.0, {}
    if name := _test_split(options, list(found)):
        theirs = columns(found[name].rows.features, options)
        _check_classes(meant.classes, "test", theirs.classes)
        rows["test"] = open_stream(found[name], theirs, root, (0.0, 1.0), buffer)
    else:
        begin = options.test_share
        rows["test"] = _held_out("test", open_stream(train, meant, root, (0.0, begin), buffer), train, options)
    end = begin + options.val_share * (1.0 - begin)
    rows["val"] = _held_out("val", open_stream(train, meant, root, (begin, end), buffer), train, options)
    rows["train"] = open_stream(train, meant, root, (end, 1.0), buffer)
    if rows["train"].count == 0:
        raise _empty("train")
    return ImageData(options, rows, meant.classes, identity(train, options))


def _held_out(name: str, stream: Stream, located: Located, options: DataOptions) -> Rows:
    """The rows of a stream's part as a table, encoded, in the cache of `datasets`: read once for all runs."""
    from datasets import Dataset, Features, Image, Value

    known = identity(located, options)
    features = Features({"image": Image(decode=False), "label": Value("int64")})
    # Other files, other columns, another part: another table.
    fingerprint = hashlib.sha256(repr((known["sha256"], stream.columns, stream.part)).encode()).hexdigest()[:32]
    held = Dataset.from_generator(_as_rows, features, gen_kwargs={"stream": stream}, fingerprint=fingerprint)
    table = Table(held["image"], np.asarray(held["label"][:], dtype=np.int64), stream.columns.classes, known)
    rows = Rows(name, table, np.arange(len(table.labels)))
    _check_rows(rows)
    return rows


def _as_rows(stream: Stream) -> Iterator[dict]:
    for sample in stream.walk(None):
        yield {"image": sample.image, "label": sample.label}


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


def _table(located: Located, options: DataOptions) -> Table:
    from datasets import Image

    meant = columns(located.rows.features, options)
    plain = located.rows.cast_column(meant.image, Image(decode=False)).with_format(None)
    # A missing label is None there, which no label of a class is; −1 is what the Hub's unlabelled splits hold.
    labels = np.asarray([-1 if value is None else value for value in plain[meant.label]], dtype=np.int64)
    return Table(plain[meant.image], labels, meant.classes, identity(located, options))


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


def _check_classes(train: tuple[str, ...], name: str, theirs: tuple[str, ...]) -> None:
    if theirs != train:
        raise InputError(
            f"data: the classes of train and {name} differ ({len(train)}: {', '.join(train[:3])}; "
            f"{len(theirs)}: {', '.join(theirs[:3])} …): a number means another class in each."
        )


def _empty(name: str) -> InputError:
    ways_out = {
        "train": "hold out less with data.val_fraction or data.test_fraction",
        "val": "hold out more of train, as with data.val_fraction=0.2",
        "test": "hold out a part of train instead, as with data.test_fraction=0.2",
    }
    return InputError(f"data: the {name} split is empty; {ways_out[name]}, or bring more images.")


def _check_rows(rows: Rows) -> None:
    if not rows.count:
        raise _empty(rows.name)
    labels = rows.table.labels[rows.index]
    wrong = rows.index[(labels < 0) | (labels >= len(rows.table.classes))]
    if len(wrong):
        raise InputError(
            f"data: label {rows.table.labels[wrong[0]]} in row {wrong[0]} of the {rows.name} split is not among the "
            f"{len(rows.table.classes)} classes ({len(wrong)} such rows)."
        )
