"""Tracking: metrics.jsonl always, and trackers that may fail in any way without training noticing."""

import json
import sys
import textwrap
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate import PartialState
from accelerate import tracking as accelerate_tracking
from PIL import Image

from vit_rsst import reach
from vit_rsst.run import tracking
from vit_rsst.run.tracking import Tracker


class Fake:
    """A tracker that records its calls and fails at one of them."""

    fails_at = ""
    calls: list[tuple] = []  # noqa: RUF012 - every test has a class of its own

    def __init__(self, **options: object):
        self.call("init", options)

    def call(self, what: str, *values: object) -> None:
        if what == self.fails_at:
            raise RuntimeError(f"cannot {what}\nand a traceback of the service")
        self.calls.append((what, *values))

    def start(self) -> None:
        self.call("start")

    def store_init_configuration(self, values: dict) -> None:
        self.call("config", values)

    def log(self, values: dict, step: int) -> None:
        self.call("log", values, step)

    def log_images(self, values: dict, step: int, **options: object) -> None:
        self.call("log_images", values, step, options)

    def finish(self) -> None:
        self.call("finish")


@pytest.fixture
def fake(monkeypatch):
    """fake(name, fails_at) puts a Fake in the place of a tracker and returns its class."""

    def make(name: str, fails_at: str = "") -> type[Fake]:
        cls = type("Fake", (Fake,), {"fails_at": fails_at, "calls": []})
        monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, name, cls)
        return cls

    return make


@pytest.fixture
def tracker(tmp_path) -> tuple[Tracker, list[str]]:
    (tmp_path / "logs").mkdir()
    warned: list[str] = []
    return Tracker(tmp_path / "metrics.jsonl", True, warned.append), warned


def start(tracker: Tracker, *names: str) -> None:
    config = {"seed": 0, "optim": {"lr": 1e-3}, "model": None, "precise": True, "rate": 0.5}
    tracker.start(names, "project", "run", config, tracker.path.parent / "logs")


def lines(tracker: Tracker) -> list[dict]:
    return [json.loads(line) for line in tracker.path.read_text(encoding="utf-8").splitlines()]


# -- metrics.jsonl


def test_every_event_is_a_line_of_json(tracker):
    tracker, warned = tracker
    tracker.log("step", 1, {"train/loss": 0.1 + 0.2, "name": "ü"})
    tracker.log("epoch", 2, {"val/top1": 50.0})
    tracker.warning(2, "look\nhere")
    assert lines(tracker) == [
        {"event": "step", "step": 1, "train/loss": 0.1 + 0.2, "name": "ü"},
        {"event": "epoch", "step": 2, "val/top1": 50.0},
        {"event": "warning", "step": 2, "text": "look\nhere"},
    ]
    assert warned == ["look\nhere"]


