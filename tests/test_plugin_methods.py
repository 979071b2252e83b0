"""Methods from plugins: plan, memory estimate, rules and report are right without a line about them elsewhere."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from test_recipe import complaints, written

from vit_rsst.pruning.methods import METHODS

HEAD = """\
from dataclasses import dataclass, field
from typing import ClassVar
from vit_rsst.pruning.plan import Gradual, Method, Penalty, RoundPlan, register_method
"""

PENALISED = f"""{HEAD}
@register_method("penalised")
@dataclass(frozen=True)
class Penalised(Method):
    one_round: ClassVar[bool] = False
    penalty: Penalty = field(default_factory=Penalty)
    remove_at: float = 0.5

    def plan(self, round, view):
        if round == 0:
            return RoundPlan(view.mask)
        return RoundPlan(view.mask, view.units(view.density(round / view.rounds)), self.penalty, self.remove_at)

    def rules(self, setting):
        if setting("train.ema_decay"):
            yield "train.ema_decay", "does not work with penalised; omit it"

    @classmethod
    def question(cls, setting):
        return f"Does {{setting('model.name')}} survive a penalty?"
"""

GRADUAL = f"""{HEAD}
@register_method("gradual")
@dataclass(frozen=True)
class Slow:
    one_round: ClassVar[bool] = False
    window: tuple[float, float] = (0.0, 0.5)
    interval: int = 1

    def plan(self, round, view):
        return RoundPlan(view.mask)

    def refresh(self, progress, view):
        fraction = Gradual(self.window, self.interval).fraction_at(progress)
        if fraction is None or progress.round == 0:
            return None
        return view.units(view.density((progress.round - 1 + fraction) / view.rounds))
"""

ONE_ROUND = f"""{HEAD}
@register_method("at_init")
@dataclass(frozen=True)
class AtInit(Method):
    one_round: ClassVar[bool] = True
    default_criterion: ClassVar[str] = "random"
    straight: bool = False

    def plan(self, round, view):
        return RoundPlan(view.units(view.density(1.0)), forward="straight_through" if self.straight else "masked")
