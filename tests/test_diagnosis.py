"""Diagnosis: synthetic curves with the expected findings, and none for a healthy real run."""

import csv
import math
from pathlib import Path

import pytest
import tiny

from vit_rsst.progress import Progress
from vit_rsst.report import curves, pictures, story, watching
from vit_rsst.report.diagnosis import PREFIX, RULES, diagnose
from vit_rsst.report.history import History
from vit_rsst.tickets.rounds import RoundRow

RSST = {"pruning": {"method": {"name": "rsst", "penalty": {"residual": 1e-3}}}}


def curve(train: list, val: list | None = None, top1: tuple = (90, 89), start: float = 10, **more: object) -> list:
    """Epoch events of one round: losses, and final training and validation top-1, linear from `start`.

    Args:
        more: other metrics, constant or a list over epochs.
    """
    val, number, events = val or train, len(train), []
    for i in range(number):
        share = (i + 1) / number
        event = {"event": "epoch", "round": 0, "epoch": i + 1, "train/loss": train[i], "val/loss": val[i]}
        event |= {"train/top1": start + share * (top1[0] - start), "val/top1": start + share * (top1[1] - start)}
        events.append(event | {key: value[i] if isinstance(value, list) else value for key, value in more.items()})
    return events


def history_of(
    *of_rounds: list,
    rows: list = (),
    pruning: list = (),
    recipe: dict = RSST,
    state: str = "running",
    shrinking: int = 0,
) -> History:
    """A run of these rounds, with condemned weights during the first `shrinking` epochs of the last one."""
    events = [event | {"round": round} for round, events in enumerate(of_rounds) for event in events]
    for event in events[len(events) - len(of_rounds[-1]) :][:shrinking] if of_rounds else ():
        event["prune/condemned_left"] = 0.5
    events = [event | {"step": 10 * (i + 1)} for i, event in enumerate(events)]
    return History(Path(), recipe, {}, {"state": state}, events, list(rows), list(pruning))


def row(round: int, top1: float, gap: float | None = None, loss: float = 0.5) -> RoundRow:
    density = 0.5**round
    return RoundRow(round, density, density, top1, 99.0, loss, None, None, gap, 10, 1.0, 1000)


def down(number: int, start: float = 2.3, end: float = 0.3) -> list[float]:
    return [end + (start - end) * math.exp(-4 * i / number) for i in range(number)]


FLAT = [2.30, 2.31, 2.30, 2.29, 2.30, 2.30]
LAYERS = {"blocks.0.mlp.fc1.weight": {"density": 0.4}, "blocks.1.mlp.fc1.weight": {"density": 0.004}}
ENDED = {"state": "finished"}

