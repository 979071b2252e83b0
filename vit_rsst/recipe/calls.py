"""The section `pruning` of a recipe as keywords of a call: the same words, bounds, rules and sentences.

The fields of `pruning.schedule` are keywords of their own. An error names the call and the keyword in place of the
recipe's path and line.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np

from vit_rsst.errors import InputError
from vit_rsst.pruning.methods import METHODS
from vit_rsst.recipe.loading import spelled_out, validated
from vit_rsst.recipe.rules import broken_pruning_rules
from vit_rsst.recipe.schema import Pruning
from vit_rsst.recipe.sentences import Problem

OF_SCHEDULE = ("rounds", "final_sparsity", "rate", "sparsities", "budget")
"""Keywords that are fields of `pruning.schedule`."""


def pruning_section(call: str, words: Mapping[str, Any], rest: Mapping[str, Any], names: Mapping[str, str]) -> Pruning:
    """Checks keywords as a recipe's section is checked.

    Args:
        call: what the user called, such as `Pruner`; empty for the command line, whose options need none.
        words: keywords of the section; None is not given. `method` is a name, a mapping with `name` and options, or a
            method itself; `schedule` a name or a mapping.
        rest: other sections that the rules look at, such as `optim`.
        names: path in a recipe → keyword of the call, where they differ.

    Raises:
        InputError: one sentence for each problem.
    """
    given = {key: value for key, value in words.items() if value is not None}
    schedule = given.pop("schedule", {})
    schedule = {"name": schedule} if isinstance(schedule, str) else schedule
    fields = {key: given.pop(key) for key in OF_SCHEDULE if key in given}
    if isinstance(schedule, Mapping):
        schedule = {**schedule, **fields}
    method = given.get("method")
    if is_dataclass(method) and type(method) in (classes := {METHODS[name]: name for name in METHODS}):
        given["method"] = {"name": classes[type(method)], **asdict(method)}
    tree = {"name": call or "options", **rest, "pruning": {**given, **({"schedule": schedule} if schedule else {})}}
    try:
        tree = spelled_out(json.loads(json.dumps(tree, default=_plain)))
    except (TypeError, ValueError) as error:
        raise InputError(f"{call}: takes plain numbers, strings, lists and mappings ({error}).") from error
    name = tree["pruning"].get("method", {}).get("name") if isinstance(tree["pruning"].get("method"), dict) else None
    if name in METHODS and METHODS[name].keeps_start:
        tree["model"] = {"start_from": "model"}  # whose zeros it keeps
    recipe, problems = validated(tree)
    if recipe is not None:
        problems = broken_pruning_rules(recipe)
    if recipe is None or problems:
        raise InputError("\n".join(_sentence(call, problem, names) for problem in problems))
    return recipe.pruning


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python; `json` asks for what it does not know."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"not a {type(value).__name__}")


@contextmanager
def in_words_of(call: str, names: Mapping[str, str]) -> Iterator[None]:
    """Names a call and its keyword in errors that name a recipe's field."""
    try:
        yield
    except InputError as error:
        path, colon, text = str(error).partition(": ")
        if not colon or not re.fullmatch(r"(pruning|model|optim|train)\.[a-z_.]+", path):
            raise
        raise InputError(_sentence(call, Problem(path, text), names)) from error


def _sentence(call: str, problem: Problem, names: Mapping[str, str]) -> str:
    def keyword(path: str) -> str:
        sections = [section for section in names if path == section or path.startswith(f"{section}.")]
        return names[max(sections, key=len)] if sections else re.sub(r"^pruning\.(schedule\.)?", "", path)

    text = re.sub(r"\b(?:pruning|model|optim|train)\.[a-z_]+(?:\.[a-z_]+)*", lambda m: keyword(m[0]), problem.sentence)
    for path, name in names.items():
        leaf = path.rpartition(".")[2]
        text = re.sub(rf"\b{leaf}\b", name, text) if "_" in leaf else text
    name = keyword(problem.path)
    place = f"{call}({name}=…)" if call else name
    return f"{place}: {text.rstrip('.')}."
