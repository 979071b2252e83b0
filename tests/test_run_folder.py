"""The run folder: state, identity of the recipe, one process at a time, and what a restart keeps."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import yaml

from vit_rsst.errors import InputError, MissingRequirement
from vit_rsst.pruning.methods import METHODS
from vit_rsst.recipe.loading import load
from vit_rsst.recipe.schema import Data, Pruning, Recipe, Schedule, Train
from vit_rsst.run.environment import environment
from vit_rsst.run.folder import RunFolder

RECIPE = Recipe(name="r")

RECIPE_OF_0_1 = (Path(__file__).parent / "recipe_0_1.yaml").read_text(encoding="utf-8")
FINGERPRINT_OF_0_1 = "7c8d9450eef086c7"


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "r")


def opened(folder: RunFolder, recipe: Recipe = RECIPE) -> RunFolder:
    folder.open().release()
    folder.record(recipe, {"versions": {}})
    return folder


# -- status.json


def test_asking_a_folder_creates_nothing(folder):
    assert folder.status() == {}
    folder.check(RECIPE)
    assert folder.set_aside() is None
    assert not folder.path.parent.exists()


def test_the_status_says_state_place_exit_code_and_reason(folder):
    folder.write_status("running", round=1, epoch=2, step=30)
    assert folder.status() | {"updated": ""} == {
        "state": "running", "round": 1, "epoch": 2, "step": 30, "exit_code": None, "reason": "", "updated": "",
    }  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", folder.status()["updated"])


def test_the_last_place_stays_when_a_state_comes_without_one(folder):
    folder.write_status("running", round=1, epoch=2, step=30)
    folder.write_status("failed", 4, "it diverged", step=31)
    found = folder.status()
    assert (found["state"], found["exit_code"], found["reason"]) == ("failed", 4, "it diverged")
    assert (found["round"], found["epoch"], found["step"]) == (1, 2, 31)


@pytest.mark.parametrize("content", ["", "{half", "\x00"])
def test_an_unreadable_status_is_no_status(folder, content):
    folder.path.mkdir(parents=True)
    (folder.path / "status.json").write_text(content)
    assert folder.status() == {}
    folder.write_status("running")
    assert folder.status()["state"] == "running"


def test_no_half_written_status_is_ever_seen(folder, monkeypatch):
    folder.write_status("running", round=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_status("finished", 0)
    assert folder.status()["state"] == "running"


# -- identity


def test_a_folder_of_the_same_recipe_is_gone_on_in(folder):
    opened(folder).check(RECIPE)


@pytest.mark.parametrize(
    "free",
    [
        {"name": "another"},
        {"output_dir": "/elsewhere"},
        {"train": Train(log_every_steps=7, save_every_steps=3, keep_resume_points=5)},
        {"train": Train(batch_per_device=8, rank_timeout=5, max_minutes=9, max_skipped_steps=2)},
        {"data": Data(path="/moved", workers=3, in_memory=False, max_corrupt=0.5)},
        {"pruning": replace(RECIPE.pruning, schedule=replace(RECIPE.pruning.schedule, rounds=10))},  # the default
    ],
)
def test_fields_that_decide_nothing_may_change(folder, free):
    opened(folder).check(replace(RECIPE, **free))


@pytest.mark.fault("F30")
def test_another_recipe_is_refused_with_every_difference(folder):
    other = replace(RECIPE, seed=3, train=Train(epochs=5, global_batch=64))
    with pytest.raises(InputError) as caught:
        opened(folder).check(other)
    text = str(caught.value)
    assert f"{folder.path} holds a run of a different recipe; 3 fields differ:" in text
    differences = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    assert differences == [
        "seed: 0 there, 3 now",
        "train.epochs: 100 there, 5 now",
        "train.global_batch: 256 there, 64 now",
    ]
    assert "--restart" in text
    assert "name=" in text


def test_a_field_that_the_saved_recipe_lacks_is_a_difference(folder):
    saved = opened(folder).path / "recipe.yaml"
    tree = yaml.safe_load(saved.read_text())
    del tree["train"]["compile"]
    saved.write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError, match=r"train\.compile: 'missing' there, False now"):
        folder.check(RECIPE)


@pytest.mark.parametrize("content", ["", "train: {epochs: 5", "- a"])
def test_a_damaged_recipe_in_the_folder_is_no_other_recipe_in_silence(folder, content):
    (opened(folder).path / "recipe.yaml").write_text(content)
    with pytest.raises(InputError):
        folder.check(RECIPE)


@pytest.mark.parametrize("method, kept", [("rsst", " pruning.method=constant"), ("dense", "")])
def test_more_epochs_are_refused_with_the_way_to_train_on(tmp_path, method, kept):
    recipe = replace(RECIPE, output_dir=str(tmp_path), pruning=Pruning(METHODS[method]()))
    folder = opened(RunFolder(recipe.run_folder), recipe)
    with pytest.raises(InputError) as caught:
        folder.check(replace(recipe, train=Train(epochs=150)))
    assert f"model.start_from={folder.path}{kept} train.epochs=…" in str(caught.value)
    for fewer in (Train(epochs=50), Train(epochs=150, global_batch=64)):
        with pytest.raises(InputError) as caught:
            folder.check(replace(recipe, train=fewer))
        assert "start_from" not in str(caught.value)


def saved_by_0_1(folder: RunFolder, recipe: Recipe, **pruning: object) -> RunFolder:
    """A run folder whose saved recipe has these values in its section `pruning`."""
    saved = opened(folder, recipe).path / "recipe.yaml"
    tree = yaml.safe_load(saved.read_text())
    tree["pruning"] |= pruning
    saved.write_text(yaml.safe_dump(tree))
    return folder


def test_a_dense_run_of_version_0_1_is_refused_with_the_rounds_that_resume_it(folder):
    dense = replace(RECIPE, pruning=Pruning(METHODS["dense"]()))
    saved_by_0_1(folder, dense, schedule=asdict(Schedule()))
    with pytest.raises(InputError) as caught:
        folder.check(dense)
    assert "pruning.schedule.rounds: 10 there, 0 now" in str(caught.value)
    assert "set pruning.schedule.rounds=10 to resume such a run." in str(caught.value)
    folder.check(replace(dense, pruning=Pruning(METHODS["dense"](), schedule=Schedule(rounds=10))))
    with pytest.raises(InputError) as caught:
        folder.check(replace(dense, pruning=Pruning(METHODS["dense"](), schedule=Schedule(rounds=3))))
    assert "to resume such a run" not in str(caught.value)


def test_a_rewind_that_version_0_1_ignored_is_no_difference(folder):
    gmp = replace(RECIPE, pruning=Pruning(METHODS["gmp"]()))
    saved_by_0_1(folder, gmp, rewind="init").check(gmp)
    imp = replace(RECIPE, pruning=Pruning(METHODS["imp"]()))
    with pytest.raises(InputError, match=r"pruning\.rewind: 'init' there, 'lr' now"):
        saved_by_0_1(folder, imp, rewind="init").check(imp)


def test_resume_points_of_version_0_1_are_those_of_the_recipe_in_the_folder(folder):
    """The literal is what version 0.1 wrote into resume points beside this recipe.yaml."""
    folder.path.mkdir(parents=True)
    (folder.path / "recipe.yaml").write_text(RECIPE_OF_0_1, encoding="utf-8")
    recipe = load(folder.path / "recipe.yaml", ["data.workers=3"])
    folder.check(recipe)
    assert folder.fingerprints(recipe) == sorted([recipe.fingerprint, FINGERPRINT_OF_0_1])
    folder.record(recipe, {"fingerprints": folder.fingerprints(recipe)})
    assert FINGERPRINT_OF_0_1 in folder.fingerprints(recipe), "although recipe.yaml is of this version now"


# -- setting aside


def test_a_folder_is_set_aside_under_the_next_free_name(folder):
    kept = []
    for number in (1, 2, 3):
        folder.write_status("finished", 0, step=number)
        kept.append(folder.set_aside())
        assert not folder.path.exists()
    assert [path.name for path in kept] == ["r.old-1", "r.old-2", "r.old-3"]
    assert [tiny.status(path)["step"] for path in kept] == [1, 2, 3]


# -- opening


def test_opening_makes_the_folders_and_records_recipe_and_environment(folder):
    opened(folder, replace(RECIPE, seed=5))
    assert sorted(p.name for p in folder.path.iterdir() if p.is_dir()) == ["checkpoints", "logs", "tickets"]
    assert load(folder.path / "recipe.yaml") == replace(RECIPE, seed=5)
    assert json.loads((folder.path / "environment.json").read_text()) == {"versions": {}}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingRequirement, match="output_dir") as caught:
        RunFolder(tmp_path / "file" / "r").open()
    assert caught.value.exit_code == 3


def test_the_environment_names_versions_command_and_data():
    found = environment(2, "cuda", {"source": "digits"})
    assert found["versions"].keys() >= {"python", "vit-rsst", "torch", "timm", "accelerate", "datasets", "safetensors"}
    assert re.match(r"\d+\.\d+", found["versions"]["torch"])
    assert (found["processes"], found["device"], found["command"]) == (2, "cuda", sys.argv)
    assert found["data"] == {"source": "digits"}
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_the_checkout():
    if not (tiny.REPOSITORY / ".git").exists():
        pytest.skip("not run from a git checkout")
    git = ["git", "-C", str(tiny.REPOSITORY), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    assert environment(1, "cpu", {})["commit"].rstrip("+") == head


# -- one process at a time

HOLDER = """
import sys
from pathlib import Path

