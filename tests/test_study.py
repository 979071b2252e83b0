"""Studies: runs that follow from a file, trainers that fail or stop, resuming, the arithmetic of the table."""

import csv
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from vit_rsst.errors import InputError, Stopped
from vit_rsst.experiments import running, study_file, tables
from vit_rsst.tickets import rounds

STUDY = """\
name: methods
recipe: {recipe}
seeds: [0, 1]
dense: {{train.epochs: 2}}
arms:
  imp: {{pruning.method: imp}}
  rsst: {{pruning.method.remove_at: 0.5}}
budget: equal
reference: imp
"""

RECIPE = tiny.RECIPE.replace("train: {epochs: 2, round_epochs: 2", "train: {epochs: 2, round_epochs: 1").replace(
    "rounds: 2", "rounds: 1"
)


def write_study(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.yaml"
    path.write_text(text.format(recipe=tiny.write_recipe(folder, RECIPE)), encoding="utf-8")
    return path


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """Names of started runs, each trained within this process."""
    names: list[str] = []
    monkeypatch.setattr(tiny.TrainerHere, "started", names)
    monkeypatch.setattr(running, "subprocess", SimpleNamespace(Popen=tiny.TrainerHere, DEVNULL=None, STDOUT=None))
    monkeypatch.setattr(running, "POLL", 0.0)
    return names


@pytest.mark.parametrize("option", ["--csv", "--markdown"])
def test_an_unwritable_output_is_reported_before_any_run(tmp_path, started, capsys, option):
    argv = [str(write_study(tmp_path)), option, str(tmp_path / "nowhere" / "x")]
    assert tiny.command("study", *argv) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert started == []


def test_a_study_trains_each_run_once_and_compares_the_arms(tmp_path, started, capsys):
    file = write_study(tmp_path)
    assert (
        tiny.command("study", str(file), "--csv", str(tmp_path / "runs.csv"), "--markdown", str(tmp_path / "arms.md"))
        == 0
    )
    assert started == ["dense-round-s0", "dense-round-s1", "imp-s0", "rsst-s0", "imp-s1", "rsst-s1"]
    summary, _, *table = (tmp_path / "arms.md").read_text("utf-8").splitlines()
    assert summary.startswith("Paired comparisons with imp: 1.")
    heads, _, imp, rsst = (line.split(" | ") for line in table)
    assert (imp[0], rsst[0], imp[2], imp[7], rsst[7]) == ("| imp", "| rsst", "2", "3", "3")
    assert heads[-2:] == ["test − imp", "verdict |"]
    assert "noise" in rsst[-1]
    with open(tmp_path / "runs.csv", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["state"] for row in rows] == ["finished"] * 6
    folder = tmp_path / "runs" / "methods"
    pruned = rounds.load_rows(folder / "rsst-s1")
    assert [row.epochs for row in pruned] == [0, 1]
    dense = rounds.load_rows(folder / "dense-round-s1")
    assert [row.epochs for row in dense] == [2]
    assert pruned[0].test_top1 == dense[0].test_top1  # it starts from the dense round of its own seed
    assert float(rows[-1]["test"]) == pruned[-1].test_top1

    started.clear()
    assert tiny.command("study", str(file)) == 0
    assert started == []
    assert "| rsst | default | 2 |" in capsys.readouterr().out
    assert tiny.command("study", str(file), "--dry-run") == 0
    assert "6 runs" in (shown := capsys.readouterr().out)
    assert "8 epochs, 0 left to train; estimated time: 0s" in shown


def test_a_failed_arm_does_not_stop_the_others_and_is_retried(tmp_path, started, capsys):
    text = (
        STUDY.replace("[0, 1]", "[0]")
        .replace("dense: {{train.epochs: 2}}\n", "")
        .replace("  rsst:", "  broken: {{data.source: folder, data.path: /nowhere}}\n  rsst:")
    )
    file = write_study(tmp_path, text)
    assert tiny.command("study", str(file), "train.epochs=1") == 1
    assert started == ["imp-s0", "broken-s0", "rsst-s0"]
    shown = capsys.readouterr()
    assert "| rsst | default | 1 |" in shown.out
    assert "did not finish:\nbroken-s0: " in shown.out
    assert "/nowhere" in shown.out.split("did not finish:")[1]
    assert "1 of 3 runs did not finish" in shown.err
    started.clear()
    assert tiny.command("study", str(file), "train.epochs=1") == 1
    assert started == ["broken-s0"]


def test_arms_of_a_failed_dense_round_are_not_started(tmp_path, started, capsys):
    file = write_study(tmp_path, STUDY.replace("train.epochs: 2", "train.epochs: 2, model.pretrained: /nowhere"))
    assert tiny.command("study", file) == 1
    assert started == ["dense-round-s0", "dense-round-s1"]
    shown = capsys.readouterr()
    assert "imp-s1: not started: it starts from dense-round-s1, which did not finish" in shown.out
    assert "no run has finished yet" in shown.out
    assert "6 of 6 runs did not finish" in shown.err


WRONG = {
    "arms:\n  imp: {{pruning.method: imp, trian.epochs: 3}}": "trian: unknown key; did you mean 'train'?",
    "arms:\n  imp: {{pruning.method: impp}}": "Did you mean 'imp'?",
    "arms:\n  imp: {{seed: 3}}": "arm 'imp': the study sets seed",
    "arms:\n  imp: {{train.epochs: 3}}": "train.epochs has no effect",
    "arms:\n  a b: {{pruning.method: imp}}\n  a?b: {{}}": "would share the folder",
    "reference: rsst\narms:\n  imp: {{pruning.method: imp}}": "unknown arm 'rsst'",
    "arm: {{}}\narms:\n  imp: {{pruning.method: imp}}": "study.yaml:5  arm: unknown key; did you mean 'arms'?",
    "seeds: []\narms: {{imp: {{}}}}": "seeds: duplicate key",
    "arms:\n  imp: {{pruning.method: imp}}\npoints: {{long: {{set: {{}}, arms: [imp]}}}}": "points.long.set",
    "arms: {{imp: {{}}}}\npoints: {{a: {{set: {{optim.lr: 1}}, arms: [rst]}}}}": "points.a.arms: unknown arm 'rst'",
}


@pytest.mark.parametrize("text", WRONG)
def test_an_invalid_study_starts_nothing(tmp_path, started, capsys, text):
    file = write_study(tmp_path, f"name: wrong\nrecipe: {{recipe}}\nseeds: [0, 1]\ndense: {{{{}}}}\n{text}\n")
    assert tiny.command("study", file) == 2
    shown = capsys.readouterr().err
    assert WRONG[text] in shown
    assert len(shown.splitlines()) == 1
    assert started == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0, 0]\ndense: {{}}", "seeds: 0 is given twice"),
        ("seeds: []\ndense: {{}}", "seeds: is empty; expected at least 1"),
        ("seeds: [0]\ndense: {{pruning.method: imp}}", "dense: pruning.method has no effect"),
    ],
)
def test_invalid_seeds_and_dense_rounds_start_nothing(tmp_path, started, capsys, text, message):
    file = write_study(tmp_path, "name: wrong\nrecipe: {recipe}\narms: {{imp: {{}}}}\n" + text + "\n")
    assert tiny.command("study", file) == 2
    assert message in capsys.readouterr().err
    assert started == []


