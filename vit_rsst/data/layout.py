"""Which file belongs to which split: decided once, by the rules below, from the tree alone.

A split is named by a word: train, training, trainset, trn; val, valid, validation, validate, dev, eval, evaluation,
valset; test, testing, testset; in any case, and with set, data, images or a number beside it (`Training_set`,
`train2017`).

*Shards* (parquet, else tars) belong to the split that is the last word of their name before the shard's number
(`cifar-train-00000-of-00008.parquet`), else to that of the nearest folder of such a name (`train/0000.parquet`).
*Class folders* are split where the root has a training folder of class folders; otherwise, the folders of the root are
the classes of one training split. Below a split, the first folder is the class. A folder of images with a
`metadata.csv` or `metadata.jsonl` is a split as well, and so is a folder that `save_to_disk` wrote.

Where two readings are plausible, the folder is refused with the ways out; what is not read is said. `data.splits` names
folders or files by glob instead.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vit_rsst.data.tree import Tree, joined, shown
from vit_rsst.errors import InputError

SPLITS = ("train", "val", "test")
WORDS = {
    **dict.fromkeys(("train", "training", "trainset", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "valset", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
}
FILLERS = {"set", "data", "dataset", "images", "image", "imgs", "split", "partial"}
"""Words that say nothing beside the name of a split."""

METADATA = ("metadata.csv", "metadata.jsonl")
SHARDS = (".parquet", ".tar")
SHARD_NUMBER = re.compile(r"[-_. ]+(\d+|of|c\d+|[0-9a-f]{8,}|[0-9a-f]{4}|part|snappy|shard)$")
WAY_OUT = "name them by data.splits={train: GLOB, val: GLOB, test: GLOB}"


@dataclass(frozen=True)
class Part:
    """The files of one split.

    Attributes:
        kind: `folders` of classes, `metadata` beside images, `.parquet` or `.tar` shards, or `disk` (save_to_disk).
        paths: from the root: folders of a split of class folders, or files in their order.
        where: what a person calls them.
    """

    kind: str
    paths: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Layout:
    """The splits of a tree.

    Attributes:
        parts: by `train`, `val` or `test`; never empty.
        notes: a line for each kind of thing that is there and is not read, or that was a guess.
        named: whether `data.splits` decided.
    """

    tree: Tree
    parts: dict[str, Part]
    notes: list[str] = field(default_factory=list)
    named: bool = False


def split_word(name: str) -> str | None:
    """The split that a folder's name means; None: it is no name of a split."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    kept = [word for word in words if word not in FILLERS]
    return WORDS.get(kept[0]) if len(kept) == 1 else None


def shard_split(path: str) -> str | None:
    """The split of a shard, by its name or else its folders."""
    *folders, name = path.split("/")
    word = _family(name).rsplit("\0", 1)[-1]
    return WORDS.get(word) or next(filter(None, map(split_word, reversed(folders))), None)


def _family(name: str) -> str:
    """A shard's name without its number and suffix, in lower case, its words parted by zero bytes."""
    stem = os.path.splitext(name.lower())[0]
    while (shorter := SHARD_NUMBER.sub("", stem)) != stem:
        stem = shorter
    words = [word for word in re.split(r"[-_. ]+", stem.rstrip("0123456789")) if word]
    while len(words) > 1 and words[-1] in FILLERS:
        words.pop()
    return "\0".join(words)


def find_layout(tree: Tree, splits: Mapping[str, str] | None = None, is_scored: bool = False) -> Layout:
    """The splits of a dataset folder, with or without a training split.

    Args:
        splits: `data.splits`.
        is_scored: whether its images are only scored, so that one class is enough.

    Raises:
        InputError: two readings are plausible, or there is nothing to read.
    """
    if splits:
        return _by_glob(tree, splits)
    top = tree.folders[""]
    if "dataset_dict.json" in top.kept:
        names = {name: split_word(name) for name in tree.inside("")}
        parts = _one_folder_each(tree, {name: split for name, split in names.items() if split}, "disk")
        return Layout(tree, parts, [f"not read: {name}/, whose name is no split" for name, s in names.items() if not s])
    if {"dataset_info.json", "state.json"} <= set(top.kept):
        return Layout(tree, {"train": Part("disk", ("",), "the folder that save_to_disk wrote")})
    shards = {suffix: _shards(tree, suffix) for suffix in SHARDS}
    for suffix, (parts, notes) in shards.items():
        if "train" not in parts:
            continue
        other = next((s for s in SHARDS if s != suffix and "train" in shards[s][0]), None)
        if other is not None:
            raise _ambiguous(tree, f"it has training shards as *{suffix} and as *{other}")
        folders = _split_folders(tree)
        if any(split == "train" and tree.children(name) for name, split in folders.items()):
            raise _ambiguous(tree, f"it has training images as *{suffix} and as class folders")
        unread = [*notes, *(note for s in SHARDS if s != suffix for note in _unread_shards(tree, s))]
        return Layout(tree, parts, unread + _unread_folders(tree, tree.children("")) + _unread_files(tree, ("",)))
    layout = _class_folders(tree, is_scored)
    if layout is not None:
        layout.notes.extend(note for suffix in SHARDS for note in _unread_shards(tree, suffix))
        return layout
    for suffix, (parts, notes) in shards.items():
        files = [path for path in _files(tree, (suffix,)) if not shard_split(path)]
        if parts:
            return Layout(tree, parts, notes)
        if files and len({_family_of(path) for path in files}) == 1:
            where = f"{_pattern(files)}, the only {suffix.removeprefix('.')} files"
            return Layout(tree, {"train": Part(suffix, tuple(files), where)})
    return Layout(tree, {}, _unread_files(tree, ("",)) + [n for s in SHARDS for n in _unread_shards(tree, s)])


