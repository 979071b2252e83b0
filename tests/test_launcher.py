"""The launch script: old positionals and options become a recipe and overrides, said aloud, and a run as any other.

Where nothing is trained, a stand-in for python writes down what would have been started.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from vit_rsst.recipe.loading import load

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
case $1 in
    -) echo "$RUN" ;;     # asked for the run folder
    -c) ;;                # asked what there is
    -m) printf '%s\\n' "$@" >>"$STARTED"; cat; eval "${DO-}" ;;
esac
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


def heeds_interrupts() -> None:
    """What was started in the background of a shell ignores SIGINT, and bash lets its children do the same."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Place:
    """A folder with spaces in its name, to launch from."""

    def __init__(self, folder: Path):
        self.folder = folder / "a folder"
        self.folder.mkdir()
        self.python, self.started, self.run = (self.folder / name for name in ("stand in", "started", "run"))
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def start(self, words: list[str], python: Path | str = "", **variables: str) -> subprocess.Popen:
        more = {"PYTHON": str(python or self.python), "STARTED": str(self.started), "RUN": str(self.run)}
        return subprocess.Popen(
            [str(SCRIPT), *words], cwd=self.folder, env=tiny.environment(PROCESSES="1") | more | variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=heeds_interrupts,
        )  # fmt: skip

    def launch(self, words: list[str], answer: str = "", **more: str) -> subprocess.CompletedProcess:
        with self.start(words, **more) as process:
            out, err = process.communicate(answer, timeout=100)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def train(self, words: list[str], answer: str = "", **more: str) -> subprocess.CompletedProcess:
        """For real, by this python."""
        return self.launch(words, answer, python=sys.executable, **more)

    @property
    def arguments(self) -> list[str]:
        """Recipe and overrides of what was started."""
        words = self.started.read_text().splitlines()
        return words[words.index("vit_rsst.train") + 1 :]


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


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
def test_an_example_becomes_a_recipe_that_has_a_plan(line, place, capsys):
    done = place.launch(line.split())
    assert done.returncode == 0, done.stderr
    recipe, *overrides = place.arguments
    assert tiny.command("train", recipe, *overrides, "--dry-run") == 0
    assert f"plan of {overrides[-1].removeprefix('name=')}" in capsys.readouterr().out
    dataset, model, epochs, _, _, pretrained, _, _, algorithm, *fill = line.split()
    made = load(Path(recipe), overrides)
    assert Path(recipe).is_relative_to(tiny.REPOSITORY / "recipes")
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
        assert "REG 1.0 and EXP 4 are ignored" in done.stdout
    else:
        penalty = made.pruning.method.penalty
        assert (penalty.strength, penalty.exponent, penalty.ramp) == (1.0, 4.0, "exponential")
    assert ("PRETRAINED true became false" in done.stdout) == (line == EXAMPLES[0])


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
def test_an_old_option_becomes_a_field(options, place):
    done = place.launch([*TINY, *shlex.split(options)])
    assert done.returncode == 0, done.stderr
    file, *overrides = place.arguments
    recipe = load(Path(file), overrides)
    for field, expected in OPTIONS[options].items():
        value = recipe
        if not hasattr(recipe, field.split(".")[0]):
            value = recipe.pruning
        for key in field.split("."):
            value = getattr(value, key)
        assert value == expected, f"{field} of {overrides}"


def test_every_old_name_of_an_option_is_in_the_usage_and_in_these_tests():
    usage = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    options = re.search(r"--OLD-NAME  (.*?)KEY=VALUE", usage, re.DOTALL)[1]
    names = set(re.findall(r"\w+", options)) - {"the", "positionals", "are", "also", "or", "and"}
    tested = {name.replace("-", "_") for name in re.findall(r"--([\w-]+)", " ".join(OPTIONS))}
    assert names == tested | {"vit_pretrained", "rate"}


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
def test_a_broken_old_meaning_is_warned_of(words, told, place):
    assert told in place.launch(words.split()).stdout


