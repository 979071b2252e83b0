"""The launcher of old command lines: old arguments become a recipe and overrides, and a run like any other.

Where nothing is trained, a stand-in for python records what would have been started.
"""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from vit_rsst.cli import launcher
from vit_rsst.cli.old_names import ALGORITHMS, CHOICES, FIELDS, LABELS, OF_ONE_ROUND, OTHERS, Arguments, translate_
from vit_rsst.pruning.methods import METHODS
from vit_rsst.recipe.loading import find, load
from vit_rsst.recipe.schema import Recipe

SCRIPT = tiny.REPOSITORY / "scripts" / "launch_experiment.sh"

EXAMPLES = """\
cifar10  vit_tiny 80 1.0 4 true 0.2 y rsst
cifar10  vit_tiny 80 1.0 4 false 0.2 y rsst
cifar10  vit_small 80 1.0 4 true 0.2 y rsst
cifar10  vit_small 80 1.0 4 false 0.2 y rsst
cifar10  vit_base 80 1.0 4 true 0.2 y rsst
cifar100 vit_base 80 1.0 4 true 0.2 y rsst
cifar100 vit_small 80 1.0 4 true 0.2 y rsst
cifar100 vit_small 80 1.0 4 true 0.2 y refill 0.2
imagenet vit_small_imagenet 100 1.0 4 true 0.2 y rsst
imagenet vit_base_imagenet 100 1.0 4 true 0.2 y rsst
imagenet vit_large_imagenet 100 1.0 4 true 0.2 y rsst
""".splitlines()
TINY = EXAMPLES[1].split()

STAND_IN = """\
#!/usr/bin/env bash
printf '%s\\n' "$@" >>"$STARTED"
cat
eval "${DO-}"
"""

PYTHON = sys.executable

IN_PLACE_OF_PYTHON = """\
import sys
from vit_rsst.cli import launcher
sys.executable = sys.argv.pop(1)
sys.exit(launcher.main(sys.argv[1:]))
"""

SHORT = [
    "train.steps_per_epoch=1",
    "train.global_batch=8",
    "train.batch_per_device=null",
    "pruning.schedule.rounds=1",
    "pruning.min_neurons=1",
    "data.image_size=16",
    "data.val_fraction=0.2",
    "data.workers=0",
    "model.args={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 6}",
    "tracking={figures: false}",
]