def test_a_number_that_is_not_finite_leaves_the_line_valid_json(tracker, fake):
    tracker, _ = tracker
    fake_class = fake("tensorboard")
    start(tracker, "tensorboard")
    tracker.log("step", 1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/lr": 0.5})
    [line] = tiny.events(tracker.path.parent)
    assert line["train/lr"] == 0.5
    assert fake_class.calls[-1] == ("log", {"train/lr": 0.5}, 1)


def test_other_processes_write_nothing(tmp_path, fake):
    cls = fake("tensorboard")
    other = Tracker(tmp_path / "metrics.jsonl", False, pytest.fail)
    start(other, "tensorboard")
    other.log("step", 1, {"train/loss": 1.0})
    other.warning(1, "text")
    other.truncate(0)
    other.finish()
    assert list(tmp_path.iterdir()) == []
    assert cls.calls == []


EVENTS = [("step", 2), ("epoch", 4), ("round", 4), ("step", 5), ("warning", 6), ("epoch", 8), ("round", 8)]


@pytest.mark.parametrize(
    "step, kept",
    [
        (0, []),
        (4, [("step", 2), ("epoch", 4)]),
        (5, [("step", 2), ("epoch", 4), ("round", 4), ("step", 5)]),
        (7, EVENTS[:5]),
        (8, EVENTS[:6]),
        (9, EVENTS),
    ],
)
def test_what_a_resumed_run_writes_again_is_dropped_and_kept_in_the_logs(tracker, step, kept):
    tracker, _ = tracker
    for event, at in EVENTS:
        tracker.log(event, at, {"x": at})
    before = tracker.path.read_text()
    tracker.truncate(step)
    assert [(line["event"], line["step"]) for line in lines(tracker)] == kept
    tails = list((tracker.path.parent / "logs").iterdir())
    assert len(tails) == (len(kept) < len(EVENTS))
    assert sorted(before.splitlines()) == sorted(
        tracker.path.read_text().splitlines() + [line for tail in tails for line in tail.read_text().splitlines()]
    )


@pytest.mark.parametrize("half", ['{"event": "epoch", "st', '{"event": "epoch"}', "{", "\x00\x00\x00"])
def test_a_line_cut_short_by_a_kill_is_dropped(tracker, half):
    tracker, _ = tracker
    tracker.log("step", 1, {})
    with open(tracker.path, "a") as file:
        file.write(half)
    tracker.truncate(1)
    assert [line["step"] for line in lines(tracker)] == [1]
    tracker.log("step", 2, {})
    assert [line["step"] for line in lines(tracker)] == [1, 2]
    [tail] = (tracker.path.parent / "logs").iterdir()
    assert tail.read_text() == half


def test_a_second_resume_from_the_same_step_keeps_the_first_tail_too(tracker):
    tracker, _ = tracker
    for number in (1, 2):
        tracker.log("step", 5, {"attempt": number})
        tracker.truncate(4)
    kept = "".join(tail.read_text() for tail in (tracker.path.parent / "logs").iterdir())
    assert '"attempt": 1' in kept
    assert '"attempt": 2' in kept


def test_a_truncation_without_a_file_does_nothing(tracker):
    tracker, _ = tracker
    tracker.truncate(5)
    assert not tracker.path.exists()


# -- trackers


def test_a_tracker_gets_the_configuration_and_the_numbers(tracker, fake):
    tracker, warned = tracker
    cls = fake("tensorboard")
    start(tracker, "tensorboard")
    tracker.log("epoch", 4, {"val/top1": 50.0, "round": 1, "text": "no number"})
    tracker.finish()
    assert [call[0] for call in cls.calls] == ["init", "start", "config", "log", "finish"]
    config = {"seed": 0, "optim": "{'lr': 0.001}", "model": "None", "precise": True, "rate": 0.5}
    assert cls.calls[2] == ("config", config)
    assert cls.calls[3] == ("log", {"val/top1": 50.0, "round": 1}, 4)
    assert not warned


PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


@pytest.fixture
def media(monkeypatch):
    """Stands for wandb's and trackio's own modules: `Image` and `Html` become what they were made of."""
    module = types.SimpleNamespace(Image=lambda pixels: ("image", pixels), Html=lambda page, inject: ("html", page))
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_every_tracker_gets_figures_and_the_report(tracker, fake, media, tmp_path, monkeypatch):
    tracker, warned = tracker
    page = tmp_path / "report.html"
    page.with_suffix(".md").write_text("# r\n\n**Curves.** c\n\n![Curves](figures/curves.svg)\n\nend\n")
    classes = {name: fake(name) for name in ("tensorboard", "wandb", "trackio")}
    monkeypatch.setattr(tracker, "_start_wandb", tracker._start)
    start(tracker, *classes)
    tracker.figure(7, "curves", lambda: PIXELS)
    tracker.report(8, page)
    assert not warned
    shown = {name: cls.calls[-2:] for name, cls in classes.items()}
    for name, order in (("tensorboard", {"dataformats": "NHWC"}), ("wandb", {})):
        (what, values, step, options), _ = shown[name]
        assert (what, list(values), step, options) == ("log_images", ["figures/curves"], 7, order)
        assert np.array_equal(values["figures/curves"], PIXELS[None])
    assert shown["trackio"][0] == ("log", {"figures/curves": ("image", PIXELS)}, 7)
    assert shown["tensorboard"][1] == ("log", {"report": "# r\n\n**Curves.** c\n\n\nend\n"}, 8)
    assert shown["wandb"][1] == shown["trackio"][1] == ("log", {"report": ("html", page)}, 8)


def test_without_a_tracker_nothing_is_drawn_for_one(tracker):
    tracker, _ = tracker
    tracker.figure(1, "curves", lambda: pytest.fail("drawn for nobody"))
    tracker.report(1, Path("nowhere.html"))


def test_a_run_that_began_anew_is_no_resumed_one_for_trackio(tmp_path, fake):
    (tmp_path / "logs").mkdir()
    cls = fake("trackio")
    for _ in range(2):
        start(Tracker(tmp_path / "metrics.jsonl", True, pytest.fail), "trackio")
    assert [call[1]["resume"] for call in cls.calls if call[0] == "init"] == ["never", "allow"]


@pytest.mark.fault("F27")
@pytest.mark.parametrize("fails_at", ["init", "start", "config", "log", "log_images", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning_and_the_others_go_on(tracker, fake, media, fails_at):
    tracker, warned = tracker
    bad, good = fake("tensorboard", fails_at), fake("trackio")
    start(tracker, "tensorboard", "trackio")
    for step in (1, 2, 3):
        tracker.log("step", step, {"train/loss": 1.0})
    tracker.figure(3, "curves", lambda: PIXELS)
    tracker.finish()

    assert len(warned) == 1
    assert "tensorboard" in warned[0]
    assert f"cannot {fails_at}" in warned[0]
    assert "\n" not in warned[0]
    assert "dropped for this run" in warned[0]
    assert len(bad.calls) <= 7
    assert [call[0] for call in good.calls] == ["init", "start", "config", *["log"] * 4, "finish"]
    assert [line["step"] for line in lines(tracker)] == [1, 2, 3]


@pytest.mark.fault("F27")
def test_a_tracker_whose_package_is_missing_is_left_out(tracker, monkeypatch):
    tracker, warned = tracker
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)  # there once another test has imported it
    for name in ("torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    with tiny.alone_on_cpu():
        PartialState()
        start(tracker, "tensorboard")
        tracker.log("step", 1, {"train/loss": 1.0})
    assert len(warned) == 1
    assert "ensorboard" in warned[0]
    assert lines(tracker)


@pytest.mark.fault("F27")
@pytest.mark.parametrize("unreachable", ["", "https://api.wandb.ai does not answer: timed out"])
def test_wandb_without_its_service_records_offline(tracker, fake, monkeypatch, unreachable):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(reach, "unreachable", lambda url: unreachable)
    tracker, warned = tracker
    cls = fake("wandb")
    begin = cls.start

    def start_offline_alone(self: Fake) -> None:
        if cls.calls[-1][1].get("mode") != "offline":
            raise RuntimeError("the key is refused")
        begin(self)

    monkeypatch.setattr(cls, "start", start_offline_alone)
    start(tracker, "wandb")
    tracker.log("step", 1, {"train/loss": 1.0})
    assert len(warned) == 1
    assert "offline" in warned[0]
    assert (unreachable or "the key is refused") in warned[0]
    assert cls.calls[-1] == ("log", {"train/loss": 1.0}, 1)


@pytest.mark.fault("F27")
def test_a_tracker_whose_last_words_take_too_long_is_left_behind(tracker, fake, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    tracker, warned = tracker
    monkeypatch.setattr(fake("tensorboard"), "finish", lambda self: time.sleep(20))
    good = fake("trackio")
    start(tracker, "tensorboard", "trackio")
    begin = time.monotonic()
    tracker.finish()
    assert time.monotonic() - begin < 10
    assert warned == ["tracking: tensorboard did not finish within 0.2 s; giving up on it."]
    assert good.calls[-1] == ("finish",)


def test_a_tracker_in_trouble_is_warned_of_once(tracker, fake, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(reach, "unreachable", lambda url: "no answer")
    tracker, warned = tracker
    fake("wandb", "log")
    start(tracker, "wandb")
    tracker.log("step", 1, {"train/loss": 1.0})
    assert len(warned) == 1
    assert not tracker.trackers


def test_a_resumed_run_goes_on_under_the_same_id_in_wandb(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "logs").mkdir()
    cls = fake("wandb")
    for _ in range(2):
        start(Tracker(tmp_path / "metrics.jsonl", True, pytest.fail), "wandb")
    first, second = (call[1] for call in cls.calls if call[0] == "init")
    assert first == second
    assert first["id"]
    assert first["resume"] == "allow"
    assert first["dir"] == str(tmp_path / "logs")


@pytest.mark.parametrize("fails_at", ["start", "log", "finish"])
def test_training_does_not_notice_a_tracker_that_fails(tmp_path, fake, capsys, fails_at):
    cls = fake("tensorboard", fails_at)
    recipe = tiny.write_recipe(tmp_path)
    short = ("train.epochs=1", "train.round_epochs=1", "train.steps_per_epoch=1", "pruning.schedule.rounds=1")
    assert tiny.command("train", recipe, *short, "tracking.with=[tensorboard]") == 0
    told = capsys.readouterr().err
    assert told.count("tensorboard failed to") == 1
    assert tiny.status(tmp_path / "runs" / "tiny")["state"] == "finished"
    assert "init" in [call[0] for call in cls.calls]


# -- the real ones


def test_a_resumed_run_is_one_run_for_tensorboard(tmp_path):
    (tmp_path / "logs").mkdir()
    with tiny.alone_on_cpu():
        PartialState()
        for step in (1, 2):
            tracker = Tracker(tmp_path / "metrics.jsonl", True, pytest.fail)
            start(tracker, "tensorboard")
            tracker.log("step", step, {"train/loss": 1.0})
            tracker.finish()
    assert len(list((tmp_path / "logs" / "run").glob("events.out.tfevents.*"))) == 2
    assert len(list((tmp_path / "logs").rglob("hparams.yml"))) == 1


def test_tensorboard_gets_event_files_with_curves_figures_and_the_report(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny.write_recipe(tmp_path, tiny.RECIPE.replace("figures: false", "figures: true"))
    assert tiny.command("train", recipe, "tracking.with=[tensorboard]", "train.steps_per_epoch=1") == 0
    run = tmp_path / "runs" / "tiny"
    found: dict[str, list[tuple[int, float]]] = {}
    images, texts = {}, {}
    event_files = sorted(run.rglob("events.out.tfevents.*"))
    assert event_files
    assert all(path.is_relative_to(run / "logs") for path in event_files)
    for path in event_files:
        accumulator = EventAccumulator(str(path)).Reload()
        for tag in accumulator.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in accumulator.Scalars(tag))
        images |= {tag: accumulator.Images(tag) for tag in accumulator.Tags()["images"]}
        texts |= {tag: accumulator.Tensors(tag) for tag in accumulator.Tags()["tensors"]}
    epochs = [event for event in tiny.events(run) if event["event"] == "epoch"]
    assert [step for step, _ in found["val/top1"]] == [event["step"] for event in epochs] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["val/top1"]] == pytest.approx([event["val/top1"] for event in epochs])
    assert found.keys() >= {"train/loss", "train/lr", "val/loss", "prune/density", "prune/what_if_gap", "test/top1"}
    assert set(images) == {f"figures/{path.stem}" for path in (run / "figures").glob("*.svg")}
    assert {(of_tag[-1].step, of_tag[-1].width) for of_tag in images.values()} == {(6, 780)}
    told = texts["report/text_summary"][-1].tensor_proto.string_val[0].decode("utf-8")
    assert told.startswith("# tiny (finished)")
    assert "![" not in told


def test_wandb_offline_keeps_numbers_figures_and_the_report_without_a_network(tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    warned: list[str] = []
    tracker = Tracker(tmp_path / "metrics.jsonl", True, warned.append)
    with tiny.alone_on_cpu():
        PartialState()
        start(tracker, "wandb")
        for step in (1, 2):
            tracker.log("step", step, {"train/loss": 1.0 / step})
        tracker.figure(2, "curves", lambda: PIXELS)
        (tmp_path / "report.html").write_text("<p>the report</p>")
        tracker.report(2, tmp_path / "report.html")
        tracker.finish()
    import wandb

    wandb.teardown()
    assert not warned
    [record] = Path(tmp_path / "logs").rglob("*.wandb")
    assert record.stat().st_size > 0
    assert (tmp_path / "logs" / "tracker_id").read_text() in record.name
    media = record.parent / "files" / "media"
    [image], [page] = media.glob("images/figures/curves_*.png"), media.glob("html/report_*.html")
    assert np.array_equal(np.asarray(Image.open(image)), PIXELS)
    assert page.read_text() == "<p>the report</p>"
    assert [path.name for path in tmp_path.glob("wandb")] == [], "nothing is left in the working folder"


def test_trackio_keeps_numbers_figures_and_the_report_without_a_network(tmp_path):
    pytest.importorskip("trackio")
    code = """
        import pathlib, sys, numpy
        from accelerate import PartialState
        from vit_rsst.run.tracking import Tracker
        folder = pathlib.Path(sys.argv[1])
        PartialState(cpu=True)
        tracker = Tracker(folder / "metrics.jsonl", True, print)
        tracker.start(("trackio",), "project", "run", {"seed": 0}, folder)
        tracker.log("step", 1, {"train/loss": 1.0})
        tracker.figure(1, "curves", lambda: numpy.zeros((2, 3, 3), numpy.uint8))
        tracker.report(1, folder / "report.html")
        tracker.finish()
    """
    (tmp_path / "report.html").write_text("<p>the report</p>")
    done = tiny.python("-c", textwrap.dedent(code), tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr
    assert "tracking:" not in done.stdout
    media = tmp_path / "trackio" / "media" / "project" / "run" / "1"
    assert sorted(path.suffix for path in media.iterdir()) == [".html", ".png"]
    [page] = media.glob("*.html")
    assert "the report" in page.read_text()