# -- shards


def _files(tree: Tree, suffixes: Sequence[str]) -> list[str]:
    """Shards below the root, sorted; none of hidden folders."""
    inside = tree.below("")
    return sorted(joined(path, name) for path, f in inside for name in f.kept if name.lower().endswith(tuple(suffixes)))


def _shards(tree: Tree, suffix: str) -> tuple[dict[str, Part], list[str]]:
    files, unread = {}, []
    for path in _files(tree, (suffix,)):
        if split := shard_split(path):
            files.setdefault(split, []).append(path)
        else:
            unread.append(path)
    if "train" in files:
        for split, paths in files.items():
            _check_shards(tree, split, paths)
    notes = [f"not read: {_listed(unread)} (no split in the name)"] if unread else []
    return {s: Part(suffix, tuple(files[s]), _pattern(files[s])) for s in SPLITS if s in files}, notes


def _unread_shards(tree: Tree, suffix: str) -> list[str]:
    files = _files(tree, (suffix,))
    return [f"not read: {_listed(files)}"] if files else []


def _family_of(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, _family(name)


def _check_shards(tree: Tree, split: str, paths: list[str]) -> None:
    """One family of files, complete.

    Raises:
        InputError: copies or several configurations, or a shard is missing.
    """
    families: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        families.setdefault(_family_of(path), []).append(path)
    if len(families) > 1:
        shown_ones = " and ".join(_pattern(family) for family in list(families.values())[:3])
        raise _ambiguous(tree, f"{shown_ones} are different files of the {split} split: copies or configurations?")
    totals = {match[1] for path in paths if (match := re.search(r"-of-(\d+)", path.rpartition("/")[2]))}
    numbered = len([path for path in paths if re.search(r"-of-\d+", path.rpartition("/")[2])])
    if len(totals) > 1 or (totals and numbered != len(paths)):
        raise _ambiguous(tree, f"the shards of the {split} split ({_listed(paths)}) do not belong together")
    if totals and int(next(iter(totals))) != len(paths):
        total = next(iter(totals))
        raise InputError(
            f"data.path: {tree.root} has {len(paths)} of {int(total)} shards of the {split} split "
            f"({_listed(paths)}); complete them, or read those that are there: data.splits={{{split}: "
            f"'{_pattern(paths)}'}}."
        )


# -- class folders


def _split_folders(tree: Tree) -> dict[str, str]:
    """Folders of the root that hold images and are named like a split."""
    named = {name: split_word(name) for name in tree.children("")}
    return {name: split for name, split in named.items() if split}


def _class_folders(tree: Tree, is_scored: bool) -> Layout | None:
    """Splits of class folders (or of images with metadata); None: there are no image files at all."""
    live, named = tree.children(""), _split_folders(tree)
    if not live and not tree.folders[""].count:
        return None
    if _metadata(tree, ""):
        return _folder_layout(tree, {"train": Part("metadata", ("",), _metadata(tree, ""))}, [])
    trains = [name for name, split in named.items() if split == "train"]
    deep = any(tree.children(name) or _metadata(tree, name) for name in trains)
    if named and (deep or len(named) == len(live)):
        parts = _one_folder_each(tree, named, "folders")
        parts = {s: _checked_folder(tree, s, part) for s, part in parts.items()}
        unread = _unread_folders(tree, [name for name in live if name not in named])
        return _folder_layout(tree, parts, unread)
    if not live:
        raise InputError(
            f"data.path: {tree.root} holds {tree.folders[''].count:,} images and no folders; expected one folder a "
            "class, or a metadata.csv with the columns file_name and label."
        )
    if not is_scored:
        _check_classes_of(tree, "")
    notes = [f"not read: {tree.folders[''].count:,} images beside the class folders"] if tree.folders[""].count else []
    return _folder_layout(tree, {"train": Part("folders", ("",), "its class folders")}, notes)


def _one_folder_each(tree: Tree, named: Mapping[str, str], kind: str) -> dict[str, Part]:
    parts = {}
    for split in SPLITS:
        names = [name for name, word in named.items() if word == split]
        if len(names) > 1:
            raise _ambiguous(tree, f"{' and '.join(f'{shown(n)}/' for n in names)} could each be the {split} split")
        if names:
            parts[split] = Part(kind, (names[0],), f"{shown(names[0])}/")
    return parts


def _metadata(tree: Tree, path: str) -> str:
    """The path of the metadata in a folder; empty where there are none."""
    found = [name for name in METADATA if name in tree.folders[path].kept]
    if len(found) > 1:
        raise _ambiguous(tree, f"{joined(path, found[0])} and {joined(path, found[1])} could each name the labels")
    return joined(path, found[0]) if found else ""


def _checked_folder(tree: Tree, split: str, part: Part) -> Part | None:
    """The part, or one of metadata; with class folders that can only be meant one way, or none (unlabelled)."""
    [path] = part.paths
    if metadata := _metadata(tree, path):
        if len(tree.children(path)) > 1:
            raise _ambiguous(tree, f"{metadata} and the folders in {path}/ could each say the classes")
        return Part("metadata", part.paths, metadata)
    if split == "train" and not tree.children(path):
        raise InputError(
            f"data.path: {tree.root}/{shown(path)} holds {tree.folders[path].count:,} images and no folders; expected "
            "one folder a class, or a metadata.csv with the columns file_name and label."
        )
    if split == "train":
        _check_classes_of(tree, path)
    return part


def _check_classes_of(tree: Tree, path: str) -> None:
    """The folders in that one are its classes.

    Raises:
        InputError: they are more likely splits, configurations or hidden folders.
    """
    live = tree.children(path)
    place = f"{shown(path)}/" if path else ""
    if hidden := [name for name in tree.inside(path) if name.startswith(".") and _has_images(tree, path, name)]:
        raise InputError(
            f"data.path: {tree.root} has a hidden folder with images, {place}{shown(hidden[0])}; rename it if it is a "
            "class, else move it away."
        )
    _check_images_of(tree, path)
    inner = {name: set(tree.children(joined(path, name))) for name in live}
    if len(live) == 1:
        inside = joined(path, live[0])
        deeper = f"; its folder has {len(inner[live[0]])} of them: data.path={tree.root}/{shown(inside)}?" * (
            len(inner[live[0]]) > 1
        )
        raise InputError(
            f"data.path: {tree.root} has one class, {place}{shown(live[0])}; expected one folder a class and at least "
            f"two{deeper or '.'}"
        )
    shared = set.intersection(*inner.values())
    if {split_word(name) for name in shared} & {"train"}:
        raise _ambiguous(
            tree, f"each of {_listed(live)} has a folder for training; expected train/CLASS/, not CLASS/train/"
        )
    if len(shared) > 1 and all(names == shared for names in inner.values()):
        raise _ambiguous(
            tree,
            f"{_listed([joined(path, name) for name in live])} hold the same folders ({_listed(sorted(shared))}): "
            "configurations or folds, or classes?",
        )


def _check_images_of(tree: Tree, path: str) -> None:
    """Every class has images.

    Raises:
        InputError: one has none.
    """
    for name in tree.inside(path):
        place = joined(path, name)
        if name.startswith(".") or tree.images(place):
            continue
        others: Counter = Counter()
        for _, folder in tree.below(place):
            others.update(folder.others)
        found = f" ({', '.join(f'{count:,} {kind}' for kind, count in others.most_common(3))})" if others else ""
        raise InputError(
            f"data.path: the class {shown(name)!r} has no image: {tree.root}/{shown(place)} holds nothing that can be "
            f"read here{found}; add images in a format that Pillow reads, or remove the folder."
        )


def _has_images(tree: Tree, path: str, name: str) -> bool:
    return bool(tree.images(joined(path, name)))


def _folder_layout(tree: Tree, parts: dict[str, Part], notes: list[str]) -> Layout:
    """The layout, without unlabelled splits, and what a reader of its folders should know."""
    kept = {}
    classes = set(tree.children(parts["train"].paths[0])) if "train" in parts else set()
    for split, part in parts.items():
        own = set(tree.children(part.paths[0]))
        unlabelled = not own or (len(own) == 1 and classes and not own & classes)
        if part.kind == "folders" and split != "train" and unlabelled:
            number = tree.images(part.paths[0])
            notes.append(f"not read: {part.where} ({number:,} images without one folder a class: no labels)")
        else:
            kept[split] = part
    for part in kept.values():
        notes += _nested(tree, part) + _loose(tree, part)
    notes += _unread_files(tree, [path for part in kept.values() for path in part.paths])
    return Layout(tree, kept, notes)


def _nested(tree: Tree, part: Part) -> list[str]:
    if part.kind != "folders":
        return []
    for path in part.paths:
        for name in tree.children(path):
            if deeper := tree.children(joined(path, name)):
                example = joined(joined(path, name), deeper[0])
                return [f"folders within a class belong to it: {shown(example)} is {name!r}"]
    return []


def _loose(tree: Tree, part: Part) -> list[str]:
    if part.kind != "folders" or part.paths == ("",):
        return []
    loose = [(path, tree.folders[path].count) for path in part.paths if tree.folders[path].count]
    return [f"not read: {count:,} images in {shown(path)}/ beside its class folders" for path, count in loose]


def _unread_folders(tree: Tree, names: Iterable[str]) -> list[str]:
    counts = {name: tree.images(name) for name in names}
    return [
        f"not read: {shown(name)}/ ({count:,} images; its name is no split)" for name, count in counts.items() if count
    ]


def _unread_files(tree: Tree, paths: Sequence[str]) -> list[str]:
    """A line for each kind of file in the root and below `paths` that is no image."""
    counts: Counter = Counter()
    seen = {""} | {place for path in paths for place, _ in tree.below(path)}
    for place in seen:
        counts.update(tree.folders[place].others)
    if not counts:
        return []
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common(8))
    return [f"not read: {kinds} (not images here)"]