def test_the_printed_command_is_the_one_that_is_started(place):
    done = place.launch([*TINY, "--exp_name", "it's mine", "data.path=/some where"])
    command = done.stdout.split("without this script:\n")[1].splitlines()[0]
    words = shlex.split(command)
    assert words[words.index("vit_rsst.train") + 1 :] == place.arguments
    assert load(Path(place.arguments[0]), place.arguments[1:]).name == "it's mine"


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
    "cifar10 vit_tiny 80 1.0 4 0.2 y rsst": "PRETRAINED: unknown value '0.2'",
    "cifar10 vit_tiny 1.0 4 false 0.2 y rsst": "EPOCHS: '1.0' is not a whole number",
    "imagenet vit_large_imagenet 9 1.0 4 false 0.2 y rsst": "PRETRAINED: vit_large_imagenet needs weights",
    "data.path=images": "DATASET: missing",
    "cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst --criteria l3": "criteria: unknown value 'l3'; expected one of: remain",
    "": "DATASET: missing",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_word_is_named_with_its_choices_before_anything_is_started(words, place):
    done = place.launch(words.split())
    assert done.returncode == 2
    assert WRONG[words] in done.stderr
    assert "usage: launch_experiment.sh DATASET MODEL" in done.stderr
    assert "ALGORITHM   rsst | refill" in done.stderr
    assert sorted(path.name for path in place.folder.iterdir()) == ["stand in"]


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


