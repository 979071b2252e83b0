"""The command: verbs, exit codes, and how runs finish, stop and resume."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from vit_rsst import __version__, cli, train
from vit_rsst.assembly import data
from vit_rsst.data import transforms
from vit_rsst.errors import MissingRequirement
from vit_rsst.evaluation import evaluate
from vit_rsst.models.catalog import CATALOG as MODELS
from vit_rsst.pruning.methods import METHODS
from vit_rsst.recipe.loading import builtin_recipes, load
from vit_rsst.run import console

VERBS = [
    "train",
    "check",
    "runs",
    "report",
    "evaluate",
    "predict",
    "analyze",
    "export",
    "prune",
    "push",
    "study",
    "search",
    "recipes",
    "models",
    "methods",
]
SHORT = ("train.epochs=1", "train.round_epochs=1", "train.steps_per_epoch=1", "pruning.schedule.rounds=1")


# -- where results go


def test_results_are_written_through_links_and_into_devices_and_pipes(tmp_path, capsys):
    real, link, pipe = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(real)
    os.mkfifo(pipe)
    (tmp_path / "empty").mkdir()
    assert cli.main(["runs", str(tmp_path / "empty"), "--json", str(link)]) == 0
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"runs": []}
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        assert cli.main(["runs", str(tmp_path / "empty"), "--json", str(pipe)]) == 0
        assert json.loads(reader.communicate(timeout=30)[0]) == {"runs": []}
    assert cli.main(["runs", str(tmp_path / "empty"), "--json", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()
    assert "no runs in" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1", "link"])
def test_a_result_and_printed_output_may_share_a_file(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("/proc/self/fd/1")
    script = "import sys; from vit_rsst.cli import main; sys.exit(main(sys.argv[1:]))"
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, "-c", script, "runs", "empty", "--json", place]
        subprocess.run(command, stdout=file, cwd=tmp_path, check=True)
    assert log.read_text().splitlines() == ["before", "{", ' "runs": []', "}", "no runs in empty"]


@pytest.mark.parametrize("place", ["{}", "{}/nowhere/x.json", "/proc/x.json", "{}/" + 300 * "n", "{}/file/x.json"])
def test_an_unwritable_output_is_reported_before_any_work(tmp_path, place, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("work was done"))
    assert cli.main(["evaluate", str(tmp_path), "--json", place.format(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_file_name_may_have_250_bytes(tmp_path):
    (tmp_path / "empty").mkdir()
    name = tmp_path / ("n" * 250)
    assert cli.main(["runs", str(tmp_path / "empty"), "--json", str(name)]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [name.name]


def test_a_full_disk_is_no_traceback(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["runs", str(tmp_path / "empty"), "--json", "/dev/full"]) == 3
    assert "could not be written (No space left on device)" in capsys.readouterr().err
    assert Path("/dev/full").is_char_device()


def test_a_picture_must_be_svg(tmp_path, capsys):
    assert cli.main(["check", "digits/quickstart", "--picture", str(tmp_path / "range.png")]) == 2
    assert "choose a file name ending in .svg" in capsys.readouterr().err


def test_a_closed_pipe_loses_no_file(tmp_path):
    (tmp_path / "empty").mkdir()
    script = "import sys; from vit_rsst.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-uc", script, "runs", str(tmp_path / "empty"), "--json", str(tmp_path / "out.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.close()
    assert json.loads((tmp_path / "out.json").read_text()) == {"runs": []}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rounds(run: Path) -> list[dict[str, str]]:
    with open(run / "rounds.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a recipe and its finished run, runs/tiny. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    assert tiny.command("train", tiny.write_recipe(folder)) == 0
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run for tests that change it; returns the recipe."""
    recipe = tiny.write_recipe(tmp_path)
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return recipe


# -- the parser