class Place:
    """A folder with spaces in its name, to launch from within this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
        self.folder, self.monkeypatch, self.capsys = folder / "a folder", monkeypatch, capsys
        self.folder.mkdir()
        self.python, self.started = folder / "stand in", folder / "started"
        self.run = self.folder / "runs" / "cifar10-vit_tiny-rsst-80-1.0-4-false-0.2-0"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        self.variables = {"STARTED": str(self.started), "RUN": str(self.run), "PROCESSES": "1"}
        monkeypatch.chdir(self.folder)
        monkeypatch.setattr(sys, "executable", str(self.python))
        monkeypatch.setattr("vit_rsst.assembly.planning.plan_text", lambda recipe, world: f"plan of {recipe.name}")

    def launch(self, words: list[str], answer: str = "", **variables: str) -> SimpleNamespace:
        self.capsys.readouterr()
        with self.monkeypatch.context() as context:
            for name, value in (self.variables | variables).items():
                context.setenv(name, value)
            context.setattr(sys, "stdin", io.StringIO(answer))
            code = launcher.main(words)
        out, err = self.capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    @property
    def arguments(self) -> list[str]:
        """Recipe and overrides of what was started."""
        words = self.started.read_text().splitlines()
        return words[words.index("vit_rsst.train") + 1 :]


@pytest.fixture
def place(tmp_path, monkeypatch, capsys) -> Place:
    return Place(tmp_path, monkeypatch, capsys)


def script(words: list[str], folder: Path, python: Path | str = PYTHON, **more: str):
    return subprocess.run(
        [SCRIPT, *words], cwd=folder, env=tiny.environment(PYTHON=str(python), PROCESSES="1") | more,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def translated(words: list[str]) -> tuple[Arguments, Path, list[str], Recipe]:
    """The arguments, and the recipe file, overrides and recipe they become."""
    old, _ = launcher.parse(words)
    file = find(translate_(old))
    overrides = [*old.made, *old.user_overrides]
    return old, file, overrides, load(file, overrides)


def shortened(line: str, data: Path) -> list[str]:
    """The words of an example with EPOCHS 1 and what makes it a matter of seconds."""
    words = line.split()
    words[2] = "1"
    source = words[0].replace("imagenet", "imagenet1k")
    if not data.exists():
        tiny.write_images(data, source)
    return [*words, f"data.path={data}", *SHORT]


def own_weights(folder: Path) -> str:
    """Of a model of the shortened shape, as timm saves them."""
    import timm
    from timm.models import save_for_hf

    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 6, "num_classes": 3}
    save_for_hf(timm.create_model("vit_small_patch16_224", **shape), folder, safe_serialization=True, model_args=shape)
    return f"model.pretrained={folder}"


# -- what the words become


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_becomes_a_recipe_that_has_a_plan(line, capsys):
    assert launcher.main([*line.split(), "--dry-run"]) == 0
    told = capsys.readouterr().out
    _, file, _, made = translated(line.split())
    assert file.is_relative_to(tiny.REPOSITORY / "recipes")
    assert f"plan of {made.name}" in told
    dataset, model, epochs, _, _, pretrained, _, _, algorithm, *fill = line.split()
    assert made.data.source == dataset.replace("imagenet", "imagenet1k")
    assert made.model.name == model
    assert set(made.round_epochs) == {int(epochs)}
    assert made.model.pretrained == (pretrained == "true" and model != "vit_tiny")
    assert (made.pruning.method_name, made.pruning.schedule.rate) == (algorithm, 0.2)
    assert len(made.round_epochs) == 1 + (12 if fill else 20)
    if made.model.name != "vit_large_imagenet":
        fine_tuned = made.model.pretrained
        assert (made.optim.layer_decay == 0.75, made.optim.lr == 1e-4) == (fine_tuned, fine_tuned)
    if fill:
        assert made.pruning.granularity == "head+neuron"
        assert made.pruning.method.refill_ratio == 0.2
        assert "REG 1.0 and EXP 4 are ignored" in told
    else:
        penalty = made.pruning.method.penalty
        assert (penalty.strength, penalty.exponent, penalty.ramp) == (1.0, 4.0, "exponential")
    assert ("PRETRAINED true became false" in told) == (line == EXAMPLES[0])


OPTIONS = {
    "--criteria remain --vit_structured": {"criterion": "survivors", "granularity": "head"},
    "--criteria l1": {"criterion": "activation_l1"},
    "--criteria l2": {"criterion": "activation_l2"},
    "--criteria saliency": {"criterion": "saliency"},
    "--pick_pruned rand": {"criterion": "random"},
    "--sorting_mode layer-wise": {"scope": "layer"},
    "--vit_prune_target mlp": {"granularity": "neuron"},
    "--vit_structured true --vit_prune_target both --mlp_prune_ratio 0.4": {
        "granularity": "head+neuron", "schedule.rate": {"head": 0.2, "neuron": 0.4}, "schedule.rounds": 4},
    "--prune_type lt": {"rewind": "init"},
    "--prune_type rewind_lt": {"rewind": "epoch:24"},
    "--rewind_epoch 8": {"rewind": "epoch:8"},
    "--prune_type pt": {"rewind": "lr"},
    "--RST_schedule exp": {"method.penalty.ramp": "exponential", "method.penalty.exponent": 1.0},
    "--RST_schedule x^2 --reg_upper_limit 1.5": {"method.penalty.ramp": "quadratic", "method.penalty.strength": 1.5},
    "--reg_granularity_prune 0.5 --exponents=3": {"method.penalty.strength": 0.5, "method.penalty.exponent": 3.0},
    "--block_loss_grad": {"method.penalty.condemned_gradient": False},
    "--block_loss_grad false": {"method.penalty.condemned_gradient": True},
    "--stabilize_reg_interval 2812.5": {"method.remove_at": 0.5},
    "--stabilize_reg_interval 40000": {"method.remove_at": 1.0, "train.recovery_epochs": 80},
    "--pruning_times 15 --px 0.12": {"schedule.rounds": 15, "schedule.rate": 0.12},
    "--struct rst --num_cycles 3": {"method_name": "rst", "schedule.rounds": 3},
    "--struct refill --fillback-rate 0.1": {"method.refill_ratio": 0.1, "schedule.rounds": 7},
    "--conv1 --fc": {"include": ("patch_embed.*", "head.*")},
    "--conv1 false": {"protect": ("patch_embed.*",)},
    "--decreasing_lr 40,60 --warmup 9": {"optim.schedule.steps": (40.0, 60.0), "optim.warmup_epochs": 9.0},
    "--batch_size 64 --lr 5e-4 --weight_decay 1e-4 --momentum 0.8": {
        "train.global_batch": 64, "optim.lr": 5e-4, "optim.weight_decay": 1e-4, "optim.momentum": 0.8,
        "optim.name": "sgd"},
    "--seed 42 --workers 3 --print_freq 7": {"seed": 42, "data.workers": 3, "train.log_every_steps": 7},
    "--save_dir 'my runs' --exp_name 007 --data ~/images": {
        "output_dir": "my runs", "name": "007", "data.path": "~/images"},
    "--dataset cifar100 --arch vit_small --epochs 3 --vit_pretrained_21k": {
        "data.source": "cifar100", "model.name": "vit_small", "train.epochs": 3, "optim.warmup_epochs": 0.75,
        "model.pretrained": "augreg_in21k"},
    "--vit_pretrained_21k": {"model.pretrained": False},
    "--dataset imagenet --arch vit_base_imagenet": {
        "model.pretrained": False, "optim.lr": 1e-3, "optim.layer_decay": 1.0, "optim.warmup_epochs": 5},
    "--dataset imagenet --arch vit_base_imagenet --epochs 8 --lr 0.5": {
        "optim.lr": 0.5, "optim.layer_decay": 0.75, "optim.warmup_epochs": 1},
    "--dataset imagenet --arch vit_base_imagenet --epochs 8": {"optim.lr": 1e-3, "optim.warmup_epochs": 2},
    "--dataset imagenet --arch vit_large_imagenet model.pretrained=FOLDER": {
        "model.pretrained": "FOLDER", "optim.lr": 5e-5, "optim.layer_decay": 0.8},
    "--arch res20s --struct refill": {
        "model.name": "resnet20", "granularity": "channel", "schedule.rounds": 17, "optim.name": "sgd", "optim.lr": 0.1,
        "optim.weight_decay": 5e-4, "data.augment.mixup": 0, "train.label_smoothing": 0},
    "--seed 1 --criteria l1": {"name": "cifar10-vit_tiny-rsst-80-1.0-4-false-0.2-0-s1-l1"},
    "--lr 0.1 optim.lr=0.2 train.epochs=9": {"optim.lr": 0.2, "train.epochs": 9},
}  # fmt: skip
"""Old options after the positionals → fields of the recipe; those without a section are pruning's."""