def test_an_old_bash_is_said_before_it_stumbles(tmp_path):
    old = tmp_path / "old.sh"
    old.write_text("VERSION=(3 2)\n" + SCRIPT.read_text(encoding="utf-8").replace("BASH_VERSINFO", "VERSION"))
    done = subprocess.run(["bash", old], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "4.4 or newer is required" in done.stderr


def test_a_field_that_the_recipe_refuses_ends_it_before_anything_is_started(place):
    done = place.train([*TINY, "--lr", "fast", "train.epoch=3", "output_dir=runs"])
    assert done.returncode == 2
    assert "optim.lr: 'fast' is not a number" in done.stderr
    assert "train.epoch: unknown key" in done.stderr
    assert not (place.folder / "runs").exists()


def test_an_interpreter_without_the_packages_is_said(place):
    place.python.write_text("#!/bin/sh\nexit 1\n")
    done = place.launch(TINY)
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
    assert place.started.read_text().count("vit_rsst.train") == 1 + starts
    assert place.started.read_text().count("--dry-run") == 1
    assert place.run.exists() == starts


@pytest.mark.parametrize("auto, more, times", [("y", [], 1), ("n", ["--yes"], 2), ("y", ["--dry-run"], 1)])
def test_auto_and_yes_ask_nothing(auto, more, times, place):
    done = place.launch([*TINY[:7], auto, "rsst", *more])
    assert done.returncode == 0
    assert "[y/N]" not in done.stdout
    assert place.started.read_text().count("vit_rsst.train") == times
    assert place.run.exists() == (more != ["--dry-run"])


def test_the_exit_code_of_the_training_is_that_of_the_script_and_its_output_is_kept(place):
    done = place.launch(TINY, DO="echo said; echo complained >&2; exit 75")
    assert done.returncode == 75
    [log] = (place.run / "logs").glob("launch-*.log")
    told = log.read_text()
    assert "pruning.schedule={rounds: 20, rate: 0.2}" in told
    assert told.endswith("said\ncomplained\n")
    assert "said\ncomplained\n" in done.stdout
    assert str(log) in done.stdout


def test_a_restart_is_passed_on_and_keeps_its_log(place):
    (place.run / "old").mkdir(parents=True)
    done = place.launch([*TINY, "--restart", "--allow-data-change"], DO='mv "$RUN" "$RUN.old-1"; mkdir "$RUN"')
    assert done.returncode == 0, done.stderr
    assert place.arguments[-2:] == ["--restart", "--allow-data-change"]
    assert len(list((place.run / "logs").glob("launch-*.log"))) == 1
    assert [path.name for path in place.folder.glob("run.old-1/*")] == ["old"]
    assert place.launch([*TINY, "--restart"], RUN=f"{place.run}-new", DO='mv "$RUN" "$RUN.old-1"').returncode == 0
    assert not list(place.folder.glob("run-new.old-1"))


def test_several_processes_are_launched_and_the_exit_code_read_from_the_status(place):
    wrote = """echo '{"state": "stopped", "exit_code": 75}' >"$RUN/status.json"; exit 1"""
    done = place.launch(TINY, PROCESSES="2", DO=wrote)
    assert done.returncode == 75
    started = place.started.read_text().split("\n")
    assert started[:2] == ["-m", "accelerate.commands.launch"]
    assert started[started.index("--num_processes") + 1] == "2"
    assert place.launch(TINY, PROCESSES="2", DO="exit 1").returncode == 1  # what an earlier run said is not its own


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_training_once_and_its_end_is_waited_for(number, place):
    do = "trap 'echo caught; sleep 0.2; exit 75' TERM INT USR1; touch \"$RUN/ready\"; while :; do sleep 0.05; done"
    with place.start(TINY, DO=do) as process:
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


def test_a_launched_experiment_is_a_run_as_any_other(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    done = place.train(shortened(EXAMPLES[0], place.folder / "some images"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[y/N]" not in done.stdout
    assert "THERE ARE NO PRETRAINED WEIGHTS FOR vit_tiny" in done.stdout
    run = place.folder / "runs" / "cifar10-vit_tiny-rsst-1-1.0-4-false-0.2-0"
    assert tiny.status(run)["state"] == "finished"
    [log] = (run / "logs").glob("launch-*.log")
    assert "The last ticket holds" in log.read_text()
    assert tiny.command("runs", place.folder / "runs") == 0
    assert re.search(rf"{run.name}.*finished", capsys.readouterr().out)


def test_a_refill_begins_with_weights_of_ones_own(place):
    words = shortened(EXAMPLES[7], place.folder / "images")
    done = place.train([*words, own_weights(place.folder / "weights"), "name=mine"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round_01.safetensors" in done.stdout
    assert json.loads((place.folder / "runs" / "mine" / "environment.json").read_text())["weights"]


def test_an_example_of_imagenet_trains_on_a_few_images(place):
    words = [*shortened(EXAMPLES[9], place.folder / "images"), own_weights(place.folder / "weights"), "name=few"]
    assert place.launch(words).returncode == 0
    recipe, *overrides = place.arguments
    assert tiny.command("train", recipe, *overrides, f"output_dir={place.folder}/runs") == 0
    assert tiny.status(place.folder / "runs" / "few")["state"] == "finished"


def test_published_weights_that_cannot_be_had_stop_the_run_with_one_sentence(place, capfd):
    assert place.launch(shortened(EXAMPLES[2], place.folder / "images")).returncode == 0
    recipe, *overrides = place.arguments
    assert tiny.command("train", recipe, *overrides, f"output_dir={place.folder}/runs") == 3
    told = capfd.readouterr().err
    assert len(re.findall("error:", told)) == 1
    assert "model.pretrained" in told
    assert not (place.folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_trains(line, place):
    own = [] if "true" not in line or "vit_tiny" in line else [own_weights(place.folder / "weights")]
    done = place.train([*shortened(line, place.folder / "images"), *own])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_and_their_exit_code_is_passed_on(place):
    words = [*shortened(EXAMPLES[1], place.folder / "images"), "name=two"]
    done = place.train(words, PROCESSES="2", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"processes": 2' in (place.folder / "runs" / "two" / "environment.json").read_text()
    again = place.train([*words, "seed=5"], PROCESSES="2", ACCELERATE_USE_CPU="true")
    assert again.returncode != 0
    assert "holds a run of a different recipe" in again.stdout