@pytest.mark.parametrize("argv", [["--help"], *([verb, "--help"] for verb in VERBS), ["--version"]])
def test_help_exits_with_0(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert ("usage: vit-rsst" in shown) != (argv == ["--version"])
    assert argv != ["--version"] or shown == f"vit-rsst {__version__}\n"


def test_help_names_every_verb_and_every_exit_code(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert re.search(r"^verbs:\n  VERB\n((?:    \w+ .*\n(?:  {8,}.*\n)*)+)", shown, re.MULTILINE)
    assert re.findall(r"^    (\w+) ", shown, re.MULTILINE) == VERBS
    for code in (
        "0 success",
        "2 invalid input",
        "3 missing",
        "4 training diverged",
        "5 damaged",
        "6 check",
        "75 stopped",
    ):
        assert code in " ".join(shown.split())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "missing VERB. See vit-rsst --help."),
        (["trane"], "methods. Did you mean 'train'? See vit-rsst --help."),
        (["train"], "missing RECIPE. See vit-rsst train --help."),
        (
            ["train", "r", "--restrat"],
            "unknown option '--restrat'; did you mean '--restart'? See vit-rsst train --help.",
        ),
        (["check", "r", "x=1", "--jsno=f"], "unknown option '--jsno'; did you mean '--json'? See"),
        (["models", "--quite-another-thing"], "unknown option '--quite-another-thing'. See vit-rsst models --help."),
        (["evaluate", "t", "--split", "tset"], "--split: unknown split 'tset'; expected test, val or train. Did you"),
        (["evaluate", "t", "--batch", "0"], "--batch: expected a whole number, 1 or more, not '0'. See"),
        (["study", "f", "--jobs", "two"], "--jobs: expected a whole number, 1 or more, not 'two'. See"),
        (["export", "t", "d"], "missing --to. See vit-rsst export --help."),
        (["models", "x"], "unexpected argument 'x'. See vit-rsst models --help."),
    ],
)
def test_a_misspelt_command_line_is_one_sentence_with_a_suggestion(argv, sentence, capsys):
    assert cli.main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line


def test_the_module_entry_suggests_options_too(capsys):
    assert train.main(["digits/quickstart", "--dryrun"]) == 2
    assert "did you mean '--dry-run'? See vit_rsst.train --help." in capsys.readouterr().err


def test_the_installed_command_is_this_one(tmp_path):
    script = Path(sys.executable).with_name("vit-rsst")
    if not script.exists():
        pytest.skip(f"the package is not installed beside {sys.executable}")
    done = subprocess.run(
        [script, "train", "no/such/recipe"],
        cwd=tmp_path,
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no/such/recipe: no recipe file")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order", ["before", "between", "after"])
@pytest.mark.parametrize("entry", ["command", "module"])
def test_overrides_may_stand_before_between_and_after_options(tmp_path, capsys, entry, order):
    recipe = str(tiny.write_recipe(tmp_path))
    argv = {
        "before": [recipe, "seed=7", "train.epochs=1", "--dry-run"],
        "between": [recipe, "seed=7", "--dry-run", "train.epochs=1"],
        "after": ["--dry-run", recipe, "seed=7", "train.epochs=1"],
    }[order]
    with tiny.alone_on_cpu():
        assert (cli.main(["train", *argv]) if entry == "command" else train.main(argv)) == 0
    shown = capsys.readouterr().out
    assert "seed 7" in shown
    assert "5 epochs" in shown


# -- the plan