# -- named by the recipe


def _by_glob(tree: Tree, splits: Mapping[str, str]) -> Layout:
    parts = {}
    everything = [*(path for path, _ in tree.below("")), *_files(tree, SHARDS)]
    for split in SPLITS:
        if split not in splits:
            continue
        pattern = splits[split]
        short = re.sub(r"(/\*\*?)+$", "", pattern.strip("/")) or "."
        found = [path for path in everything if path == ("" if short in (".", "*", "**") else short)]
        found = found or _globbed(everything, pattern.strip("/")) or _globbed(everything, short)
        files = sorted(path for path in found if path.lower().endswith(SHARDS) and path not in tree.folders)
        folders = sorted(path for path in found if path in tree.folders and tree.images(path))
        kinds = {os.path.splitext(file)[1].lower() for file in files} | ({"folders"} if folders else set())
        if len(kinds) != 1:
            what = f"{' and '.join(sorted(kinds))} at once" if kinds else "nothing to read"
            raise InputError(
                f"data.splits.{split}: {pattern!r} matches {what} in {tree.root}; expected folders of class folders, "
                "or parquet or tar files, told from data.path."
            )
        if folders and len(folders) == 1 and (metadata := _metadata(tree, folders[0])):
            parts[split] = Part("metadata", tuple(folders), metadata)
        else:
            parts[split] = Part(kinds.pop(), tuple(files or folders), shown(pattern))
    if "train" not in parts:
        raise InputError(f"data.splits: names no training split (found: {', '.join(parts)}); add train: GLOB.")
    if parts["train"].kind == "folders":
        for path in parts["train"].paths:
            _check_images_of(tree, path)
    return Layout(tree, parts, [note for part in parts.values() for note in _nested(tree, part)], named=True)


