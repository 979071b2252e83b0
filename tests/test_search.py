"""Searches: invalid fields, trials that resume, are pruned or fail, and a real search on the digits."""

import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

pytest.importorskip("optuna")

from vit_rsst.experiments import running, searching, space

LR = "optim.lr=loguniform(1e-4,1e-1)"
DECAY = "optim.weight_decay=choice(0.0,0.1)"
EPOCHS = 3


class Formula:
    """A fake trainer: one epoch per poll, best at lr 0.01 without weight decay."""

    started: list[str]
    signal_at: int | None

    def __init__(self, argv, **_):
        given = dict(item.partition("=")[::2] for item in argv[4:])
        self.folder = Path(given["output_dir"]) / given["name"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.value = 80 - 10 * abs(math.log10(float(given["optim.lr"])) + 2) - 50 * float(given["optim.weight_decay"])
        self.epoch, self.returncode = 0, None
        self.started.append(given["name"])
        if len(self.started) == self.signal_at:
            signal.raise_signal(signal.SIGTERM)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.epoch += 1
            event = {"event": "epoch", "step": self.epoch, "val/top1": self.value - 5 * (EPOCHS - self.epoch)}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
            self.end("running" if self.epoch < EPOCHS else "finished", None if self.epoch < EPOCHS else 0)
        return self.returncode

    def end(self, state: str, code: int | None) -> None:
        (self.folder / "status.json").write_text(json.dumps({"state": state}), encoding="utf-8")
        self.returncode = code

    def terminate(self) -> None:
        if self.returncode is None:
            self.end("stopped", 75)


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """Names of started trials; none trains."""
    names: list[str] = []
    monkeypatch.setattr(Formula, "started", names, raising=False)
    monkeypatch.setattr(Formula, "signal_at", None, raising=False)
    monkeypatch.setattr(running, "subprocess", SimpleNamespace(Popen=Formula, DEVNULL=None, STDOUT=None))
    monkeypatch.setattr(running, "POLL", 0.0)
    return names


def searched(folder: Path, trials: int, *more: str, fields: tuple[str, ...] = (LR, DECAY)) -> int:
    argv = [str(tiny.write_recipe(folder)), "--trials", str(trials), *more]
    return tiny.command("search", *argv, *(f"--field={text}" for text in fields))


def drawn(folder: Path) -> list[tuple]:
    """What each trial was given and reached, in the order in which the runs began."""
    import optuna

    found = optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'runs' / 'tiny-search' / 'search.db'}")
    ended = [t for t in found.trials if t.state.is_finished() and t.state != optuna.trial.TrialState.FAIL]
    return sorted((t.user_attrs["run"], *t.params.values(), t.value) for t in ended)


def test_the_best_trial_comes_first_and_as_a_command(tmp_path, started, capsys):
    assert searched(tmp_path, 6, "train.label_smoothing=0.1") == 0
    assert started == [f"trial-{i:03d}" for i in range(6)]
    shown = capsys.readouterr().out
    found = drawn(tmp_path)
    _, lr, decay, value = max(found, key=lambda trial: trial[-1])
    assert value == pytest.approx(80 - 10 * abs(math.log10(lr) + 2) - 50 * float(decay))
    best = shown.strip().splitlines()[-1].split()
    assert best[:2] == ["vit-rsst", "train"]
    assert best[3:] == [
        "train.label_smoothing=0.1",
        f"optim.lr={lr!r}",
        f"optim.weight_decay={decay}",
        "name=tiny-best",
    ]
    values = [float(line.split()[1]) for line in shown.splitlines() if line.lstrip().startswith("trial-")]
    assert len(values) == 6
    assert values == sorted(values, reverse=True)


