"""Loads a recipe from a YAML file and `key=value` overrides; collects every error with its place.

Nothing heavy is imported here, so that an invalid recipe is rejected at once.
"""

import difflib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from vit_rsst.data.catalog import CATALOG as SOURCES
from vit_rsst.errors import InputError, unknown
from vit_rsst.pruning.criteria import CRITERIA
from vit_rsst.pruning.methods import METHODS
from vit_rsst.pruning.plan import RAMPS_OF_0_1, Method
from vit_rsst.recipe import strict_yaml
from vit_rsst.recipe.rules import broken_rules
from vit_rsst.recipe.schema import DEFAULT_METHOD, Recipe
from vit_rsst.recipe.sentences import Problem, sentences

SHORTHANDS = {("pruning", "method"): "name", ("pruning", "schedule"): "name", ("data", "augment"): "preset"}
"""Fields where `key: NAME` is short for `key: {name: NAME}`."""

AUGMENT_PRESETS = {
    "none": {"crop": "pad", "padding": 0, "hflip": 0.0},
    "plain": {},
    "strong": {"auto_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "reprob": 0.25},
}
"""Values of `data.augment: NAME`; `{preset: NAME, …}` overrides some of them. Strong is the DeiT recipe."""


class RawRecipe:
    """A recipe's raw tree, and where each of its keys was set."""

    def __init__(self, file: Path, overrides: Sequence[str]):
        self.file = file
        try:
            self.document = strict_yaml.parse(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not valid UTF-8 ({error.reason} at byte {error.start}).") from error
        self.problems = [Problem(".".join(path), sentence) for path, _, sentence in self.document.problems]
        self._problem_lines = {(".".join(p), s): line for p, line, s in self.document.problems}
        self.overridden: dict[str, str] = {}
        for item in overrides:
            self._override(item)
        self.tree, renamed = _renamed(spelled_out(self.document.tree))
        self.hints = [Problem(path, sentence) for path, sentence in renamed.items()]

    def _override(self, item: str) -> None:
        key, equals, text = item.partition("=")
        if not equals or not key or not all(key.split(".")):
            self.overridden[item] = item
            self.problems.append(Problem(item, "expected key=value, such as train.epochs=60"))
            return
        self.overridden[key] = item
        try:
            value = strict_yaml.parse_scalar(text, types_of(Recipe, key.split(".")))
        except ValueError as error:
            self.problems.append(Problem(key, str(error)))
            return
        *parents, last = key.split(".")
        node = self.document.tree
        for depth, parent in enumerate(parents):
            child = node.get(parent)
            if isinstance(child, str) and tuple(parents[: depth + 1]) in SHORTHANDS:
                child = {SHORTHANDS[tuple(parents[: depth + 1])]: child}
            node[parent] = child if isinstance(child, dict) else {}
            node = node[parent]
        node[last] = value

    def place(self, problem: Problem) -> str:
        """`file:line`, or the command-line override that set the key or one of its parents."""
        for key, item in self.overridden.items():
            if problem.path == key or problem.path.startswith(f"{key}."):
                return f"command line ({item})"
        line = self._problem_lines.get((problem.path, problem.sentence))
        path = tuple(problem.path.split("."))
        while line is None and path:
            line = self.document.lines.get(path)
            path = path[:-1]
        return f"{self.file}:{line}" if line else str(self.file)


def types_of(root: type, path: Sequence[str]) -> set[type]:
    """The types that a field takes; empty where the schema does not say."""
    found = {root}
    for key in path:
        section = next((cls for cls in found if is_dataclass(cls)), None)
        hints = {f.name: f.type for f in fields(section)} if section else {}
        found = _members(hints[key]) if key in hints else set()
    return found


def _members(hint: Any) -> set[type]:
    """The types of a union, without annotations."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return set().union(*(_members(part) for part in get_args(hint)))
    return {hint} if isinstance(hint, type) else set()


def find(name: str) -> Path:
    """A recipe file, by path or by its name among the recipes of the package.

    Raises:
        InputError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    wanted = name.removeprefix("recipes/").removesuffix(".yaml")
    builtin = {str(p.relative_to(builtin_folder()).with_suffix("")): p for p in builtin_recipes()}
    if wanted in builtin:
        return builtin[wanted]
    near = difflib.get_close_matches(wanted, builtin, n=1, cutoff=0.4)
    raise InputError(
        f"{name}: no recipe file or built-in recipe of that name; `vit-rsst recipes` lists them."
        + (f" Did you mean {near[0]!r}?" if near else "")
    )


def builtin_folder() -> Path:
    """Folder of the recipes: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def builtin_recipes() -> list[Path]:
    return sorted(builtin_folder().rglob("*.yaml"))


def load(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe with `key=value` overrides.

    Raises:
        InputError: listing every problem with its place, the value, the choices and the closest match.
    """
    raw = RawRecipe(file, overrides)
    _load_plugins(raw)
    recipe, problems = validated(raw.tree)
    problems = [*raw.problems, *problems]
    faulty = {problem.path for problem in problems}
    # Rules are checked with faulty fields reset to their defaults, so that all problems are reported in one go.
    whole = recipe or validated(_without(raw.tree, faulty))[0]
    if whole is not None:
        problems += [problem for problem in broken_rules(whole) if problem.path not in faulty]
    if not problems and os.environ.get("RANK", "0") == "0":
        for hint in raw.hints:
            print(f"hint: {raw.place(hint)}  {hint.path}: {hint.sentence}", file=sys.stderr)
    if problems:
        lines = [f"{raw.place(p)}  {p.path + ': ' if p.path else ''}{p.sentence}" for p in problems]
        count = f"{len(lines)} problems" if len(lines) > 1 else "1 problem"
        raise InputError("\n".join([f"{count} in the recipe; nothing was started.", *lines]))
    return recipe


def spelled_out(tree: dict) -> dict:
    """Expands shorthands and presets."""
    tree = dict(tree)
    for (parent, key), what in SHORTHANDS.items():
        if isinstance(tree.get(parent), dict) and isinstance(tree[parent].get(key), str):
            tree[parent] = {**tree[parent], key: {what: tree[parent][key]}}
    data = tree.get("data")
    augment = data.get("augment") if isinstance(data, dict) else None
    if isinstance(augment, dict) and isinstance(augment.get("preset"), str) and augment["preset"] in AUGMENT_PRESETS:
        changed = {key: value for key, value in augment.items() if key != "preset"}
        tree["data"] = {**data, "augment": {**AUGMENT_PRESETS[augment["preset"]], **changed}}
    return tree


def _renamed(tree: dict) -> tuple[dict, dict[str, str]]:
    """Replaces names of version 0.1 by those of now; says which, by path."""
    place = "pruning.method.penalty"
    penalty: Any = tree
    for key in place.split("."):
        penalty = penalty.get(key) if isinstance(penalty, dict) else None
    name = penalty.get("ramp") if isinstance(penalty, dict) else None
    now = RAMPS_OF_0_1.get(name) if isinstance(name, str) else None
    if now is None:
        return tree, {}
    tree = json.loads(json.dumps(tree))
    tree["pruning"]["method"]["penalty"] = {**penalty, **now}
    written = ", ".join(f"{option}: {value}" for option, value in now.items())
    return tree, {f"{place}.ramp": f"{name!r} is the name of version 0.1; write {written}"}


def _without(tree: dict, paths: Iterable[str]) -> dict:
    """A copy of the tree without the named keys."""
    tree = json.loads(json.dumps(tree))
    tree.setdefault("name", "unnamed")
    for path in paths:
        *parents, last = path.split(".")
        node: Any = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    return tree


def _load_plugins(raw: RawRecipe) -> None:
    plugins = raw.tree.get("plugins", [])
    for module in plugins if isinstance(plugins, list) else []:
        try:
            importlib.import_module(str(module))
        except Exception as error:  # a plugin may fail in any way
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if last.filename.startswith("<") else f" at {last.filename}:{last.lineno}"
            what = f"{type(error).__name__}: {error}".splitlines()[0] + where
            raw.problems.append(
                Problem(
                    "plugins", f"module {module!r} cannot be imported ({what}); name one that can, and is on PYTHONPATH"
                )
            )


def validated(tree: dict) -> tuple[Recipe | None, list[Problem]]:
    """Checks types, bounds and names; the options of the method against its own dataclass."""
    problems: list[Problem] = []
    tree = json.loads(json.dumps(tree))
    method = _take_method(tree, problems)
    try:
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        recipe = None
        problems += sentences(error, Recipe, tree, ())
    for path, value, what, choices in _names(tree):
        if isinstance(value, str) and value not in choices:
            problems.append(Problem(path, unknown(what, value, choices)))
    if problems or recipe is None:
        return None, problems
    given = tree.get("pruning") or {}
    # These were derived from the default method.
    derived = {key: given.get(key) for key in ("criterion", "rewind")}
    return replace(recipe, pruning=replace(recipe.pruning, method=method, **derived)), []


def _names(tree: dict) -> Iterable[tuple[str, Any, str, Iterable[str]]]:
    def get(*path: str) -> Any:
        node: Any = tree
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    yield "data.source", get("data", "source"), "source", SOURCES
    yield "pruning.criterion", get("pruning", "criterion"), "criterion", CRITERIA
    augment = get("data", "augment")
    if isinstance(augment, dict) and "preset" in augment:
        preset = augment["preset"]
        yield "data.augment", preset if isinstance(preset, str) else json.dumps(preset), "preset", AUGMENT_PRESETS


def _take_method(tree: dict, problems: list[Problem]) -> Method | None:
    """Validates `pruning.method` on its own and removes it from the tree."""
    pruning = tree.get("pruning")
    default = {"name": DEFAULT_METHOD}
    options = pruning.pop("method", default) if isinstance(pruning, dict) else default
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        problems.append(Problem("pruning.method", f"expected a method: {', '.join(METHODS)}"))
        return None
    name = options["name"]
    if name not in METHODS:
        problems.append(Problem("pruning.method", unknown("method", name, METHODS)))
        return None
    rest = {key: value for key, value in options.items() if key != "name"}
    try:
        return TypeAdapter(METHODS[name]).validate_json(json.dumps(rest), strict=True)
    except ValidationError as error:
        problems += sentences(error, METHODS[name], rest, ("pruning", "method"))
        return None