def test_unequal_budgets_are_rejected_with_the_sums(tmp_path):
    file = write_study(tmp_path, STUDY.replace("remove_at: 0.5", "remove_at: 0.5, train.round_epochs: 3"))
    with pytest.raises(InputError, match=r"imp 2 \+ 0 \+ 1 = 3; rsst 2 \+ 0 \+ 3 = 5"):
        study_file.read(file)


def test_single_round_methods_train_the_epochs_of_all_rounds_after_a_shared_one(tmp_path):
    text = STUDY + "points: {{longer: {{set: {{train.round_epochs: 4}}, arms: [imp, gmp, dense]}}}}\n"
    text = text.replace("  rsst:", "  gmp: {{pruning.method: gmp}}\n  dense: {{pruning.method: dense}}\n  rsst:")
    runs = {run.name: run for run in study_file.read(write_study(tmp_path, text), ["pruning.schedule.rounds=3"]).runs}
    assert runs["imp-s0"].epochs == (2, 0, 1, 1, 1)
    assert runs["gmp-s0"].epochs == runs["dense-s0"].epochs == (2, 3)
    assert runs["gmp-longer-s1"].epochs == (2, 12)
    assert "rsst-longer-s0" not in runs
    assert runs["imp-s1"].recipe.model.start_from == str(tmp_path / "runs" / "methods" / "dense-round-s1")


def test_a_dense_round_is_shared_by_arms_with_the_same_model_and_data(tmp_path):
    text = STUDY + "grid: {{optim.lr: [1e-3, 2e-3], model.args.depth: [1, 2]}}\n"
    runs = study_file.read(write_study(tmp_path, text)).runs
    dense = [run for run in runs if not run.arm]
    assert [run.name for run in dense] == ["dense-round-s0", "dense-round2-s0", "dense-round-s1", "dense-round2-s1"]
    assert len(runs) == 4 + 2 * 2 * 2 * 2
    for run in runs[4:]:
        assert run.after.recipe.model.args == run.recipe.model.args
        assert run.after.recipe.optim.lr == 3e-3
        assert run.after.seed == run.seed
    assert runs[4].name == "imp-lr-0.001-depth-1-s0"
    assert runs[4].point == "lr=0.001, depth=1"