def test_a_dry_run_prints_rounds_densities_and_steps_and_creates_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tiny.write_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert tiny.command("train", recipe, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    table = [line.split() for line in shown.splitlines() if re.match(r" *[0-9]+ ", line)]
    assert [row[:3] for row in table] == [
        ["0", "1.0000", f"{tiny.NUM_PRUNABLE:,}"],
        ["1", "0.3162", f"{round(tiny.NUM_PRUNABLE * 0.1**0.5):,}"],
        ["2", "0.1000", f"{round(tiny.NUM_PRUNABLE * 0.1):,}"],
    ]
    assert [row[4:6] for row in table] == [["2", "6"]] * 3
    assert "after step 5" in shown
    assert "6 epochs, 18 steps, 576 images" in shown
    assert "1,293 train, 144 val, 360 test, 10 classes" in shown
    assert "shrinks the condemned to 1.00e-03 of their size" in shown
    assert f"run folder {tmp_path}/runs/tiny" in shown


@pytest.mark.parametrize(
    "override", ["pruning.method=dense", "pruning.method=gmp", "pruning.method=imp", "model.name=vit_base"]
)
def test_every_kind_of_recipe_has_a_plan(tmp_path, capsys, override):
    more = ["data.image_size=32", "model.args={}"] if override.startswith("model") else []
    assert tiny.command("train", tiny.write_recipe(tmp_path), "--dry-run", override, *more) == 0
    assert "plan of tiny" in capsys.readouterr().out


def test_every_recipe_of_the_package_has_a_plan(capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    seen = 0
    for path in builtin_recipes():
        plan = ["train", path, "--dry-run", "data.path=null"]
        if "shape_from: runs/" in path.read_text(encoding="utf-8"):  # it follows a run that is not there
            assert tiny.command(*plan) == 5, path
            assert "train its run first" in capsys.readouterr().err
            plan.append("model.shape_from=null")
        assert tiny.command(*plan) == 0, path
        assert "as published" in capsys.readouterr().out or "digits" in path.read_text(encoding="utf-8")
        seen += 1
    assert seen == len(builtin_recipes()) >= 3


def test_the_plan_of_a_long_tail_counts_the_remaining_images(tmp_path, monkeypatch):
    def unreachable(*_):
        raise MissingRequirement("no network")

    monkeypatch.setattr(data, "open_data", unreachable)
    more = ["data={source: cifar10, val_fraction: 0.1, imbalance: {kind: step, ratio: 10}}"]
    # 45,000 images, 4,500 of each of 10 classes; 5 of them keep a tenth.
    assert data.count_rows(load(tiny.write_recipe(tmp_path), more)).train == 5 * 4500 + 5 * 450


# -- invalid input is found before anything is created


@pytest.mark.parametrize(
    "overrides, code, sentence",
    [
        (["train.epochs=0"], 2, "train.epochs"),
        (["train.global_batch=2000"], 2, "train.global_batch"),
        (["train.global_batch=33", "train.batch_per_device=10"], 2, "train.global_batch: 33 cannot be divided"),
        (["pruning.protect=[nothing.*]"], 2, "pruning.protect"),
        (["pruning.protect=['*']"], 2, "no prunable weight is left"),
        (["data.train_samples=5000"], 2, "data.train_samples"),
        (["data.image_size=48"], 2, "data.image_size=32, or model.args.img_size=48"),
        (["data.image_size=33"], 2, "expects images of 32 px, but the dataset has 33 px"),
        (["model.args={img_size: [32, 64]}"], 2, "× 64 px, but the dataset has 32 px; set model.args"),
        (["model.name=hf:vit", "model.args={hidden_size: 48, num_hidden_layers: 1}"], 2, "fails on images of 32 px"),
        (["model.args={in_chans: 1}"], 2, "fails on images of 32 px"),
        (["model.args={patch_size: 64}"], 2, "fails on images of 32 px"),
        (["model.args={global_pool: ''}"], 2, "a logit for each of 10 classes; check global_pool"),
        (["model.args={num_heads: 0}"], 2, "cannot be built"),
        (["model.args={patch_size: 0}"], 2, "cannot be built"),
        (["model.args={act_layer: foo}"], 2, "cannot be built"),
        (["model.name=dynamic_vit", "model.args={stages: []}"], 2, "stages is empty"),
        (["model.name=dynamic_vit", "model.args={ratio_weight: abc}"], 2, "model.args: dynamic_vit"),
        (["model.name=dynamic_vit", "model.args={ratio_weight: -1}"], 2, "ratio_weight -1 is negative"),
        (["model.name=lightweight_vit", "model.args={patch_drop_rate: 0.25}"], 2, "patch_drop_rate is not supported"),
        (["train.distill.teacher=nowhere"], 5, "train.distill.teacher: nowhere: no such ticket"),
        (["model.name=no_such_model"], 2, "model.name"),
        (["model.args={num_heads: 5}"], 2, "model"),
        (["model.start_from=nowhere.safetensors"], 5, "nowhere.safetensors: no such ticket"),
        (["data={source: folder, path: nowhere}"], 2, "data.path: there is no folder"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["run", "plan"])
def test_invalid_input_is_one_sentence_and_creates_nothing(tmp_path, capsys, overrides, code, sentence, flags):
    recipe = tiny.write_recipe(tmp_path)
    assert tiny.command("train", recipe, *overrides, *flags) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert sentence in shown.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.yaml"]


NUMBERS = """
import timm, torch
from timm.models import register_model

class Numbers(timm.models.VisionTransformer):
    def forward(self, x):
        if not torch.isfinite(x).all():
            raise ValueError("not finite")
        return super().forward(x)

@register_model
def looks_at_numbers(pretrained=False, num_classes=10, **_):
    return Numbers(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=num_classes)
"""


def test_a_model_that_inspects_values_is_planned_and_trained(tmp_path, monkeypatch, capsys):
    (tmp_path / "looking.py").write_text(NUMBERS)
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["train", tiny.write_recipe(tmp_path), "plugins=[looking]", "model.name=looks_at_numbers", "model.args={}"]
    assert tiny.command(*argv, "--dry-run") == 0
    assert "activations and gradients " in capsys.readouterr().out
    assert tiny.command(*argv, *SHORT) == 0


def test_a_start_whose_zeros_would_grow_back_is_rejected(finished, tmp_path, capsys):
    recipe = tiny.write_recipe(tmp_path)
    start = f"model.start_from={finished / 'runs' / 'tiny'}"
    assert tiny.command("train", recipe, start, "pruning.protect=['*.qkv.*']") == 2
    assert "grow back" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.yaml"]


def test_a_start_with_nothing_left_to_remove_is_rejected_and_the_plan_counts_from_it(finished, tmp_path, capsys):
    recipe, start = tiny.write_recipe(tmp_path), f"model.start_from={finished / 'runs' / 'tiny'}"
    for more in ((), ("--dry-run",)):
        assert tiny.command("train", recipe, start, *more) == 2
        assert "no round would remove anything" in capsys.readouterr().err
    assert tiny.command("train", recipe, start, "pruning.schedule.final_sparsity=0.96", "--dry-run") == 0
    rounds = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:1] in ("0", "1", "2")]
    assert [line[1] for line in rounds[:3]] == ["0.1001", "0.1001", "0.0400"]
    assert [line[3] == "0" for line in rounds[:3]] == [True, True, False]


def image_folder(folder: Path) -> Path:
    for split, count in (("train", 24), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (32, 32), 200 * label + i).save(folder / split / name / f"{i:02d}.png")
    return folder


@pytest.fixture
def images(tmp_path, monkeypatch) -> list[str]:
    """Overrides that train on a folder of images; the folder is tmp_path/images."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    image_folder(tmp_path / "images")
    chosen = f"data={{source: folder, path: {tmp_path / 'images'}, image_size: 32}}"
    return [chosen, "train.global_batch=16", *SHORT]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corrupt_image_is_found_before_the_first_step(tmp_path, images, capsys, split):
    path = tmp_path / "images" / split / "dark" / "01.png"
    path.write_bytes(path.read_bytes()[:40])
    assert tiny.command("train", tiny.write_recipe(tmp_path), *images) == 2
    assert "cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# -- a finished run and its evaluation


def test_a_finished_run_has_the_documented_files(finished):
    run = finished / "runs" / "tiny"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "status.json",
        "rounds.csv",
        "checkpoints",
        "tickets",
    }
    assert sorted(p.name for p in (run / "tickets").iterdir()) == [
        f"round_{r:02d}.{kind}" for r in range(3) for kind in ("json", "safetensors")
    ]
    points = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert points == ["LATEST", "step-00000015", "step-00000018"]

    found = tiny.status(run)
    assert (found["state"], found["exit_code"], found["reason"]) == ("finished", 0, "")
    assert (found["round"], found["epoch"], found["step"]) == (2, 2, 18)

    rows = rounds(run)
    assert ",".join(rows[0]) == (
        "round,density_asked,density,val_top1,val_top5,val_loss,test_top1,test_loss,what_if_gap,epochs,seconds,ticket_bytes"
    )
    assert [row["round"] for row in rows] == ["0", "1", "2"]
    for row, density in zip(rows, (1, 0.1**0.5, 0.1), strict=True):
        assert float(row["density"]) == round(density * tiny.NUM_PRUNABLE) / tiny.NUM_PRUNABLE
        assert float(row["density_asked"]) == pytest.approx(density)
        assert int(row["ticket_bytes"]) == (run / "tickets" / f"round_0{row['round']}.safetensors").stat().st_size
        assert (row["what_if_gap"] == "") == (row["round"] == "0")

    events = tiny.events(run)
    counted = {
        kind: sum(e["event"] == kind for e in events) for kind in ("step", "epoch", "round", "warning", "resume")
    }
    assert counted == {"step": 18, "epoch": 6, "round": 3, "warning": 0, "resume": 0}
    keys = set().union(*(e.keys() for e in events))
    assert keys >= {
        "train/loss", "train/top1", "train/lr", "train/grad_norm", "val/loss", "val/top1", "val/top5",
        "prune/density", "prune/penalty", "prune/condemned_ratio", "prune/what_if_gap", "time/images_per_s",
    }  # fmt: skip

    about = json.loads((run / "environment.json").read_text())
    assert (about["processes"], about["device"]) == (1, "cpu")
    assert about["data"]["source"] == "scikit-learn digits"


def test_the_seconds_of_a_round_are_its_training_time(finished):
    assert all(0 <= float(row["seconds"]) < 60 for row in rounds(finished / "runs" / "tiny"))


@pytest.mark.parametrize("split", ["test", "val"])
def test_evaluate_reproduces_the_scores_of_the_run(finished, tmp_path, capsys, monkeypatch, split):
    monkeypatch.setattr(data, "EVALUATION_BATCH", 50)
    run = finished / "runs" / "tiny"
    for number, row in enumerate(rounds(run)):
        ticket = run / "tickets" / f"round_{number:02d}.safetensors"
        assert tiny.command("evaluate", ticket, "--split", split, "--json", tmp_path / "out.json") == 0
        shown = capsys.readouterr().out
        result = json.loads((tmp_path / "out.json").read_text())
        assert f"top1 {float(row[f'{split}_top1']):.2f}  " in shown
        assert result["top1"] == pytest.approx(float(row[f"{split}_top1"]), abs=1e-9)
        assert result["loss"] == pytest.approx(float(row[f"{split}_loss"]), rel=1e-5)
        assert f"density {float(row['density']):.4f}" in shown
        assert (result["samples"], result["split"]) == ({"test": 360, "val": 144}[split], split)
        assert sum(map(sum, result["confusion"])) == result["samples"]
        hits = sum(result["confusion"][i][i] for i in range(10))
        assert 100 * hits / result["samples"] == pytest.approx(result["top1"])
        assert 100 * result["accuracy"] == pytest.approx(result["top1"])
        assert sum(result["support"]) == result["samples"]


def test_evaluate_scores_the_last_ticket_of_a_run(finished, capsys):
    assert tiny.command("evaluate", finished / "runs" / "tiny") == 0
    shown = capsys.readouterr().out
    assert "round_02.safetensors on test (360 images)" in shown
    assert f"top1 {float(rounds(finished / 'runs' / 'tiny')[2]['test_top1']):.2f}" in shown
    assert len([line for line in shown.splitlines() if re.match(r" *[0-9] ", line)]) == 10


def test_evaluate_of_a_run_without_a_ticket_says_so(tmp_path, capsys):
    assert tiny.command("evaluate", tmp_path) == 2
    assert "this run folder has no ticket yet" in capsys.readouterr().err


def test_evaluate_takes_a_moved_dataset(tmp_path, images, capsys):
    assert tiny.command("train", tiny.write_recipe(tmp_path), *images) == 0
    run = tmp_path / "runs" / "tiny"
    (tmp_path / "images").rename(tmp_path / "moved")
    capsys.readouterr()
    assert tiny.command("evaluate", run) == 2
    assert "data.path: there is no folder" in capsys.readouterr().err
    assert tiny.command("evaluate", run, "--data", tmp_path / "moved") == 0
    assert f"top1 {float(rounds(run)[-1]['test_top1']):.2f}" in capsys.readouterr().out


# -- lists


def test_models_are_listed_with_their_sizes(capsys):
    assert tiny.command("models") == 0
    shown = capsys.readouterr().out
    for name, number in (("vit_tiny", "2,697,610"), ("vit_small", "21,342,346"), ("vit_base", "85,152,010")):
        [line] = [line for line in shown.splitlines() if line.split()[:1] == [name]]
        assert number in line
        assert MODELS[name].architecture in line
    assert len(MODELS) == 16


def test_recipes_are_listed_by_the_name_that_train_takes(capsys):
    assert tiny.command("recipes") == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(builtin_recipes())
    for line in shown:
        name, about = line.split(maxsplit=1)
        assert (tiny.REPOSITORY / "recipes" / f"{name}.yaml").exists()
        assert len(about) > 10
        assert not about.startswith(("name:", "#"))


def test_methods_criteria_and_sources_are_listed_with_a_line_each(capsys):
    assert tiny.command("methods") == 0
    shown = capsys.readouterr().out.splitlines()
    found = {tuple(line.split()[:2]) for line in shown}
    expected = {("method", name) for name in METHODS}
    expected |= {("criterion", name) for name in ("magnitude", "random")}
    expected |= {("source", name) for name in ("digits", "cifar10", "cifar100", "imagenet1k", "folder")}
    assert found >= expected
    assert len(shown) == len(found)
    assert all(len(line.split(maxsplit=2)[2]) > 10 for line in shown)


def test_runs_are_listed_with_state_and_result(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    shutil.copytree(finished / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "no run").mkdir()
    (tmp_path / "runs" / "young").mkdir()
    (tmp_path / "runs" / "young" / "status.json").write_text('{"state": "running"}')
    assert tiny.command("runs", tmp_path / "runs") == 0
    head, *shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[:2] == ["run", "state"]
    last = rounds(finished / "runs" / "tiny")[-1]
    best = max(float(row["val_top1"]) for row in rounds(finished / "runs" / "tiny"))
    scores = [f"{float(last['density']):.4f}", f"{best:.2f}", f"{float(last['test_top1']):.2f}", "rsst"]
    assert shown[0][:9] == ["tiny", "finished", "████████", "100%", "2", *scores]
    assert shown[1][:8] == ["young", "running", "–", "0", "–", "–", "–", "?"]
    assert len(shown) == 2


def test_runs_of_an_empty_and_of_a_missing_folder(tmp_path, capsys):
    assert tiny.command("runs", tmp_path) == 0
    assert "no runs" in capsys.readouterr().out
    assert tiny.command("runs", tmp_path / "none") == 2
    assert "no such folder" in capsys.readouterr().err


# -- the same command again


def test_a_finished_run_is_left_unchanged(finished, capsys):
    before = snapshot(finished)
    capsys.readouterr()
    assert tiny.command("train", finished / "tiny.yaml") == 0
    shown = capsys.readouterr()
    assert "is already finished; use --restart to start over" in shown.err
    assert f"{float(rounds(finished / 'runs' / 'tiny')[2]['test_top1']):.2f}" in shown.out
    assert snapshot(finished) == before


def test_a_different_recipe_in_the_same_folder_is_rejected_with_the_differences(finished, capsys):
    before = snapshot(finished)
    assert tiny.command("train", finished / "tiny.yaml", "seed=5", "optim.lr=1e-4") == 2
    shown = capsys.readouterr().err
    assert "2 fields differ" in shown
    assert "optim.lr: 0.003 there, 0.0001 now" in shown
    assert "seed: 0 there, 5 now" in shown
    assert snapshot(finished) == before


def test_a_restart_keeps_the_old_folder(copied, capsys):
    runs = copied.parent / "runs"
    before = snapshot(runs / "tiny")
    assert tiny.command("train", copied, "--restart", "seed=5", *SHORT) == 0
    assert "kept the earlier run as" in capsys.readouterr().out
    assert sorted(p.name for p in runs.iterdir()) == ["tiny", "tiny.old-1"]
    assert snapshot(runs / "tiny.old-1") == before
    assert [row["round"] for row in rounds(runs / "tiny")] == ["0", "1"]
    assert not [e for e in lines(runs / "tiny") if e["event"] == "resume"]


def test_a_restart_with_invalid_input_leaves_the_run_in_place(copied, capsys):
    runs = copied.parent / "runs"
    before = snapshot(runs)
    assert tiny.command("train", copied, "--restart", "model.name=no_such_model") == 2
    assert "model.name" in capsys.readouterr().err
    assert [p.name for p in runs.iterdir()] == ["tiny"]
    assert snapshot(runs) == before


def test_damaged_resume_points_end_with_5_in_the_status_too(copied, capsys):
    run = copied.parent / "runs" / "tiny"
    (run / "status.json").write_text(json.dumps(tiny.status(run) | {"state": "stopped", "exit_code": 75}))
    for path in run.glob("checkpoints/step-*/model.safetensors"):
        path.write_bytes(b"")
    assert tiny.command("train", copied) == 5
    shown = capsys.readouterr().err
    assert "setting it aside" in shown
    assert "no intact resume point is left" in shown
    found = tiny.status(run)
    assert (found["state"], found["exit_code"]) == ("failed", 5)


# -- divergence


def test_a_non_finite_loss_stops_the_run_and_names_the_step(tmp_path, capsys):
    recipe = tiny.write_recipe(tmp_path)
    assert tiny.command("train", recipe, "optim.lr=1e30") == 4
    shown = capsys.readouterr().err
    [where] = re.findall(r"round 0, epoch \d, step \d", shown)
    assert "optim.lr" in shown
    run = tmp_path / "runs" / "tiny"
    found = tiny.status(run)
    assert (found["state"], found["exit_code"]) == ("failed", 4)
    assert where in found["reason"]
    assert int(where.rsplit(" ", 1)[1]) <= found["step"], "it is noticed when the losses are read, a moment later"
    assert tiny.command("train", recipe, "optim.lr=1e30") == 4, "the same command goes on, to the same end"
    assert tiny.command("train", recipe, "optim.lr=1e-3") == 2, "another recipe needs another name or --restart"


@pytest.fixture
def one_bad_batch(monkeypatch):
    """The second training batch of this process is NaN."""
    normalize, count = transforms.normalize, 0

    def broken(images: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
        nonlocal count
        count += 1
        return normalize(images, mean, std) * (float("nan") if count == 2 else 1.0)

    monkeypatch.setattr(transforms, "normalize", broken)


def test_a_non_finite_step_stops_a_run_that_tolerates_none(tmp_path, one_bad_batch, capsys):
    assert tiny.command("train", tiny.write_recipe(tmp_path)) == 4
    assert "round 0, epoch 0, step 1" in capsys.readouterr().err


@pytest.mark.fault("F18")
def test_non_finite_steps_are_skipped_up_to_the_limit(tmp_path, one_bad_batch, capsys):
    assert (
        tiny.command("train", tiny.write_recipe(tmp_path), "train.max_skipped_steps=1", "train.log_every_steps=50") == 0
    )
    assert "skipped a step" in capsys.readouterr().err
    run = tmp_path / "runs" / "tiny"
    [warning] = [e for e in lines(run) if e["event"] == "warning"]
    assert "round 0, epoch 0, step 1: skipped a step" in warning["text"]
    for path in (run / "tickets").glob("*.safetensors"):
        assert all(torch.isfinite(t.float()).all() for t in load_file(path).values())
    assert tiny.status(run)["step"] == 18


# -- stopping and resuming

LONG = ("train.steps_per_epoch=8", "train.log_every_steps=2", "pruning.rewind=epoch:1", "model.args.drop_path_rate=0.1")
TOTAL = 3 * 2 * 8

STOPPING = """
import os, signal, sys
from vit_rsst import cli
from vit_rsst.run import console

step_of = console.Console.step

def step(self, loss):
    step_of(self, loss)
    if self.progress.global_step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)

console.Console.step = step
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert tiny.command("train", tiny.write_recipe(folder), *LONG) == 0
    return folder / "runs" / "tiny"


def outcome(run: Path) -> Iterator[object]:
    """Everything that two runs of one recipe must share, bit for bit."""
    for path in sorted((run / "tickets").glob("*.safetensors")):
        yield path.name, {name: t.flatten().view(torch.uint8).tolist() for name, t in load_file(path).items()}
    yield [{k: v for k, v in row.items() if k != "seconds"} for row in rounds(run)]
    timed = ("time/images_per_s", "seconds")
    for event in tiny.events(run):
        if event["event"] not in ("warning", "resume"):
            yield {k: v for k, v in event.items() if k not in timed}


def is_as_undisturbed(run: Path, undisturbed: Path) -> None:
    found, expected = list(outcome(run)), list(outcome(undisturbed))
    assert len(found) == len(expected) == 3 + 1 + TOTAL // 2 + 6 + 3 + 3
    for one, other in zip(found, expected, strict=True):
        assert one == other


@pytest.mark.fault("F1")
def test_a_terminated_run_exits_with_75_and_resumes_bit_for_bit(tmp_path, undisturbed, capsys):
    recipe = tiny.write_recipe(tmp_path)
    run = tmp_path / "runs" / "tiny"
    stop_at = 2 * 8 + 3  # in round 1, within the penalty's window
    done = tiny.python("-c", STOPPING, stop_at, "train", recipe, *LONG, timeout=120)
    assert done.returncode == 75, done.stderr
    assert f"stopped by SIGTERM at step {stop_at}; run the same command to resume" in done.stderr
    assert "Traceback" not in done.stderr
    found = tiny.status(run)
    assert (found["state"], found["exit_code"], found["step"]) == ("stopped", 75, stop_at)
    assert (run / "checkpoints" / "LATEST").read_text().strip() == f"step-{stop_at:08d}"

    assert tiny.command("train", recipe, *LONG) == 0
    assert f"resumed at round 1, epoch 0, step {stop_at} of {TOTAL}" in capsys.readouterr().out
    is_as_undisturbed(run, undisturbed)


def test_a_run_stops_at_its_time_limit_and_resumes_with_a_new_one(tmp_path, undisturbed, capsys):
    recipe = tiny.write_recipe(tmp_path)
    run = tmp_path / "runs" / "tiny"
    assert tiny.command("train", recipe, *LONG, "train.max_minutes=1e-6") == 75
    assert "stopped by train.max_minutes at step 1; run the same command to resume" in capsys.readouterr().err
    found = tiny.status(run)
    assert (found["state"], found["exit_code"], found["step"]) == ("stopped", 75, 1)
    assert tiny.command("train", recipe, *LONG, "train.max_minutes=60") == 0
    is_as_undisturbed(run, undisturbed)


def test_a_closed_output_pipe_is_no_traceback():
    command = [sys.executable, "-m", "vit_rsst.cli", "methods"]
    process = subprocess.Popen(
        command, env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    shown = process.stderr.read()
    assert (process.wait(timeout=60), shown) == (141, "")


@pytest.mark.parametrize("stops", [[1], [8], [13, 14], [TOTAL - 1], [TOTAL]])
def test_a_run_may_be_stopped_at_any_step(tmp_path, undisturbed, monkeypatch, stops):
    """In the first step, at the end of an epoch, twice in a row, before and after the last step."""
    recipe = tiny.write_recipe(tmp_path)
    run = tmp_path / "runs" / "tiny"
    step_of = console.Console.step
    for stop_at in stops:

        def step(self: console.Console, loss: float, stop_at: int = stop_at) -> None:
            step_of(self, loss)
            if self.progress.global_step == stop_at:
                os.kill(os.getpid(), signal.SIGUSR1)

        monkeypatch.setattr(console.Console, "step", step)
        assert tiny.command("train", recipe, *LONG) == 75
        assert tiny.status(run)["step"] == stop_at
    monkeypatch.setattr(console.Console, "step", step_of)
    assert tiny.command("train", recipe, *LONG) == 0
    is_as_undisturbed(run, undisturbed)


def test_a_second_interrupt_exits_at_once_and_the_run_still_resumes(tmp_path, undisturbed, monkeypatch):
    recipe = tiny.write_recipe(tmp_path)
    run = tmp_path / "runs" / "tiny"
    step_of = console.Console.step

    def step(self: console.Console, loss: float) -> None:
        step_of(self, loss)
        if self.progress.global_step == 13:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(console.Console, "step", step)
    assert tiny.command("train", recipe, *LONG) == 130
    assert tiny.status(run)["exit_code"] == 130
    assert tiny.status(run)["state"] in ("stopped", "failed")
    monkeypatch.setattr(console.Console, "step", step_of)
    assert tiny.command("train", recipe, *LONG) == 0
    is_as_undisturbed(run, undisturbed)


def test_fields_that_do_not_affect_results_may_change_on_resume(tmp_path, undisturbed, monkeypatch):
    recipe = tiny.write_recipe(tmp_path)
    step_of = console.Console.step

    def step(self: console.Console, loss: float) -> None:
        step_of(self, loss)
        if self.progress.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(console.Console, "step", step)
    assert tiny.command("train", recipe, *LONG) == 75
    monkeypatch.setattr(console.Console, "step", step_of)
    assert tiny.command("train", recipe, *LONG, "train.save_every_steps=3", "train.keep_resume_points=4") == 0
    is_as_undisturbed(tmp_path / "runs" / "tiny", undisturbed)
    assert len(list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*"))) == 4


def test_a_run_does_not_import_the_compiler_that_it_does_not_use(tmp_path):
    code = (
        "import sys; from vit_rsst import cli; code = cli.main(sys.argv[1:]); "
        "print(code, [name for name in ('torch._inductor.compile_fx', 'networkx') if name in sys.modules])"
    )
    short = ("train.epochs=1", "train.round_epochs=1", "train.steps_per_epoch=1")
    done = tiny.python("-c", code, "train", str(tiny.write_recipe(tmp_path)), *short)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