from vit_rsst.recipe.loading import load
from vit_rsst.run.folder import RunFolder

recipe = load(Path(sys.argv[1]))
folder = RunFolder(recipe.run_folder)
lock = folder.open()
folder.record(recipe, {})
folder.write_status("running", step=1)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A recipe in whose run folder another process runs."""
    recipe = tiny.write_recipe(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(recipe)],
        env=tiny.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "locked\n"
    yield recipe, process
    process.kill()
    process.communicate()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.fault("F29")
def test_a_second_process_is_refused_and_changes_nothing(held, capsys):
    recipe, _ = held
    folder = RunFolder(load(recipe).run_folder)
    before = snapshot(folder.path)
    with pytest.raises(MissingRequirement, match="another process is running there"):
        folder.open()
    assert tiny.command("train", recipe) == 3
    assert "another process is running there" in capsys.readouterr().err
    assert snapshot(folder.path) == before


def test_a_restart_does_not_take_the_folder_from_under_a_running_process(held, capsys):
    recipe, _ = held
    folder = RunFolder(load(recipe).run_folder)
    before = snapshot(folder.path)
    code = tiny.command("train", recipe, "--restart", "train.epochs=1", "train.round_epochs=1")
    assert [p.name for p in folder.path.parent.iterdir()] == ["tiny"], "the folder of the other process was moved"
    assert code == 3
    assert "another process is running there" in capsys.readouterr().err
    assert snapshot(folder.path) == before


def test_the_lock_of_a_killed_process_is_free(held):
    recipe, process = held
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = RunFolder(load(recipe).run_folder)
    folder.open().release()
    assert folder.status()["state"] == "running", "its last state stays until a run goes on"
