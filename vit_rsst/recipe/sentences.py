"""Error messages for a recipe: the value, the valid choices, the closest match."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pydantic import ValidationError

from vit_rsst.errors import unknown


@dataclass(frozen=True)
class Problem:
    """One error in a recipe: dotted path and message."""

    path: str
    sentence: str


def sentences(error: ValidationError, root: type, tree: dict, prefix: tuple[str, ...]) -> list[Problem]:
    """pydantic's errors in the project's words; one per place, however many branches of a union failed there."""
    found: dict[str, Problem] = {}
    for item in error.errors(include_url=False):
        is_new_key = item["type"] in ("unexpected_keyword_argument", "missing")
        path = _real_path(tuple(str(part) for part in item["loc"]), tree, is_new_key)
        dotted = ".".join((*prefix, *path))
        if path == ("data", "augment", "preset"):
            continue  # reported as an unknown preset
        found.setdefault(dotted, Problem(dotted, _sentence(item, _siblings(root, path), root)))
    # A mapping that fails one branch of a union by its keys fails the other branches too: the keys are more specific.
    return [p for path, p in found.items() if not any(other.startswith(f"{path}.") for other in found)]


def _real_path(inside: tuple[str, ...], tree: Any, ends_in_new_key: bool) -> tuple[str, ...]:
    """Drops the parts of a location that name a branch of a union rather than a key."""
    path, node = [], tree
    for i, part in enumerate(inside):
        if isinstance(node, dict) and (part in node or (ends_in_new_key and i == len(inside) - 1)):
            path.append(part)
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            path.append(part)
            node = node[int(part)]
    return tuple(path)


def _siblings(root: type, path: tuple[str, ...]) -> list[str]:
    """Field names of the dataclass that `path` belongs to."""
    cls: Any = root
    for part in path[:-1]:
        hint = next((f.type for f in fields(cls) if f.name == part), None) if is_dataclass(cls) else None
        cls = hint if is_dataclass(hint) else None
        if cls is None:
            return []
    return ["with" if f.name == "trackers" else f.name for f in fields(cls)]


def _everywhere(root: type, prefix: str = "") -> Iterable[tuple[str, str]]:
    for f in fields(root):
        yield f.name, f"{prefix}{f.name}"
        if is_dataclass(f.type):
            yield from _everywhere(f.type, f"{prefix}{f.name}.")


def _sentence(item: dict, siblings: list[str], root: type) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        key = str(item["loc"][-1])
        near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
        if near:
            return f"unknown key; did you mean {near[0]!r}?"
        elsewhere = [path for name, path in _everywhere(root) if name == key]
        return (
            f"unknown key; did you mean {elsewhere[0]!r}?"
            if elsewhere
            else (f"unknown key; expected one of {', '.join(siblings)}")
        )
    if kind == "missing":
        return "missing; every recipe needs it"
    if kind == "literal_error":
        choices = [c.strip("'") for c in context["expected"].replace(" or ", ", ").split(", ")]
        return unknown("value", value, choices)
    if kind == "finite_number":
        return f"{value!r} is not a finite number"
    if kind == "string_pattern_mismatch":
        return _pattern_sentence(item, value)
    bound = {
        "greater_than": "more than",
        "greater_than_equal": "at least",
        "less_than": "less than",
        "less_than_equal": "at most",
    }.get(kind)
    if bound:
        limit = next(iter(context.values()))
        return f"{value!r} is out of range; expected {bound} {limit}"
    if kind == "too_short":
        return f"is empty; expected at least {context['min_length']}"
    wanted = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "a string",
        "tuple": "a list",
        "dict": "a mapping",
        "dataclass": "a mapping",
    }.get(kind.split("_")[0])
    if wanted:
        return f"{value!r} is not {wanted}"
    return f"{value!r}: {item['msg']}"


def _pattern_sentence(item: dict, value: object) -> str:
    if item["loc"][-1] == "rewind":
        return f"unknown value {value!r}; expected init, lr, none or epoch:K, such as epoch:5"
    return f"{value!r} is not a valid folder name; remove slashes and control characters"