CURVES = {
    "healthy": (history_of(curve(down(20))), []),
    "healthy, with rounds": (
        history_of(curve(down(20)), curve(down(10, 0.8)), rows=[row(0, 90), row(1, 89.5, 6.0)]),
        [],
    ),
    "healthy, of four epochs": (history_of(curve(FLAT[:4], top1=(10, 10))), []),
    "healthy, a spike": (history_of(curve([*down(10), 0.9, 0.5, 0.4])), []),
    "healthy, low but fitted": (history_of(curve(down(20, 2.3, 1.4), top1=(50, 46)), **ENDED), []),
    "healthy, one bad epoch of validation": (history_of(curve(down(20), [*down(18), 0.9, 0.34], top1=(99, 85))), []),
    "flat": (history_of(curve(FLAT, top1=(10, 10))), ["not learning"]),
    "slow among a thousand classes": (history_of(curve(down(8, 6.9, 6.5), top1=(1.2, 1.1), start=0.1)), []),
    "flat among a thousand classes": (
        history_of(curve([6.91, 6.90] * 3, top1=(0.12, 0.1), start=0.1)),
        ["not learning"],
    ),
    "flat loss, rising accuracy": (history_of(curve(FLAT, top1=(40, 40))), []),
    "flat, with the noise of a few validation images": (
        history_of(curve(FLAT, top1=(10, 10), **{"val/top1": [8.3, 14.6, 10.4, 6.3, 9.7, 11.1]})),
        ["not learning"],
    ),
    "thrown to chance by the first steps": (
        history_of(curve([13.8, 4.1, 2.57, 2.4, 2.34, 2.33, 2.32, 2.32, *[2.31] * 8], top1=(10, 10)), **ENDED),
        ["not learning"],
    ),
    "thrown far from chance, on the way down": (
        history_of(
            curve(
                [44.9, 66.6, 36.8, 23.1, 12.4, 6.4, 4.4, 3.1, 2.6, 2.35],
                top1=(10.6, 10.6),
                **{"val/top1": [9.0, 14.6, 6.9, 11.8, 9.7, 8.3, 10.4, 9.0, 11.1, 9.7]},
            )
        ),
        ["not learning"],
    ),
    "climbing and then stuck": (
        history_of(
            curve([*down(15), *[2.3] * 5], **{"train/top1": [*[60.0] * 15, *[10.0] * 5]}, top1=(60, 59)), **ENDED
        ),
        ["diverging"],
    ),
    "learning what validation does not ask": (
        history_of(
            curve(down(8, 4.6, 1.9), **{"train/top1": [2, 6, 14, 22, 29, 36, 41, 45], "val/top1": [1.0, 1.4] * 4})
        ),
        [],
    ),
    "flat from published weights": (history_of(curve([0.2] * 9, top1=(96, 95), start=95)), []),
    "thrown to chance later": (history_of(curve([2.3, 1.5, 0.9, 2.3, 2.31, 2.3, 2.3])), ["diverging"]),
    "climbing while weights leave": (
        history_of(curve([*down(6), 0.5, 0.8, 1.2], **{"prune/density": [1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.2]})),
        [],
    ),
    "climbing while the condemned shrink": (
        history_of(
            curve(down(9)), curve([0.4, 0.7, 1.1, 0.5, 0.4], **{"prune/density": [1, 1, 1, 0.5, 0.5]}), shrinking=3
        ),
        [],
    ),
    "not a number": (history_of(curve([2.3, 2.0, math.nan])), ["diverging"]),
    "infinite, as the log has it": (history_of(curve([2.3, 2.0, "inf"], [2.3, 2.0, 2.0])), ["diverging"]),
    "climbing": (history_of(curve([2.3, 1.8, 1.2, 1.6, 2.4, 3.9])), ["diverging"]),
    "climbing in a later round": (history_of(curve(down(9)), curve([0.5, 0.4, 0.7, 1.1, 1.9])), ["diverging"]),
    "overfitted": (
        history_of(
            curve(down(20, 2.3, 0.02), [*down(10, 2.3, 1.0), *(1.1 + 0.08 * i for i in range(10))], top1=(99, 62))
        ),
        ["overfitting"],
    ),
    "overfitted but no worse": (history_of(curve(down(20, 2.3, 0.02), down(20, 2.3, 1.0), top1=(99, 62))), []),
    "cut short": (history_of(curve([2.3 - 0.07 * i for i in range(16)], top1=(45, 46)), **ENDED), ["underfitting"]),
    "still in its round": (history_of(curve([2.3 - 0.07 * i for i in range(16)], top1=(45, 46))), []),
    "stuck": (history_of(curve([2.3, 2.0, *[1.8] * 14], top1=(32, 33)), **ENDED), ["underfitting"]),
    "low in training alone, under strong augmentation": (
        history_of(curve([6.0 - 0.1 * i for i in range(16)], [5 - 0.2 * i for i in range(16)], top1=(40, 72)), **ENDED),
        [],
    ),
    "waiting for images": (history_of(curve(down(6), **{"time/loader_wait": 0.6})), ["loader-bound"]),
    "waiting a little": (history_of(curve(down(6), **{"time/loader_wait": 0.1})), []),
    "penalty in vain": (
        history_of(curve(down(6)), pruning=[{"round": 1, "condemned_ratio": 0.35}]),
        ["penalty without effect"],
    ),
    "penalty at work": (history_of(curve(down(6)), pruning=[{"round": 1, "condemned_ratio": 0.004}]), []),
    "no penalty": (
        history_of(
            curve(down(6)), pruning=[{"round": 1, "condemned_ratio": 0.35}], recipe={"pruning": {"method": "imp"}}
        ),
        [],
    ),
    "an empty layer": (history_of(curve(down(6)), pruning=[{"round": 2, "layers": LAYERS}]), ["layer nearly empty"]),
    "a costly removal": (
        history_of(curve(down(6)), rows=[row(0, 90.0), row(1, 84.0, 12.0)]),
        ["removal costs accuracy"],
    ),
    "a costly removal on a few images": (
        history_of(
            curve(down(6)), rows=[row(0, 17.4), row(1, 13.9, 2.8)], pruning=[{"round": 1, "what_if_loss_gap": 0.014}]
        ),
        [],
    ),
    "a round that lost what it shrank": (
        history_of(curve(down(6)), rows=[row(0, 57.6, loss=1.2), row(1, 26.4, 0.0, 2.0)]),
        ["removal costs accuracy"],
    ),
    "a round that lost accuracy and no loss": (
        history_of(curve(down(6)), rows=[row(0, 17.4, loss=2.2), row(1, 11.8, 0.0, 2.21)]),
        [],
    ),
    "a removal that was recovered from": (history_of(curve(down(6)), rows=[row(0, 90.0), row(1, 89.5, 12.0)]), []),
    "two at once": (
        history_of(curve(FLAT, top1=(10, 10), **{"time/loader_wait": 0.6})),
        ["not learning", "loader-bound"],
    ),
    "nothing yet": (history_of(), []),
}