def _globbed(paths: Iterable[str], pattern: str) -> list[str]:
    """Paths that the pattern matches, in which `*` stays within a folder and `**` does not."""
    matches = re.compile(glob.translate(pattern, recursive=True) if hasattr(glob, "translate") else _regex(pattern))
    return [path for path in paths if path and matches.match(path)]


def _regex(pattern: str) -> str:
    """Python 3.13's glob.translate, for what a split can be named by."""
    parts = []
    for token in re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern):
        known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        is_set = token.startswith("[") and token.endswith("]") and len(token) > 2
        parts.append(known.get(token) or (token.replace("[!", "[^") if is_set else re.escape(token)))
    return "".join(parts) + r"\Z"


# -- sentences


def _ambiguous(tree: Tree, what: str) -> InputError:
    return InputError(
        f"data.path: {tree.root} can be read in more than one way: {what}. Move what is not meant, or {WAY_OUT}."
    )


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" … ({len(names)})" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def _pattern(paths: Sequence[str]) -> str:
    """One path for all of them: with the number of the shard as `*`."""
    if len(paths) == 1:
        return shown(paths[0])
    first, last = min(paths), max(paths)
    prefix = next((first[:i] for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), first)
    suffix = os.path.splitext(first)[1]
    return shown(f"{prefix.rstrip('0123456789')}*{suffix}")