@pytest.mark.parametrize("options", OPTIONS)
def test_an_old_option_becomes_a_field(options):
    _, _, overrides, recipe = translated([*TINY, *shlex.split(options)])
    for field, expected in OPTIONS[options].items():
        value = recipe
        if not hasattr(recipe, field.split(".")[0]):
            value = recipe.pruning
        for key in field.split("."):
            value = getattr(value, key)
        assert value == expected, f"{field} of {overrides}"


def test_every_old_name_of_an_option_is_in_the_usage_and_in_these_tests(capsys):
    assert launcher.main(["--help"]) == 0
    usage = set(re.findall(r"--(\w+)", capsys.readouterr().out.split("Old names")[1]))
    tested = {name.replace("-", "_") for name in re.findall(r"--([\w-]+)", " ".join(OPTIONS))}
    assert usage == {*CHOICES, *FIELDS, *OTHERS, *LABELS} == tested | {"vit_pretrained", "rate"}


@pytest.mark.parametrize(
    "words, told",
    [
        ("cifar10 vit_small 80 1.0 4 true 0.2 y rsst", "still started from random weights"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst", "the old λ never exceeded 0.003"),
        ("cifar10 vit_tiny 80 0.5 4 false 0.2 y rsst", "0.0316228 of their size"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst", "the old RSST trained dense"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --RST_schedule x", "EXP 4 is ignored"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --RST_schedule x", "REG was added to the ramp's argument"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y imp", "REG 1.0 and EXP 4 are ignored"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y dense", "RATE 0.2 is ignored"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y gmp", "the same total number of epochs"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --criteria l1", "it used rewound weights"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --pruning_times 5", "never trained its last one"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --lr 0.1", "AdamW is used here; --momentum 0.9 selects SGD"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --momentum 0.9", "SGD needs a larger one: set --lr"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --vit_pretrained_21k", "vit_pretrained_21k true became false"),
        ("cifar10 vit_tiny 80 1.0 4 false 0.2 y refill", "ONLY 7 ROUNDS INSTEAD OF 20"),
    ],
)
def test_a_broken_old_meaning_is_warned_of(words, told):
    assert told in "\n".join(translated(words.split())[0].warnings)


def test_the_printed_command_is_the_one_that_is_started(place):
    done = place.launch([*TINY, "--exp_name", "it's mine", "data.path=/some where"])
    command = done.stdout.split("without this script:\n")[1].splitlines()[0]
    words = shlex.split(command)
    assert words[words.index("vit_rsst.train") + 1 :] == place.arguments
    assert load(find(place.arguments[0]), place.arguments[1:]).name == "it's mine"
    assert "warning: the old RSST trained dense" in done.stdout


# -- what is wrong


WRONG = {
    "cifar1 vit_tiny 80 1.0 4 false 0.2 y rsst": "DATASET: unknown value 'cifar1'; expected one of: cifar10 cifar100",
    "cifar10 vit_huge 80 1.0 4 false 0.2 y rsst": "MODEL: unknown value 'vit_huge'; expected one of: vit_tiny",
    "imagenet vit_tiny 80 1.0 4 false 0.2 y rsst": "MODEL: unknown value 'vit_tiny'; expected one of: vit_small_",
    "cifar10 vit_tiny 0 1.0 4 false 0.2 y rsst": "EPOCHS: '0' is not a whole number from 1 to 99999",
    "cifar10 vit_tiny 1.5 1.0 4 false 0.2 y rsst": "EPOCHS: '1.5'",
    "cifar10 vit_tiny 80 -1 4 false 0.2 y rsst": "REG: '-1' is not a number above 0",
    "cifar10 vit_tiny 80 1.0 zero false 0.2 y rsst": "EXP: 'zero' is not a number above 0",
    "cifar10 vit_tiny 80 1.0 4 yes 0.2 y rsst": "PRETRAINED: unknown value 'yes'; expected one of: true false",
    "cifar10 vit_tiny 80 1.0 4 false 1 y rsst": "RATE: '1' is not a number above 0 and below 1",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 maybe rsst": "AUTO: unknown value 'maybe'; expected one of: y n",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rst2": "ALGORITHM: unknown value 'rst2'; expected one of: rsst refill dense",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y refill 1.1": "FILLBACK: '1.1' is not a number of at least 0 and below 1",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y refill 1": "FILLBACK: '1' is not a number of at least 0 and below 1",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst 0.2": "FILLBACK: '0.2' has no effect with rsst, which",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst 0 more": "'more': too many arguments",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y": "ALGORITHM: missing",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --lr": "--lr: missing value",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --lr --seed 1": "--lr: missing value",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --lr=": "--lr: missing value",
    "cifar10 res20s 80 1.0 4 false 0.2 y refill 0.1 --vit_prune_target head": "resnet20 has channels, no heads or MLPs",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --learning 1": "--learning: unknown option; expected one of: --yes",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --bogus": "--bogus: unknown option; expected one of: --yes",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --": "--: unknown option",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst -y": "-y: unknown option",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y imp --RST_schedule x": "--RST_schedule: has no effect with",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y gmp --prune_type lt": "--prune_type: has no effect with the other arguments",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y dense --rewind_epoch 8": "--rewind_epoch: has no effect with the other",
    "cifar10 vit_tiny 80 1.0 4 0.2 y rsst": "PRETRAINED: unknown value '0.2'",
    "cifar10 vit_tiny 1.0 4 false 0.2 y rsst": "EPOCHS: '1.0' is not a whole number",
    "imagenet vit_large_imagenet 9 1.0 4 false 0.2 y rsst": "PRETRAINED: vit_large_imagenet needs weights",
    "data.path=images": "DATASET: missing",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --criteria l3": "criteria: unknown value 'l3'; expected one of: remain",
    "": "DATASET: missing",
}


def test_methods_of_one_round_are_those_of_the_package():
    assert {name for name in ALGORITHMS if METHODS[name].one_round} == set(OF_ONE_ROUND)


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_word_is_named_with_its_choices_before_anything_is_started(words, place):
    done = place.launch(words.split())
    assert done.returncode == 2
    assert WRONG[words] in done.stderr
    assert "usage: launch_experiment.sh DATASET MODEL" in done.stderr
    assert "ALGORITHM   rsst | refill" in done.stderr
    assert list(place.folder.iterdir()) == []


@pytest.mark.parametrize("place_of_the_word", range(10))
def test_an_empty_word_is_no_word_left_out(place, place_of_the_word):
    words = ["cifar10", "vit_tiny", "80", "1.0", "4", "false", "0.2", "y", "refill", "0.1"]
    words[place_of_the_word] = ""
    done = place.launch(words)
    assert done.returncode == 2
    labels = ("DATASET", "MODEL", "EPOCHS", "REG", "EXP", "PRETRAINED", "RATE", "AUTO", "ALGORITHM", "FILLBACK")
    assert f"error: {labels[place_of_the_word]}: " in done.stderr


def test_a_number_of_processes_that_is_none_is_refused(place):
    done = place.launch(TINY, PROCESSES="x")
    assert done.returncode == 2
    assert "PROCESSES: 'x' is not a positive whole number" in done.stderr


def test_a_field_that_the_recipe_refuses_ends_it_before_anything_is_started(place):
    done = place.launch([*TINY, "--lr", "fast", "train.epoch=3"])
    assert done.returncode == 2
    assert "optim.lr: 'fast' is not a number" in done.stderr
    assert "train.epoch: unknown key" in done.stderr
    assert not (place.folder / "runs").exists()


def test_an_interpreter_without_the_packages_is_said(tmp_path):
    bare = tmp_path / "bare python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    done = script(TINY, tmp_path, bare)
    assert done.returncode == 3
    assert "run scripts/quickstart, or set PYTHON" in done.stderr


# -- asking, starting, ending


@pytest.mark.parametrize("answer, starts", [("y\n", True), ("y", True), ("n\n", False), ("\n", False), ("", False)])
def test_without_auto_the_plan_is_shown_and_only_a_yes_starts(answer, starts, place):
    words = [*TINY[:7], "n", "rsst"]
    done = place.launch(words, answer)
    assert done.returncode == 0
    assert "Start? [y/N]" in done.stdout
    assert ("nothing was started" in done.stdout) != starts
    assert f"plan of {place.run.name}" in done.stdout
    assert place.started.exists() == place.run.exists() == starts


@pytest.mark.parametrize(
    "auto, more, shows_plan", [("y", [], False), ("n", ["--yes"], True), ("y", ["--dry-run"], True)]
)
def test_auto_and_yes_ask_nothing(auto, more, shows_plan, place):
    done = place.launch([*TINY[:7], auto, "rsst", *more])
    assert done.returncode == 0
    assert "[y/N]" not in done.stdout
    assert ("plan of" in done.stdout) == shows_plan
    assert place.started.exists() == place.run.exists() == (more != ["--dry-run"])


def test_the_exit_code_of_the_training_is_that_of_the_script_and_its_output_is_kept(place):
    done = place.launch(TINY, DO="echo said; echo complained >&2; exit 75")
    assert done.returncode == 75
    [log] = (place.run / "logs").glob("launch-*.log")
    told = log.read_text()
    assert "pruning.schedule={rounds: 20, rate: 0.2}" in told
    assert told.endswith("said\ncomplained\n")
    assert "said\ncomplained\n" in done.stdout
    assert f"log: {log.relative_to(place.folder)}" in done.stdout


def test_a_restart_is_passed_on_and_keeps_its_log(place):
    (place.run / "old").mkdir(parents=True)
    done = place.launch([*TINY, "--restart", "--allow-data-change"], DO='mv "$RUN" "$RUN.old-1"; mkdir "$RUN"')
    assert done.returncode == 0, done.stderr
    assert place.arguments[-2:] == ["--restart", "--allow-data-change"]
    assert len(list((place.run / "logs").glob("launch-*.log"))) == 1
    assert [path.name for path in Path(f"{place.run}.old-1").iterdir()] == ["old"]
    new = place.folder / "runs" / "new"
    words = [*TINY, "--exp_name", "new", "--restart"]
    assert place.launch(words, RUN=str(new), DO='touch "$RUN/.lock"; mv "$RUN" "$RUN.old-1"').returncode == 0
    assert not Path(f"{new}.old-1").exists()
    assert len(list((new / "logs").glob("launch-*.log"))) == 1


def test_several_processes_are_launched_and_the_exit_code_read_from_the_status(place):
    wrote = """echo '{"state": "stopped", "exit_code": 75}' >"$RUN/status.json"; exit 1"""
    running = """echo '{"state": "running", "exit_code": null}' >"$RUN/status.json"; exit 1"""
    done = place.launch(TINY, PROCESSES="2", DO=wrote)
    assert done.returncode == 75
    started = place.started.read_text().split("\n")
    assert started[:2] == ["-m", "accelerate.commands.launch"]
    assert started[started.index("--num_processes") + 1] == "2"
    assert place.launch(TINY, PROCESSES="2", DO=running).returncode == 1
    assert place.launch(TINY, PROCESSES="2", DO="exit 1").returncode == 1  # what an earlier run said is not its own


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_training_once_and_its_end_is_waited_for(number, place):
    do = "trap 'echo caught; sleep 0.2; exit 75' TERM INT USR1; touch \"$RUN/ready\"; while :; do sleep 0.05; done"
    with subprocess.Popen(
        [PYTHON, "-c", IN_PLACE_OF_PYTHON, place.python, *TINY],
        env=tiny.environment(DO=do, **place.variables), text=True, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        while not (place.run / "ready").exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, number)
        try:
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 75
    assert out.count("caught") == 1


def test_a_launched_experiment_is_a_run_as_any_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    done = script(shortened(EXAMPLES[0], tmp_path / "some images"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[y/N]" not in done.stdout
    assert "THERE ARE NO PRETRAINED WEIGHTS FOR vit_tiny" in done.stdout
    run = tmp_path / "runs" / "cifar10-vit_tiny-rsst-1-1.0-4-false-0.2-0"
    assert tiny.status(run)["state"] == "finished"
    [log] = (run / "logs").glob("launch-*.log")
    assert "The last ticket holds" in log.read_text()
    assert tiny.command("runs", tmp_path / "runs") == 0
    assert re.search(rf"{run.name}.*finished", capsys.readouterr().out)


def train_here(line: str, folder: Path, *more: str) -> int:
    """Trains what a shortened example becomes within this process; returns the exit code."""
    _, file, overrides, _ = translated([*shortened(line, folder / "images"), *more, f"output_dir={folder / 'runs'}"])
    return tiny.command("train", file, *overrides)


def test_a_refill_begins_with_weights_of_ones_own(tmp_path):
    assert train_here(EXAMPLES[7], tmp_path, own_weights(tmp_path / "weights"), "name=mine") == 0
    assert json.loads((tmp_path / "runs" / "mine" / "environment.json").read_text())["weights"]


def test_an_example_of_imagenet_trains_on_a_few_images(tmp_path):
    assert train_here(EXAMPLES[9], tmp_path, own_weights(tmp_path / "weights"), "name=few") == 0
    assert tiny.status(tmp_path / "runs" / "few")["state"] == "finished"


def test_published_weights_that_cannot_be_had_stop_the_run_with_one_sentence(tmp_path, capfd):
    assert train_here(EXAMPLES[2], tmp_path) == 3
    told = capfd.readouterr().err
    assert len(re.findall("error:", told)) == 1
    assert "model.pretrained" in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_trains(line, tmp_path):
    own = [] if "true" not in line or "vit_tiny" in line else [own_weights(tmp_path / "weights")]
    done = script([*shortened(line, tmp_path / "images"), *own], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_and_their_exit_code_is_passed_on(tmp_path):
    words = [*shortened(EXAMPLES[1], tmp_path / "images"), "name=two"]
    done = script(words, tmp_path, PROCESSES="2", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"processes": 2' in (tmp_path / "runs" / "two" / "environment.json").read_text()
    again = script([*words, "seed=5"], tmp_path, PROCESSES="2", ACCELERATE_USE_CPU="true")
    assert again.returncode == 2, again.stdout
    assert "holds a run of a different recipe" in again.stdout