@pytest.mark.parametrize("name", CURVES)
def test_each_curve_has_its_diagnosis(name):
    given, expected = CURVES[name]
    found = diagnose(given)
    assert [diagnosis.name for diagnosis in found] == expected
    for diagnosis in found:
        assert any(letter.isdigit() for letter in diagnosis.seen), "the symptom is quantified"
        assert diagnosis.seen.endswith(".")
        assert diagnosis.advice


def test_every_rule_has_a_curve():
    assert len({name for _, names in CURVES.values() for name in names}) == len(RULES) == 8


def test_a_diagnosis_names_numbers_and_fields():
    [found] = diagnose(CURVES["a costly removal"][0])
    assert str(found) == (
        "removal costs accuracy: in round 1 removal cost 12.00 points immediately, and 6.00 points were still missing "
        "at the end of the round, at density 0.500. Try more pruning.schedule.rounds, pruning.method=rsst, a longer "
        "penalty.window, or more train.round_epochs."
    )


def test_a_healthy_real_run_never_has_a_diagnosis():
    """Measured curves of the quick start, with the noise of 144 validation images."""
    with open(Path(__file__).with_name("quickstart_curve.csv"), encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)]
    assert len(rows) == 140
    events = [
        {
            "event": "epoch", "step": 20 * i, "round": int(r["round"]), "train/loss": r["train_loss"],
            "val/loss": r["val_loss"], "train/top1": r["train_top1"], "val/top1": r["val_top1"],
        }
        for i, r in enumerate(rows, 1)
    ]  # fmt: skip
    for number in range(1, 141):
        so_far = History(Path(), RSST, {}, {"state": "running" if number < 140 else "finished"}, events[:number])
        assert diagnose(so_far) == [], number


def test_log_and_report_say_it_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "PICTURES", ())
    monkeypatch.setattr(curves, "DRAWINGS", ())
    text = tiny.RECIPE.replace("figures: false", "figures: true").replace("lr: 3e-3", "lr: 1e-9")
    recipe = tiny.write_recipe(tmp_path, text)
    assert tiny.command("train", recipe, "train.epochs=12", "train.steps_per_epoch=1") == 0
    said = [event["text"] for event in tiny.events(tmp_path / "runs" / "tiny") if event["event"] == "warning"]
    assert [text.split(":")[1].strip() for text in said] == ["not learning"]
    assert capsys.readouterr().err.count("warning: diagnosis: not learning: after 5 epochs") == 1
    page = (tmp_path / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    assert page.count("not learning: after 5 epochs") == 1


def test_the_report_shows_each_warning_once():
    texts = ["a", "a", "b", f"{PREFIX}not learning: x"]
    given = history_of(curve(down(3)))
    given.events.extend({"event": "warning", "step": i, "text": text} for i, text in enumerate(texts, 1))
    assert list(story.warnings(given)) == ["Step 1 (and 1 more): a", "Step 3: b"]


@pytest.mark.parametrize(("epochs", "due"), [(6, [5]), (100, [5, 10, 15]), (300, [5, 15, 30])])
def test_curves_are_checked_periodically(epochs, due):
    moments = [e for e in range(1, epochs + 1) if watching._is_due(Progress(1, (epochs,), 0, e))]
    assert moments[: len(due)] == due