def test_a_folder_of_a_different_recipe_is_rejected_and_new_fields_take_their_defaults(tmp_path):
    file = write_study(tmp_path)
    run = study_file.read(file).runs[-1]
    tree = run.recipe.tree()
    run.folder.mkdir(parents=True)
    del tree["data"]["max_corrupt"]  # as an older version wrote it
    (run.folder / "recipe.yaml").write_text(json.dumps(tree), encoding="utf-8")
    study_file.read(file)
    tree["optim"]["lr"] = 0.5
    (run.folder / "recipe.yaml").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(InputError, match=r"rsst-s1 holds a run of a different recipe: optim.lr \(was 0.5, now 0.003\)"):
        study_file.read(file)


TRAINER = """\
import pathlib, signal, sys, time
path = pathlib.Path(sys.argv[1])
def leave(*_):
    path.write_text("left a resume point")
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
path.write_text("trains")
time.sleep(30)
"""


def test_a_signal_stops_all_trainers_cleanly(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "command", lambda run: [sys.executable, "-c", TRAINER, str(tmp_path / run.name)])
    runs = [
        SimpleNamespace(name=name, folder=tmp_path / "runs" / name, after=None, is_finished=False) for name in "abc"
    ]
    shown: list[tuple[str, str]] = []

    def interrupt() -> None:
        limit = time.monotonic() + 20
        while not all((tmp_path / name).exists() for name in "ab") and time.monotonic() < limit:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Stopped, match="stopped by SIGINT; run the same command to resume"):
        running.Crew(jobs=2).train(runs, lambda run, event: shown.append((run.name, event.split(" (")[0])))
    assert {name: (tmp_path / name).read_text() for name in "ab"} == dict.fromkeys("ab", "left a resume point")
    assert not (tmp_path / "c").exists()
    assert shown[:2] == [("a", "started"), ("b", "started")]
    assert len(shown) == 4


def result(arm: str, seed: int, test: float, gap: float | None = None) -> tables.Result:
    row = dict.fromkeys(rounds.COLUMNS, 0) | {"val_top1": test + 1, "test_top1": test, "density": 0.1, "seconds": 30}
    rows = [rounds.RoundRow(**row | {"what_if_gap": None}), rounds.RoundRow(**row | {"what_if_gap": gap})]
    return tables.Result(SimpleNamespace(arm=arm, point="", seed=seed, name=f"{arm}-s{seed}", epochs=(2, 1)), rows)


def test_means_spreads_and_paired_differences_match_hand_calculation(monkeypatch):
    found = [result("imp", s, t, g) for s, t, g in ((0, 50.0, 4.0), (1, 52.0, 5.0), (2, 54.0, 6.0))]
    found += [result("rsst", s, t, 0.5) for s, t in ((0, 51.0), (1, 53.5), (2, 55.0))]
    found += [result("gmp", s, t) for s, t in ((0, 50.0), (1, 55.0), (2, 51.0))]
    monkeypatch.setattr(tables, "results", lambda runs: found)
    study = SimpleNamespace(compared=[r.run for r in found], reference="imp")
    _, imp, rsst, gmp = tables.cells(study)
    # Deviations of 50, 52, 54 from 52: √((4 + 0 + 4) / 2) = 2.
    assert imp[:9] == ("imp", "default", "3", "0.100", "53.00 ± 2.00", "52.00 ± 2.00", "5.00 ± 1.00", "3", "1.0")
    # Pairs 1, 1.5, 1: mean 3.5 / 3, deviation √((2 · (1/6)² + (1/3)²) / 2) = √(1/12) = 0.2887, three of them 0.87:
    # below the minimum of one point.
    assert rsst[-2:] == ("+1.17 ± 0.29", "above noise (1.00)")
    # Pairs 0, 3, −3: mean 0, deviation √(18 / 2) = 3.
    assert gmp[-2:] == ("+0.00 ± 3.00", "within noise (9.00)")
    assert (gmp[6], rsst[6]) == ("–", "0.50 ± 0.00")


def test_a_difference_below_a_point_is_noise_however_close_the_seeds_are():
    imp, rsst = ([result(arm, s, t) for s, t in pairs] for arm, pairs in (
        ("imp", [(0, 50.0), (1, 50.0), (3, 10.0)]), ("rsst", [(0, 50.8), (1, 51.0), (2, 90.0)])
    ))  # fmt: skip
    assert tables.difference_text(rsst[:1], imp) == ("+0.80", "within noise (1.00)")
    assert tables.difference_text(rsst, imp) == ("+0.90 ± 0.14", "within noise (1.00)")
    assert tables.difference_text(rsst[2:], imp) == ("–", "–")


def test_the_studies_of_the_repository_are_valid():
    files = sorted((tiny.SCRIPTS / "studies").glob("*.yaml"))
    assert files
    for file in files:
        study = study_file.read(file)
        assert study.reference in {run.arm for run in study.compared}
        assert len(study.runs) <= 60