"""

PLUGINS = {"penalised": PENALISED, "gradual": GRADUAL, "at_init": ONE_ROUND}


@pytest.fixture
def plugins(tmp_path, monkeypatch) -> Iterator[Path]:
    for name, text in PLUGINS.items():
        (tmp_path / f"plugin_{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in PLUGINS:
        METHODS._parts.pop(name, None)
        sys.modules.pop(f"plugin_{name}", None)


def recipe_of(folder: Path, method: str, name: str | None = None) -> Path:
    text = tiny.RECIPE.replace("{name: rsst, remove_at: 0.8}", method)
    name = name or re.match(r"(?:\{name: )?(\w+)", method)[1]
    return tiny.write_recipe(folder, f"{text}plugins: [plugin_{name}]\n")


def plan_of(capsys, recipe: Path, *overrides: str) -> str:
    assert tiny.command("train", recipe, "--dry-run", *overrides) == 0
    return capsys.readouterr().out


def removals(plan: str) -> list[list[str]]:
    """Of each round: density, weights removed, when."""
    rows = [line.split(maxsplit=6) for line in plan.splitlines() if re.match(r" *[0-9]+ ", line)]
    return [[row[1], row[3], row[6]] for row in rows]


def masks(plan: str) -> float:
    return float(re.search(r"masks ([0-9.]+) KiB", plan)[1])


def test_the_plan_of_a_method_with_a_penalty(plugins, capsys):
    plan = plan_of(capsys, recipe_of(plugins, "penalised"))
    assert [(row[0], row[2]) for row in removals(plan)] == [
        ("1.0000", "none"), ("0.3162", "after step 3"), ("0.1000", "after step 3")
    ]  # fmt: skip
    assert "shrinks the condemned to 1.00e-03 of their size" in plan
    assert masks(plan) == pytest.approx(2 * tiny.NUM_PRUNABLE / 1024, abs=0.1), "the mask and the condemned"


def test_the_plan_of_a_method_that_removes_gradually(plugins, capsys):
    plan = plan_of(capsys, recipe_of(plugins, "gradual"))
    assert removals(plan)[0][2] == "none"
    assert [(row[0], row[2]) for row in removals(plan)[1:]] == [
        ("0.3162", "every 1 steps, steps 1–3"), ("0.1000", "every 1 steps, steps 1–3")
    ]  # fmt: skip
    assert "penalty" not in plan
    assert masks(plan) == pytest.approx(tiny.NUM_PRUNABLE / 1024, abs=0.1)


def test_the_plan_of_a_method_with_one_round(plugins, capsys):
    recipe = recipe_of(plugins, "at_init")
    plan = plan_of(capsys, recipe)
    assert [(row[0], row[2]) for row in removals(plan)] == [("0.1000", "before the first step")]
    assert "6 epochs, 18 steps" in plan, "as many as the rounds of the schedule take together"
    assert "dense weights" not in plan
    assert "dense weights 13.5 KiB" in plan_of(capsys, recipe, "pruning.method={name: at_init, straight: true}")


@pytest.mark.parametrize(
    "name, overrides, path, sentence",
    [
        ("penalised", ["pruning.method={name: penalised, penalty: {exponent: 2}}"], "pruning.method.penalty.exponent",
         "has no effect without"),
        ("penalised", ["pruning.method={name: penalised, remove_at: 0.2}"], "pruning.method.remove_at", "is before"),
        ("penalised", ["train.recovery_epochs=1"], "train.recovery_epochs", "only follow a removal at the end"),
        ("penalised", ["train.ema_decay=0.9"], "train.ema_decay", "does not work with penalised"),
        ("penalised", ["optim.name=adam"], "optim.weight_decay", "would move the condemned"),
        ("gradual", ["pruning.method={name: gradual, window: [0.7, 0.1]}"], "pruning.method.window", "0 ≤ start ≤ end"),
        ("at_init", ["pruning.schedule={name: explicit, sparsities: [0.5, 0.8]}"], "pruning.schedule.name",
         "at_init has one round"),
        ("at_init", ["pruning.schedule.rounds=0"], "pruning.schedule.rounds", "at_init needs at least 1"),
        ("at_init", ["train.distill.teacher=dense"], "train.distill.teacher", "at_init has one round"),
    ],
)  # fmt: skip
def test_the_rules_of_a_plugin_method(plugins, name, overrides, path, sentence):
    text = f"name: r\nplugins: [plugin_{name}]\npruning: {{method: {name}}}\n"
    lines = complaints(plugins, text, *overrides)
    assert [line for line in lines if f"  {path}: " in line and sentence in line], lines


def test_a_plugin_method_chooses_its_default_criterion(plugins):
    from vit_rsst.recipe.loading import load

    recipe = load(written(plugins, "name: r\nplugins: [plugin_at_init]\npruning: {method: at_init}\n"))
    assert recipe.pruning.criterion == "random"


@pytest.mark.parametrize("name", PLUGINS)
def test_a_run_of_a_plugin_method_does_what_its_plan_says(plugins, capsys, name):
    recipe = recipe_of(plugins, name)
    planned = [row[0] for row in removals(plan_of(capsys, recipe))]
    assert tiny.command("train", recipe) == 0
    rows = (plugins / "runs" / "tiny" / "rounds.csv").read_text(encoding="utf-8").splitlines()
    assert [f"{float(row.split(',')[1]):.4f}" for row in rows[1:]] == planned
    METHODS._parts.pop(name)
    out = plugins / "out"
    assert tiny.command("report", plugins / "runs" / "tiny", "--out", out) == 0, "without the plugin"
    asked = "Does vit_tiny survive a penalty?" if name == "penalised" else f"are removed with {name}"
    assert asked in (out / "report.html").read_text(encoding="utf-8")


# -- no method is known outside of its file

CLASSES = {method.__name__ for method in METHODS._parts.values() if method.__module__.startswith("vit_rsst.")}
NAMES = {name for name, method in METHODS._parts.items() if method.__module__.startswith("vit_rsst.")}
OTHER_MEANINGS = {"dense", "constant", "set"}
"""Also a network with all its weights, a teacher, a learning rate and the name of a folder: looked for beside the word
`method` alone."""

ALLOWED = {"recipe/schema.py": {"rsst"}, "library/removals.py": {"imp"}, "library/pruner.py": {"rsst"}}
"""Defaults: a recipe or a call of the library that names no method must get one."""

VOCABULARY = "old_names.py"
"""The words of the original's launcher, some of which are methods; it translates them and decides nothing."""


def leaks(text: str) -> set[str]:
    """Names and classes of built-in methods that a module uses."""
    found, tree = set(), ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vit_rsst.pruning.methods."):
            found.add(node.module)
        if isinstance(node, ast.Name | ast.Attribute):
            found |= {node.id if isinstance(node, ast.Name) else node.attr} & CLASSES
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & (NAMES - OTHER_MEANINGS)
        if isinstance(node, ast.Compare) and re.search(r"\bmethod", ast.unparse(node)):
            words = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            found |= {word for word in words if isinstance(word, str)} & NAMES
    return found


def test_no_built_in_method_is_named_outside_of_its_file():
    files = [f for f in tiny.PACKAGE.rglob("*.py") if "pruning/methods" not in f.as_posix() and f.name != VOCABULARY]
    found = {f.relative_to(tiny.PACKAGE).as_posix(): leaks(f.read_text(encoding="utf-8")) for f in files}
    assert {file: names for file, names in found.items() if names} == ALLOWED
    assert len(files) > 100
    assert len(NAMES) == len(CLASSES) >= 8


@pytest.mark.parametrize(
    "planted",
    [
        "from vit_rsst.pruning.methods.rsst import Rsst",
        "isinstance(method, Gmp)",
        "name in ('gmp', 'ste')",
        "if method == 'dense': pass",
        "pruning.method_name != 'constant'",
    ],
)
def test_a_planted_leak_is_found(planted):
    assert leaks(planted)
