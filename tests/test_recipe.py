"""Recipes: every fault at once with its place and a way out, overrides, rules that join fields, what is recorded."""

import ast
import dataclasses
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from vit_rsst.errors import InputError
from vit_rsst.pruning.plan import METHODS
from vit_rsst.recipe import loading as recipes
from vit_rsst.recipe import rules, strict_yaml
from vit_rsst.recipe.loading import load
from vit_rsst.recipe.schema import FREE_FIELDS, Recipe, deciding
from vit_rsst.recipe.sentences import Problem
from vit_rsst.run.folder import RunFolder


def written(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaints(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error that a recipe is refused with, less the head line."""
    with pytest.raises(InputError) as caught:
        load(written(folder, text), overrides)
    head, *lines = str(caught.value).splitlines()
    expected = "1 problem in" if len(lines) == 1 else f"{len(lines)} problems in"
    assert head.startswith(expected)
    return lines


# -- the shape of a recipe, walked once: every dataclass that a recipe or a method is made of


def dataclasses_in(hint: object) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    elif typing.get_origin(hint) is typing.Annotated:
        yield from dataclasses_in(typing.get_args(hint)[0])
    elif isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        for argument in typing.get_args(hint):
            yield from dataclasses_in(argument)


def key_of(field: dataclasses.Field) -> str:
    return "with" if field.name == "trackers" else field.name


def shape(cls: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """(path, dataclass) of `cls` and of every section below it."""
    yield prefix, cls
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        for child in dataclasses_in(hints[field.name]):
            yield from shape(child, (*prefix, key_of(field)))


SECTIONS = list(shape(Recipe))
METHOD_SECTIONS = [(name, path, cls) for name in METHODS for path, cls in shape(METHODS[name], ("pruning", "method"))]
LEAVES = sorted(
    ".".join((*path, key_of(f)))
    for path, cls in SECTIONS
    for f in dataclasses.fields(cls)
    if (*path, key_of(f)) not in {path for path, _ in SECTIONS}
)


def nested(path: tuple[str, ...], value: object) -> dict:
    for key in reversed(path):
        value = {key: value}
    return value


def test_the_walk_over_the_schema_covers_every_field():
    names = " ".join(sorted(cls.__name__ for _, cls in SECTIONS))
    assert names == "Augment Data Distill Imbalance Model Optim Pruning Recipe Schedule StepDecay Tracking Train"
    assert {name for name, _, _ in METHOD_SECTIONS} == set(METHODS) >= {"dense", "gmp", "imp", "rsst"}
    assert len(LEAVES) > 45


# -- every error at once

FIVE_FAULTS = """\
name: faulty
optim:
  lr: 1e-3
  weightdecay: 0.1
train:
  epochs: many
  global_batch: 64
  global_batch: 32
pruning:
  method: rssst
  schedule: {rounds: 2, final_sparsity: 1.5}
"""


@pytest.mark.fault("F12")
def test_all_five_errors_are_reported_at_once_quickly_and_nothing_is_created(tmp_path):
    path = written(tmp_path, FIVE_FAULTS)
    before = sorted(tmp_path.rglob("*"))
    done = tiny.python("-X", "importtime", "-m", "vit_rsst.cli", "train", path, f"output_dir={tmp_path}/runs")
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    reported = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]

    assert done.returncode == 2
    assert "5 problems" in reported[0]
    assert len(reported) == 6
    for line, name, hint in [
        (4, "optim.weightdecay", "did you mean 'weight_decay'?"),
        (6, "train.epochs", "'many' is not a whole number"),
        (8, "train.global_batch", "first given in line 7"),
        (10, "pruning.method", "Did you mean 'rsst'?"),
        (11, "pruning.schedule.final_sparsity", "1.5 is out of range; expected less than 1"),
    ]:
        assert [t for t in reported if t.startswith(f"{path}:{line}  {name}: ") and hint in t], (name, reported)
    assert sorted(tmp_path.rglob("*")) == before
    assert "vit_rsst.recipe.schema" in imported, "the probe sees imports"
    heavy = {"torch", "numpy", "datasets", "timm", "transformers", "accelerate", "evaluate", "sklearn", "wandb"}
    assert not imported & heavy


def test_unknown_keys_are_rejected_in_every_section(tmp_path):
    seen = 0
    for path, cls in SECTIONS:
        siblings = {"steps": [1.0]} if cls.__name__ == "StepDecay" else {}
        tree = {"name": "r"} | nested(path, {**siblings, "bogus_key": 1})
        lines = complaints(tmp_path, json.dumps(tree))
        assert len(lines) == 1
        assert f"  {'.'.join((*path, 'bogus_key'))}: unknown key" in lines[0]
        seen += 1
    assert seen == len(SECTIONS) == 12


@pytest.mark.parametrize("name, path", [(name, path) for name, path, _ in METHOD_SECTIONS])
def test_unknown_keys_are_rejected_in_every_method(tmp_path, name, path):
    inside = nested(path[2:], {"bogus_key": 1})
    fitting = {"refill": {"granularity": "head"}}.get(name, {})
    tree = {"name": "r", "model": {"start_from": "t"}, "pruning": {"method": {"name": name, **inside}, **fitting}}
    lines = complaints(tmp_path, json.dumps(tree))
    assert len(lines) == 1
    assert f"  {'.'.join((*path, 'bogus_key'))}: unknown key" in lines[0]


@pytest.mark.fault("F12")
@pytest.mark.parametrize(
    "text, where, sentence",
    [
        ("seed: 1\n", "r.yaml", "name: missing"),
        ("name: r\ntrain: {epochs: 1.5}\n", "r.yaml:2", "train.epochs: 1.5 is not a whole number"),
        ("name: r\ntrain: {epochs: '5'}\n", "r.yaml:2", "train.epochs: '5' is not a whole number"),
        ("name: r\ntrain: {epochs: true}\n", "r.yaml:2", "train.epochs: True is not a whole number"),
        ("name: r\ntrain: {epochs: 0}\n", "r.yaml:2", "train.epochs: 0 is out of range; expected at least 1"),
        ("name: r\noptim: {lr: fast}\n", "r.yaml:2", "optim.lr: 'fast' is not a number"),
        ("name: r\nmodel: {pretrained: no}\n", "r.yaml:2", "model.pretrained: 'no' is not valid"),
        ("name: r\nmodel: {args: [1]}\n", "r.yaml:2", "model.args: [1] is not a mapping"),
        ("name: r\ndata: {source: cifar1}\n", "r.yaml:2", "unknown source 'cifar1'"),
        ("name: r\ndata: {source: 5}\n", "r.yaml:2", "data.source: 5 is not a string"),
        ("name: r\ndata: cifar10\n", "r.yaml:2", "data: 'cifar10' is not a mapping"),
        ("name: r\ndata: {augment: plane}\n", "r.yaml:2", "Did you mean 'plain'?"),
        ("name: r\noptim: {name: adamww}\n", "r.yaml:2", "Did you mean 'adamw'?"),
        ("name: r\noptim:\n  betas: [0.9, 1.5]\n", "r.yaml:3", "optim.betas.1: 1.5 is out of range"),
        ("name: r\noptim:\n  schedule: {gamma: 0.5}\n", "r.yaml:3", "optim.schedule.steps: missing"),
        ("name: r\npruning: {criterion: size}\n", "r.yaml:2", "unknown criterion 'size'"),
        ("name: r\npruning: {method: [imp]}\n", "r.yaml:2", "pruning.method: expected a method"),
        ("name: r\npruning: {rewind: epoch}\n", "r.yaml:2", "epoch:K"),
        ("name: r\npruning:\n  method: {name: gmp, interval: 0}\n", "r.yaml:3", "pruning.method.interval: 0 is out"),
        (
            "name: r\npruning:\n  method:\n    name: rsst\n    penalty: {ramp: x^4}\n",
            "r.yaml:5",
            "pruning.method.penalty.ramp: unknown value 'x^4'",
        ),
        ("name: r\ntracking: {with: [wandbb]}\n", "r.yaml:2", "Did you mean 'wandb'?"),
        ("name: a/b\n", "r.yaml:1", "not a valid folder name"),
        ("name: r\nepochs: 5\n", "r.yaml:2", "epochs: unknown key; did you mean 'train.epochs'?"),
        ("name: r\n\n- a\n", "r.yaml:3", "not valid YAML"),
        ("name: r\na: !!binary aGk=\n", "r.yaml:2", "tag"),
    ],
)  # fmt: skip
def test_an_error_names_its_place_and_what_is_expected(tmp_path, text, where, sentence):
    lines = complaints(tmp_path, text)
    assert any(line.startswith(f"{tmp_path}/{where}  ") and sentence in line for line in lines), lines


@pytest.mark.parametrize("name", [".", ".."])
def test_a_name_that_escapes_its_folder_is_rejected(tmp_path, name):
    assert "folder name" in complaints(tmp_path, f"name: '{name}'\n")[0]


def test_a_binary_file_is_a_one_line_error(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(InputError, match="not valid UTF-8"):
        load(path)


BAD_VALUES = [None, "text", -1, 0, 1e9, True, [], ["a", "a"], [[1]], {}, {"a": {"b": 1}}, {"name": "x"}]


def test_any_value_in_any_field_gives_a_recipe_or_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "TypeAdapter", functools.cache(recipes.TypeAdapter))  # building one takes 10 ms
    refused, crashes = 0, []
    for leaf in [*LEAVES, *sorted({".".join(path) for path, _ in SECTIONS if path})]:
        for value in BAD_VALUES:
            tree = {"name": "r"} | nested(tuple(leaf.split(".")), value)
            try:
                load(written(tmp_path, json.dumps(tree)))
            except InputError:
                refused += 1
            except Exception as error:
                crashes.append(f"{leaf}: {value!r} ends in {type(error).__name__}: {error}")
    assert not crashes
    assert refused > len(LEAVES) * len(BAD_VALUES) / 2


# -- finding a recipe


def test_a_built_in_recipe_is_found_by_name():
    assert recipes.find("digits/quickstart") == recipes.find("recipes/digits/quickstart.yaml").resolve()


def test_an_unknown_recipe_name_suggests_the_closest():
    with pytest.raises(InputError, match="Did you mean 'digits/quickstart'"):
        recipes.find("digits/quickstar")


# -- names of version 0.1


@pytest.mark.parametrize(
    "old, ramp, exponent",
    [
        ("x", "linear", 4.0),
        ("x^2", "quadratic", 4.0),
        ("x^3", "cubic", 4.0),
        ("exp", "exponential", 1.0),
        ("exp_custom", "exponential", 1.0),
        ("exp_custom_exponents", "exponential", 4.0),
        ("cos", "cosine", 4.0),
    ],
)
def test_old_names_of_ramps_are_read_with_a_hint(tmp_path, capsys, old, ramp, exponent):
    path = written(tmp_path, f"name: r\npruning:\n  method:\n    name: rsst\n    penalty: {{ramp: {old}}}\n")
    recipe = load(path)
    penalty = recipe.pruning.method.penalty
    assert (penalty.ramp, penalty.exponent) == (ramp, exponent)
    hint = capsys.readouterr().err
    assert hint.startswith(f"hint: {path}:5  pruning.method.penalty.ramp: {old!r} is the name of version 0.1; write")
    more = [f"pruning.method.penalty.exponent={exponent}"] if ramp == "exponential" else []
    new = load(written(tmp_path, "name: r\n"), ["pruning.method=rsst", f"pruning.method.penalty.ramp={ramp}", *more])
    assert new.fingerprint == recipe.fingerprint
    tree = new.tree()
    tree["pruning"]["method"]["penalty"]["ramp"] = old
    assert deciding(tree) == deciding(new.tree()), "a run folder of version 0.1"


# -- overrides

PLAIN = "name: r\ntrain: {epochs: 7}\n"


@pytest.mark.parametrize(
    "text, overrides, expected",
    [
        (PLAIN, ["train.epochs=3"], {"train.epochs": 3}),
        (PLAIN, ["train.epochs=3", "train.epochs=4"], {"train.epochs": 4}),
        (PLAIN, ["train.global_batch=64"], {"train.epochs": 7, "train.global_batch": 64}),
        (PLAIN, ["optim.lr=5e-4"], {"optim.lr": 5e-4}),
        (PLAIN, ["data.augment.padding=0"], {"data.augment.padding": 0}),
        (PLAIN, ["data.augment=none"], {"data.augment.padding": 0, "data.augment.hflip": 0.0}),
        (PLAIN, ["data.augment=strong"], {"data.augment.mixup": 0.8, "data.augment.reprob": 0.25}),
        (
            PLAIN,
            ["data.augment=strong", "data.augment.mixup=0"],
            {"data.augment.mixup": 0, "data.augment.cutmix": 1.0, "data.augment.auto_augment": "rand-m9-mstd0.5-inc1"},
        ),
        (PLAIN, ["data.augment={preset: strong, reprob: 0}"], {"data.augment.reprob": 0, "data.augment.mixup": 0.8}),
        (PLAIN, ["data.source=folder", "data.path=a=b c"], {"data.path": "a=b c"}),
        (PLAIN, ["pruning.method=imp"], {"pruning.method": {"name": "imp"}}),
        (PLAIN, ["pruning.method={name: rsst, remove_at: 1}"], {"pruning.method.remove_at": 1.0}),
        (PLAIN, ["pruning.method.name=rsst", "pruning.method.remove_at=1"], {"pruning.method.remove_at": 1.0}),
        ("name: r\npruning: {method: rsst}\n", ["pruning.method.remove_at=1"], {"pruning.method.remove_at": 1.0}),
        (PLAIN, ["pruning.method=rsst", "pruning.method.remove_at=1"], {"pruning.method.remove_at": 1.0}),
        (
            "name: r\npruning: {method: {name: rsst, remove_at: 0.5, penalty: {ramp: cosine}}}\n",
            ["pruning.method.penalty.strength=0.5"],
            {"pruning.method.remove_at": 0.5, "pruning.method.penalty.ramp": "cosine",
             "pruning.method.penalty.strength": 0.5},
        ),
        ("name: r\npruning: {method: {name: rsst, remove_at: 1}}\n", ["pruning.method=rsst"],
         {"pruning.method.remove_at": 0.3}),
        (PLAIN, ["pruning.schedule=linear"], {"pruning.schedule.name": "linear"}),
        ("name: r\npruning: {schedule: cubic}\n", ["pruning.schedule.rounds=3"],
         {"pruning.schedule.name": "cubic", "pruning.schedule.rounds": 3}),
        (PLAIN, ["pruning.protect=[blocks.0.*, '*.proj.*']"], {"pruning.protect": ["blocks.0.*", "*.proj.*"]}),
        (PLAIN, ["tracking.with=[tensorboard]"], {"tracking.with": ["tensorboard"]}),
        (PLAIN, ["optim.betas=[0.8, 0.9]"], {"optim.betas": [0.8, 0.9]}),
        (PLAIN, ["optim.schedule={steps: [3, 5]}"], {"optim.schedule": {"steps": [3.0, 5.0], "gamma": 0.1}}),
        ("name: r\noptim: {clip_grad_norm: 2.0}\n", ["optim.clip_grad_norm=null"], {"optim.clip_grad_norm": None}),
        ("name: r\ntrain: {round_epochs: 5}\n", ["train.round_epochs="], {"train.round_epochs": None}),
        (PLAIN, ["model.args.depth=2", "model.args.mlp_ratio=1.5"], {"model.args": {"depth": 2, "mlp_ratio": 1.5}}),
        (PLAIN, ["name=no"], {"name": "no"}),
        (PLAIN, ["name=2024"], {"name": "2024"}),
        (PLAIN, ["name=run #2"], {"name": "run #2"}),
        (PLAIN, ["name='run 2'"], {"name": "run 2"}),
        (PLAIN, ["output_dir=/data/runs #2: [a] {b}"], {"output_dir": "/data/runs #2: [a] {b}"}),
        (PLAIN, ["output_dir=[runs]"], {"output_dir": "[runs]"}),
        (PLAIN, ["data.source=cifar10", "data.revision=1234567"], {"data.revision": "1234567"}),
        (PLAIN, ["data.source=cifar10", "data.revision=null"], {"data.revision": None}),
        (PLAIN, ["model.name=vit_small", "model.pretrained=2024"], {"model.pretrained": "2024"}),
        (PLAIN, ["model.name=vit_small", "model.pretrained=true"], {"model.pretrained": True}),
        (PLAIN, ["model.args.act_layer=gelu #1"], {"model.args": {"act_layer": "gelu #1"}}),
    ],
)  # fmt: skip
def test_an_override_reaches_any_field(tmp_path, text, overrides, expected):
    tree = load(written(tmp_path, text), overrides).tree()
    for dotted, value in expected.items():
        node = tree
        for key in dotted.split("."):
            node = node[key]
        assert node == value, dotted


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("train.epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("train..epochs=3", "expected key=value"),
        ("train.epochs=[1", "not valid YAML"),
        ("train.epochs=soon", "'soon' is not a whole number"),
        ("train.epoch=3", "did you mean 'epochs'?"),
        ("pruning.method=rssst", "Did you mean 'rsst'?"),
        ("optim.warmup_epochs=7", "warm-up takes all 7 epochs"),
    ],
)
def test_an_invalid_override_is_reported_as_command_line(tmp_path, override, sentence):
    [line] = complaints(tmp_path, PLAIN, override)
    assert line.startswith(f"command line ({override})  ")
    assert sentence in line


@pytest.mark.parametrize(
    "text, override",
    [
        ("name: r\noptim:\n  lr: 1e-3\n", "optim.betas=[0.9, 1.5]"),
        ("name: r\npruning:\n  criterion: magnitude\n", "pruning.schedule={rate: 3}"),
        ("name: r\npruning:\n  method: imp\n", "pruning.method={name: rsst, remove_at: 3}"),
    ],
)
def test_an_error_inside_an_override_value_is_reported_as_command_line(tmp_path, text, override):
    [line] = complaints(tmp_path, text, override)
    assert line.startswith(f"command line ({override})  "), line


def test_errors_of_file_and_overrides_are_reported_together(tmp_path):
    lines = complaints(tmp_path, "name: r\nseeed: 1\n", "train.epochs=0", "plugins=[no.such.module]")
    assert len(lines) == 3


# -- rules that join fields: (overrides, path, part of the sentence)

EXPLICIT = "pruning.schedule={name: explicit, sparsities: [0.5, 0.8]}"
UNITS = "pruning.granularity=head+neuron"

RULES = {
    "momentum without sgd": (["optim.momentum=0.8"], "optim.momentum", "has no effect with adamw"),
    "betas of sgd": (["optim.name=sgd", "optim.betas=[0.8, 0.9]"], "optim.betas", "has no effect with sgd"),
    "weights that are neither a word nor a place": (
        ["model.name=vit_small", "model.pretrained=yes"], "model.pretrained", "expected true, false, a timm tag"),
    "a stream of the digits": (["data.streaming=true"], "data.streaming", "has no effect with the built-in digits"),
    "a part of a stream": (
        ["data.source=cifar10", "data.streaming=true", "data.train_samples=9"], "data.train_samples", "to a stream"),
    "a stream in memory": (
        ["data.source=cifar10", "data.streaming=true", "data.in_memory=true"], "data.in_memory", "conflicts with"),
    "a tail of a stream": (
        ["data.source=cifar10", "data.streaming=true", "data.imbalance.kind=step"], "data.imbalance.kind",
        "needs the labels of all images"),
    "a ratio of nothing": (["data.imbalance.ratio=10"], "data.imbalance.ratio", "has no effect without"),
    "an imbalance that is corrected twice": (
        ["data.sampler=class_balanced", "train.loss=class_weighted"], "train.loss", "correct for the same imbalance"),
    "erasing of nothing": (["data.augment.remode=const"], "data.augment.remode", "without data.augment.reprob"),
    "a switch between one kind": (
        ["data.augment={mixup: 0.8, mixup_switch_prob: 0.3}"], "data.augment.mixup_switch_prob", "mixup and cutmix"),
    "an image more often than a batch has places": (
        ["data.augment.aug_repeats=300"], "data.augment.aug_repeats", "do not fit a global batch of 256"),
    "a teacher without a name": (["train.distill.teacher=''"], "train.distill.teacher", "is empty"),
    "a mixture of one image": (
        ["data.augment.mixup=0.8", "train.batch_per_device=1"], "data.augment", "mix images within a device's batch"),
    "a padding of random parts": (
        ["data.augment={crop: resized, padding: 7}"], "data.augment.padding", "without data.augment.crop=pad"),
    "a scale of padded images": (["data.augment.scale=[0.5, 0.6]"], "data.augment.scale", "augment.crop=resized"),
    "a ratio of padded images": (["data.augment.ratio=[0.5, 0.6]"], "data.augment.ratio", "augment.crop=resized"),
    "a probability of no mixture": (["data.augment.mixup_prob=0.3"], "data.augment.mixup_prob", "mixup or cutmix"),
    "a column of the digits": (["data.image_column=x"], "data.image_column", "with the built-in digits"),
    "classes of the digits": (["data.num_classes=3"], "data.num_classes", "with the built-in digits"),
    "a buffer without a stream": (["data.shuffle_buffer=10"], "data.shuffle_buffer", "without data.streaming"),
    "a least rate of a constant one": (
        ["optim.schedule=constant", "optim.min_lr=1e-4"], "optim.min_lr", "without optim.schedule=cosine"),
    "an exponent of a line": (
        ["pruning.method={name: rsst, penalty: {exponent: 9}}"], "pruning.method.penalty.exponent", "exponential; set"),
    "a residual of the other coupling": (
        ["optim.name=sgd", "pruning.method={name: rsst, penalty: {coupling: gradient, residual: 0.1}}"],
        "pruning.method.penalty.residual", "without coupling: decoupled"),
    "a word that is nearly dense": (["train.distill.teacher=Dense"], "train.distill.teacher", "Did you mean 'dense'?"),
    "a temperature without a teacher": (
        ["train.distill.temperature=4"], "train.distill.temperature", "has no effect without"),
    "a round as the teacher of itself": (
        ["pruning.method=dense", "train.distill.teacher=dense"], "train.distill.teacher", "has one round"),
    "a start from its own run": (["model.start_from=runs/r/tickets"], "model.start_from", "this run's own folder"),
    "a teacher from its own run": (
        ["train.distill.teacher=runs/r"], "train.distill.teacher", "'dense' is the model of its round 0"),
    "random crops in memory": (
        ["data.in_memory=true", "data.augment.crop=resized"], "data.in_memory", "draws a new one every epoch"),
    "corrupt images in memory": (
        ["data.in_memory=true", "data.max_corrupt=0.1"], "data.in_memory", "conflicts with max_corrupt"),
    "a scale that ends before it begins": (
        ["data.augment.scale=[0.9, 0.1]"], "data.augment.scale", "put the smaller value first"),
    "a name that hides the run": (["name=.hidden"], "name", "remove the leading dot"),
    "a name that no folder can have": ([f"name={'x' * 201}"], "name", "201 bytes"),
    "explicit without a list": (["pruning.schedule=explicit"], "pruning.schedule.sparsities", "sparsity of each round"),
    "explicit that falls": (
        ["pruning.schedule={name: explicit, sparsities: [0.8, 0.5]}"], "pruning.schedule.sparsities", "not increase"),
    "explicit that stands still": (
        ["pruning.schedule={name: explicit, sparsities: [0.5, 0.5]}"], "pruning.schedule.sparsities", "not increase"),
    "explicit with another number of rounds": (
        [EXPLICIT, "pruning.schedule.rounds=3"], "pruning.schedule.rounds", "omit rounds"),
    "explicit with a rate": ([EXPLICIT, "pruning.schedule.rate=0.2"], "pruning.schedule.rate", "with an explicit list"),
    "explicit with a final sparsity": (
        [EXPLICIT, "pruning.schedule.final_sparsity=0.8"], "pruning.schedule.final_sparsity", "with an explicit list"),
    "no rounds to prune in": (["pruning.schedule={rounds: 0}"], "pruning.schedule.rounds", "rsst needs at least 1"),
    "a list for a curve": (
        ["pruning.schedule={name: linear, sparsities: [0.5]}"], "pruning.schedule.sparsities", "set pruning.schedule"),
    "rate and final sparsity": (
        ["pruning.schedule={rate: 0.2, final_sparsity: 0.9}"], "pruning.schedule.rate", "keep one of the two"),
    "a rate for a line": (["pruning.schedule={name: linear, rate: 0.2}"], "pruning.schedule.rate", "geometric"),
    "a shape and weights": (
        ["model.shape_from=t", "model.start_from=t"], "model.shape_from", "trains from random weights"),
    "windows of everything": (["pruning.granularity=4:4"], "pruning.granularity", "expected 1 ≤ N < M"),
    "windows with a rate": (
        ["pruning.granularity=2:4", "pruning.schedule={rate: 0.2}"], "pruning.schedule", "implies its own density"),
    "windows with another sparsity": (
        ["pruning.granularity=2:4", "pruning.schedule={final_sparsity: 0.9}"],
        "pruning.schedule.final_sparsity", "does not match 2:4, which implies 0.5"),
    "more rounds than windows can step": (
        ["pruning.granularity=2:4", "pruning.schedule={rounds: 3}"], "pruning.schedule.rounds", "at most 2"),
    "windows with a scope": (
        ["pruning.granularity=2:4", "pruning.scope=layer"], "pruning.scope", "has no effect with 2:4"),
    "a budget of both": (
        [UNITS, "pruning.schedule={budget: {flops: 0.5, params: 0.5}}"], "pruning.schedule.budget", "expected one of"),
    "a budget of elements": (
        ["pruning.schedule={budget: {flops: 0.5}}"], "pruning.schedule.budget", "needs units that can be cut out"),
    "a budget and a sparsity": (
        [UNITS, "pruning.schedule={budget: {flops: 0.5}, final_sparsity: 0.5}"],
        "pruning.schedule.final_sparsity", "conflicts with budget"),
    "a rate of kinds that are not pruned": (
        ["pruning.granularity=head", "pruning.schedule={rate: {head: 0.1, neuron: 0.2}}"],
        "pruning.schedule.rate", "head needs head"),
    "a granularity that is none": (["pruning.granularity=heads"], "pruning.granularity", "Did you mean 'head'?"),
    "refill without units": (["pruning.method=refill"], "pruning.granularity", "refill restores whole units"),
    "units scored and elements pruned": (["pruning.criterion=taylor"], "pruning.criterion", "taylor scores units"),
    "straight-through with another criterion": (
        ["pruning.method=ste", "pruning.criterion=random"], "pruning.criterion", "straight-through magnitude"),
    "activations without images": (
        ["pruning.criterion=activation_l1", "pruning.calibration_images=0"],
        "pruning.calibration_images", "needs activations"),
    "erk of units": ([UNITS, "pruning.scope=erk"], "pruning.scope", "use layer or isomorphic"),
    "a ramp over no layers": (["pruning.depth_ramp=[0.5, 1.5]"], "pruning.depth_ramp", "use pruning.scope=layer"),
    "a ramp of nothing": (
        ["pruning.scope=layer", "pruning.depth_ramp=[0.0, 0.0]"], "pruning.depth_ramp", "prunes nothing"),
    "constant from nothing": (["pruning.method=constant"], "pruning.method", "model.start_from"),
    "a fit of what may come back": (
        ["pruning.method=ste", "pruning.compensate=least_squares"], "pruning.compensate", "use imp, gmp, refill"),
    "a fit of a mask that moves": (
        ["pruning.method=rigl", "pruning.compensate=least_squares"], "pruning.compensate", "with rigl they may"),
    "a fit of nothing": (
        ["pruning.method=dense", "pruning.compensate=least_squares"], "pruning.compensate", "which removes nothing"),
    "a fit that is rewound": (
        ["pruning.method=imp", "pruning.rewind=init", "pruning.compensate=least_squares"], "pruning.compensate",
        "overwrites the fitted weights"),
    "a fit without images": (
        ["pruning.compensate=least_squares", "pruning.calibration_images=0"], "pruning.calibration_images",
        "least_squares needs inputs of layers"),
    "rst from trained weights": (["pruning.method=rst", "pruning.rewind=lr"], "pruning.rewind", "initial weights"),
    "refill at the last rate": (
        ["pruning.method={name: refill, feedback: post}", UNITS, "pruning.rewind=none", "optim.min_lr=1e-5"],
        "pruning.rewind", "the final learning rate"),
    "a rewind within one round": (
        ["pruning.method=gmp", "pruning.rewind=init"], "pruning.rewind", "has no effect with gmp"),
    "gmp with a list": (["pruning.method=gmp", EXPLICIT], "pruning.schedule.name", "use cubic or linear"),
    "gmp with a window turned round": (
        ["pruning.method={name: gmp, window: [0.7, 0.1]}"], "pruning.method.window", "0 ≤ start ≤ end ≤ 1"),
    "rsst with a window past the round": (
        ["pruning.method={name: rsst, remove_at: 1, penalty: {window: [0.0, 1.5]}}"],
        "pruning.method.penalty.window", "0 ≤ start ≤ end ≤ 1"),
    "removal inside the window": (
        ["pruning.method={name: rsst, remove_at: 0.2}"], "pruning.method.remove_at", "end of the penalty window"),
    "gradient coupling under adamw": (
        ["pruning.method={name: rsst, penalty: {coupling: gradient}}"],
        "pruning.method.penalty.coupling", "optim.name=sgd"),
    "gradient coupling under layer-wise rates": (
        ["optim.name=sgd", "optim.layer_decay=0.5", "pruning.method={name: rsst, penalty: {coupling: gradient}}"],
        "pruning.method.penalty.coupling", "varies by layer"),
    "coupled decay under adam": (["optim.name=adam"], "optim.weight_decay", "or optim.weight_decay=0"),
    "recovery after an early removal": (
        ["train.recovery_epochs=2"], "train.recovery_epochs", "only follow a removal at the end"),
    "recovery for imp": (
        ["pruning.method=imp", "train.recovery_epochs=2"], "train.recovery_epochs", "removes before it trains"),
    "recovery with a fixed mask": (
        ["pruning.method=constant", "model.start_from=x", "train.recovery_epochs=2"],
        "train.recovery_epochs", "removes nothing"),
    "a folder without a path": (["data.source=folder"], "data.path", "needs the path"),
    "a path for the digits": (["data.path=somewhere"], "data.path", "has no effect with the built-in digits"),
    "splits of the Hub": (
        ["data.source=cifar10", "data.splits={train: x}"], "data.splits", "names files of a local folder"),
    "splits without train": (
        ["data.source=cifar10", "data.path=x", "data.splits={val: x}"], "data.splits", "add train: GLOB"),
    "a revision of the digits": (["data.revision=main"], "data.revision", "the data are local; omit it"),
    "a revision of a folder": (
        ["data.source=cifar10", "data.path=x", "data.revision=main"], "data.revision", "the data are local; omit it"),
    "pretrained vit_tiny": (["model.pretrained=true"], "model.pretrained", "has no published weights"),
    "a word that others take for no": (["model.pretrained=no"], "model.pretrained", "expected true, false, a timm tag"),
    "pretrained and start_from": (
        ["model.name=vit_small", "model.pretrained=true", "model.start_from=x"], "model.pretrained", "keep one of"),
    "an argument without a blank": (
        ["model.args={depth:1}"], "model.args.depth:1", "put a space after the colon"),
    "a share above one": (["model.args={drop_path_rate: 1.5}"], "model.args.drop_path_rate", "is not a rate"),
    "a part of what is dropped": (
        ["model.args={attn_drop_rate: -0.1}"], "model.args.attn_drop_rate", "is not a rate"),
    "a number of classes": (["model.args.num_classes=5"], "model.args.num_classes", "is determined by the data"),
    "a warm-up as long as the epochs": (
        ["train.epochs=5", "optim.warmup_epochs=5"], "optim.warmup_epochs", "warm-up takes all 5 epochs"),
    "a decay past the end": (
        ["train.epochs=5", "optim.schedule={steps: [3, 5]}"], "optim.schedule.steps", "past the last of 5 epochs"),
    "a least rate above the rate": (["optim.min_lr=1"], "optim.min_lr", "is greater than optim.lr"),
    "movement without steps before": (
        ["pruning.criterion=movement", "model.start_from=x"], "pruning.criterion", "adds up over the steps"),
    "no rewind at rate 0": (["pruning.rewind=none"], "pruning.rewind", "set it, or use lr"),
    "a rewind to the end": (
        ["train.epochs=5", "pruning.rewind=epoch:5"], "pruning.rewind", "is not within round 0"),
    "a rewind into a round that is not trained": (
        ["model.start_from=x", "pruning.rewind=epoch:5"], "pruning.rewind", "round 0 is not trained"),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_a_broken_rule_is_reported_with_a_way_out(tmp_path, case):
    overrides, path, sentence = RULES[case]
    lines = complaints(tmp_path, "name: r\n", *overrides)
    assert [line for line in lines if f"  {path}: " in line and sentence in line], lines


def test_every_rule_is_broken_by_one_of_these_recipes(tmp_path, monkeypatch):
    text = Path(rules.__file__).read_text(encoding="utf-8")
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Yield) and "Problem(" in ast.unparse(n)]
    yields = [(n.lineno, n.end_lineno) for n in found]
    reported = []

    def problem(path: str, sentence: str) -> Problem:
        reported.append(sys._getframe(1).f_lineno)
        return Problem(path, sentence)

    monkeypatch.setattr(rules, "Problem", problem)
    for overrides, _, _ in RULES.values():
        with pytest.raises(InputError):
            load(written(tmp_path, "name: r\n"), overrides)
    unreported = [start for start, end in yields if not any(start <= line <= end for line in reported)]
    assert not unreported, f"no recipe here breaks the rules in these lines of rules.py: {unreported}"
    assert len(yields) >= 26


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("field", ["optim.lr", "optim.weight_decay"])
def test_numbers_must_be_finite(tmp_path, field, value):
    [line] = complaints(tmp_path, "name: r\n", f"{field}={value}")
    assert f"{field}: " in line
    assert "finite" in line or "out of range" in line


@pytest.mark.parametrize(
    "overrides, epochs",
    [
        ([], 7),
        (["model.start_from=t"], 7),
        (["pruning.schedule.rounds=0"], 7),
        (["pruning.schedule.rounds=2"], 7 + 2 * 3),
        (["pruning.schedule.rounds=2", "model.start_from=t"], 2 * 3),
        (["pruning.schedule=linear"], 7 + 10 * 3),
        (["pruning.schedule={name: explicit, sparsities: [0.5, 0.8]}"], 7 + 2 * 3),
    ],
)
def test_dense_trains_its_own_epochs_unless_a_schedule_is_named(tmp_path, overrides, epochs):
    text = "name: r\ntrain: {epochs: 7, round_epochs: 3}\npruning: {method: dense}\n"
    recipe = load(written(tmp_path, text), overrides)
    assert recipe.round_epochs == (epochs,)
    again = load(written(tmp_path, strict_yaml.dump(recipe.tree())))
    assert (again.round_epochs, again.fingerprint) == ((epochs,), recipe.fingerprint)


def test_rules_are_checked_despite_errors_in_other_fields(tmp_path):
    lines = complaints(tmp_path, "name: r\n", "train.global_batch=0", "pruning.schedule=explicit", "optim.min_lr=1")
    assert len(lines) == 3


def test_consequences_of_an_invalid_field_are_not_reported(tmp_path):
    [line] = complaints(tmp_path, "name: r\noptim: {warmup_epochs: 5, warmup_epoch: 3}\ntrain: {epochs: 20}\n")
    assert "optim.warmup_epoch: unknown key" in line


# -- what is recorded

VARIANTS = {
    "defaults": "name: r\n",
    "every kind of value": (
        "name: 'no'\nseed: 3\noptim: {schedule: {steps: [3, 5], gamma: 0.5}, lr: 1e30, weight_decay: 1e-12, "
        "clip_grad_norm: null}\npruning:\n  method: {name: gmp, window: [0.0, 1.0]}\n  schedule: linear\n"
        "  protect: ['*.qkv.weight']\nmodel: {args: {a: [1, 2.5], b: {c: null, d: 'true', e: '2:4'}}}\n"
        "tracking: {with: [tensorboard]}\n"
    ),
    "an explicit schedule": "name: r\npruning: {method: imp, schedule: {name: explicit, sparsities: [0.5, 0.75]}}\n",
    "texts that look like numbers": (
        "name: '1e3'\ndata: {source: cifar10, revision: '12e4567'}\nmodel: {name: '08', args: {a: '1e-3', b: '0o10', "
        "c: '2:4', d: 'on', e: '1_000', f: '.inf', g: '', h: '~', i: '019', j: 'é\\n', k: '.5e1'}}\n"
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recipe_saved_in_the_run_folder_loads_as_the_same_recipe(tmp_path, variant):
    recipe = load(written(tmp_path, VARIANTS[variant]))
    folder = RunFolder(tmp_path / "run")
    folder.open().release()
    folder.record(recipe, {})
    again = load(folder.path / "recipe.yaml")
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint
    folder.check(recipe)


def test_the_tree_contains_every_field():
    tree = load(recipes.find("digits/quickstart")).tree()
    for path, cls in SECTIONS:
        if cls.__name__ == "StepDecay":
            continue
        node = tree
        for key in path:
            node = node[key]
        assert node.keys() == {key_of(f) for f in dataclasses.fields(cls)}
    assert tree["pruning"]["method"]["name"] == "rsst"


def with_value(section: object, path: list[str], value: object) -> object:
    """The recipe with one field changed, whether or not that value would be accepted."""
    key = "trackers" if path[0] == "with" else path[0]
    child = value if len(path) == 1 else with_value(getattr(section, key), path[1:], value)
    return dataclasses.replace(section, **{key: child})


def test_the_fingerprint_depends_on_exactly_the_fields_that_affect_the_result(tmp_path):
    recipe = load(written(tmp_path, "name: r\noptim: {schedule: {steps: [3]}}\n"))
    free, decisive = 0, 0
    for leaf in [*LEAVES, "pruning.method.remove_at", "pruning.method.penalty.residual"]:
        if leaf == "pruning.method":
            continue
        changed = with_value(recipe, leaf.split("."), {"another": "value"})
        if any(leaf == name or leaf.startswith(f"{name}.") for name in FREE_FIELDS):
            assert changed.fingerprint == recipe.fingerprint, leaf
            free += 1
        else:
            assert changed.fingerprint != recipe.fingerprint, leaf
            decisive += 1
    method = load(written(tmp_path, "name: r\noptim: {schedule: {steps: [3]}}\npruning: {method: imp}\n"))
    assert method.fingerprint != recipe.fingerprint
    assert free == 16
    assert free + decisive == len(LEAVES) + 1
    assert re.fullmatch("[0-9a-f]{16}", recipe.fingerprint)


# -- the recipes of the repository

FILES = sorted((tiny.REPOSITORY / "recipes").rglob("*.yaml"))


def test_the_package_finds_every_recipe_of_the_repository():
    assert [path.resolve() for path in recipes.builtin_recipes()] == FILES
    found = {str(path.relative_to(tiny.REPOSITORY / "recipes")) for path in FILES}
    assert found >= {"digits/quickstart.yaml", "cifar10/cpu_rsst.yaml", "reference.yaml"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(tiny.REPOSITORY / "recipes")))
def test_every_built_in_recipe_loads_and_describes_itself(path):
    recipe = load(path)
    assert recipe.name
    assert path.read_text(encoding="utf-8").startswith("# "), "its first line is what `vit-rsst recipes` shows"


def test_built_in_recipes_have_distinct_run_folders():
    names = [load(path).name for path in FILES]
    assert len(set(names)) == len(names) == len(FILES)


def test_the_reference_recipe_shows_every_field():
    path = tiny.REPOSITORY / "recipes" / "reference.yaml"
    text = path.read_text(encoding="utf-8")
    given = {".".join(key) for key in strict_yaml.parse(text).lines}
    recipe = load(path)

    def is_shown(place: tuple[str, ...], owner: str | None = None) -> bool:
        """Given as a key; a field of what the recipe did not choose may stand in a comment that names its owner."""
        if ".".join(place) in given:
            return True
        lines = [line for line in text.splitlines() if owner is None or re.search(rf"\b{owner}\b", line)]
        return any(re.search(rf"#.*(?<![\w.]){re.escape(place[-1])}:", line) for line in lines)

    missing = []
    for place, cls in SECTIONS:
        for f in dataclasses.fields(cls):
            owner = "steps" if cls.__name__ == "StepDecay" else None
            if not is_shown((*place, key_of(f)), owner):
                missing.append(".".join((*place, key_of(f))))
    for name, place, cls in METHOD_SECTIONS:
        is_chosen = name == recipe.pruning.method_name
        if name == "rst":
            assert [f.name for f in dataclasses.fields(METHODS["rst"])] == ["penalty", "remove_at"]  # shown as rsst's
            continue
        for f in dataclasses.fields(cls):
            key = (*place, key_of(f))
            if not (".".join(key) in given if is_chosen else is_shown((name, key_of(f)), name)):
                missing.append(f"{'.'.join(key)} of {name}")
    assert not missing


# -- plugins

PLUGIN = '''\
"""mine: removes at once, like imp, and takes an option."""

from dataclasses import dataclass
from typing import ClassVar

from vit_rsst.pruning.plan import RoundPlan, register_method


@register_method("mine")
@dataclass(frozen=True)
class Mine:
    one_round: ClassVar[bool] = False
    strength: float = 1.0

    def plan(self, round, view):
        return RoundPlan(mask=view.mask if round == 0 else view.elements(view.density(round / view.rounds)))
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "my_plugin.py").write_text(PLUGIN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_plugin"
    METHODS._parts.pop("mine", None)
    sys.modules.pop("my_plugin", None)


def test_a_plugin_method_is_a_method_like_any_other(tmp_path, plugin):
    head = f"name: r\nplugins: [{plugin}]\n"
    recipe = load(written(tmp_path, f"{head}pruning: {{method: {{name: mine, strength: 2}}}}\n"))
    assert recipe.pruning.method.strength == 2.0
    assert recipe.tree()["pruning"]["method"] == {"name": "mine", "strength": 2.0}
    [line] = complaints(tmp_path, f"{head}pruning: {{method: {{name: mine, strenght: 2}}}}\n")
    assert "did you mean 'strength'?" in line


def test_a_plugin_method_trains(tmp_path, plugin):
    recipe = tiny.write_recipe(tmp_path, tiny.RECIPE.replace("{name: rsst, remove_at: 0.8}", "mine"))
    assert tiny.command("train", recipe, f"plugins=[{plugin}]", "train.epochs=1", "train.round_epochs=1") == 0
    assert (tmp_path / "runs" / "tiny" / "tickets" / "round_02.safetensors").exists()


def test_a_missing_plugin_is_named_in_the_error(tmp_path):
    [line] = complaints(tmp_path, "name: r\nplugins: [no_such_plugin]\n")
    assert "no_such_plugin" in line
    assert "PYTHONPATH" in line


@pytest.mark.parametrize(
    "text, error", [("def (", "SyntaxError"), ("unknown + 1", "NameError"), ("1 / 0", "ZeroDivisionError")]
)
def test_a_failing_plugin_is_reported_with_the_reason(tmp_path, monkeypatch, text, error):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text(text)
    [line] = complaints(tmp_path, "name: r\nplugins: [broken_plugin]\n")
    assert f"'broken_plugin' cannot be imported ({error}: " in line


@pytest.mark.parametrize("args", ["growth_rate: 16", "drop_path_rate: [0.0, 0.1]", "drop_rate: 0.1"])
def test_unknown_rates_are_left_to_the_model(tmp_path, args):
    assert load(written(tmp_path, "name: r\n"), [f"model.args={{{args}}}"]).model.args


@pytest.mark.parametrize("name", ["''", "'.x'", "'a b'"])
def test_an_invalid_plugin_name_is_an_error(tmp_path, name):
    [line] = complaints(tmp_path, f"name: r\nplugins: [{name}]\n")
    assert "cannot be imported" in line


def test_the_method_of_a_plugin_that_is_not_listed_is_unknown(tmp_path):
    [line] = complaints(tmp_path, "name: r\npruning: {method: mine}\n")
    assert "unknown method 'mine'" in line