def test_a_resumed_search_equals_an_uninterrupted_one(tmp_path, started, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert searched(whole, 5) == 0
    started.clear()
    monkeypatch.setattr(Formula, "signal_at", 2)  # a signal within the second trial
    assert searched(parts, 3) == 75
    assert "stopped by SIGTERM; run the same command to resume" in capsys.readouterr().err
    monkeypatch.setattr(Formula, "signal_at", None)
    assert searched(parts, 3) == 0
    assert started == ["trial-000", "trial-001", "trial-001", "trial-002"]
    assert searched(parts, 5) == 0
    assert drawn(parts) == drawn(whole)
    started.clear()
    assert searched(parts, 5) == 0
    assert started == []


def test_a_trial_of_a_killed_search_resumes_in_its_own_folder(tmp_path, started):
    search = searching.Search(tiny.write_recipe(tmp_path), (), (space.parse(LR), space.parse(DECAY)))
    with search.opened():
        params = search.draw().params  # and nothing more: the process is gone
    with search.opened():
        search.run(1, lambda line: None)
    assert started == ["trial-000"]
    assert drawn(tmp_path)[0][1:3] == tuple(params.values())


def test_hopeless_trials_are_pruned(tmp_path, started, capsys):
    assert searched(tmp_path, 12, "--prune") == 0
    shown = capsys.readouterr().out
    pruned = [line for line in shown.splitlines() if "pruned after" in line]
    assert pruned
    assert all("pruned after 1 epochs" in line or "pruned after 2 epochs" in line for line in pruned)
    states = [line.split()[3] for line in shown.split("state")[1].splitlines() if line.lstrip().startswith("trial-")]
    assert states == sorted(states)  # finished before pruned
    assert len(states) == 12


def test_incompatible_values_fail_a_single_trial(tmp_path, started, capsys):
    method = "pruning.method"
    fields = (LR, DECAY, f"{method}.penalty.window=choice([0,0.3],[0,0.6])", f"{method}.remove_at=choice(0.3,0.8)")
    assert searched(tmp_path, 8, fields=fields) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "is before the end of the penalty window" in line]
    assert lines
    assert len(started) == 8 - len(lines)
    assert not set(started) & {line.split()[1] for line in lines}


WRONG = {
    "optim.lrr=uniform(1,2)": "unknown key; did you mean 'lr'?",
    "optim.lr=uniform(-1,2)": "optim.lr",
    "optim.lr=loguniform(0,1)": "two numbers above 0",
    "optim.lr=uniform(2,1)": "the smaller first",
    "optim.lr=normal(0,1)": "expected KEY=KIND(VALUES)",
    "optim.lr": "expected KEY=KIND(VALUES)",
    "train.epochs=int(1.5,3)": "two whole numbers",
    "pruning.method=choice(imp,rstt)": "unknown method 'rstt'",
    "seed=int(0,3)": "the search sets seed",
    "train.epochs=int(2,3)": "given twice",
}


@pytest.mark.parametrize("text", WRONG)
def test_an_invalid_field_starts_nothing(tmp_path, started, capsys, text):
    assert searched(tmp_path, 2, "train.epochs=2", fields=(DECAY, text)) == 2
    shown = capsys.readouterr().err
    assert WRONG[text] in shown
    assert len(shown.splitlines()) == 1
    assert started == []
    assert not (tmp_path / "runs").exists()


def test_a_different_search_in_the_same_folder_is_rejected(tmp_path, started, capsys):
    assert searched(tmp_path, 1) == 0
    for more in (("optim.betas=[0.8,0.9]",), ("--metric", "val/loss")):
        assert searched(tmp_path, 2, *more) == 2
        assert "holds a different search" in capsys.readouterr().err
    assert searched(tmp_path, 2, fields=(LR, "optim.weight_decay=choice(0.0,0.2)")) == 2
    assert searched(tmp_path, 2, "optim.betas=[0.8,0.9]", "name=other") == 0


def test_without_optuna_a_search_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert searched(tmp_path, 1) == 3
    assert "pip install 'vit_rsst[hpo]'" in capsys.readouterr().err


def test_two_real_trials_on_the_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, "subprocess", SimpleNamespace(Popen=tiny.TrainerHere, DEVNULL=None, STDOUT=None))
    monkeypatch.setattr(running, "POLL", 0.0)
    short = ("train.epochs=1", "train.round_epochs=1", "pruning.schedule.rounds=1")
    assert searched(tmp_path, 2, *short, "--metric", "val/loss") == 0
    for run, _, _, value in drawn(tmp_path):
        folder = tmp_path / "runs" / "tiny-search" / run
        assert tiny.status(folder)["state"] == "finished"
        assert value == [event for event in tiny.events(folder) if event["event"] == "epoch"][-1]["val/loss"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("trial-")]
    assert float(lines[-2][1]) <= float(lines[-1][1])
