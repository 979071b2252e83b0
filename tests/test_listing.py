"""`vit-rsst runs`: wide and narrow terminals, any script, with and without colour."""

import datetime
import json
import re
import socket
from pathlib import Path

import pytest
import tiny
from filelock import FileLock

from vit_rsst.recipe import loading, strict_yaml
from vit_rsst.report import listing
from vit_rsst.report.listing import Listed
from vit_rsst.text import clipped, width_of

NOW = datetime.datetime(2026, 1, 10, 12, 0, tzinfo=datetime.UTC)


def run_folder(folder: Path, name: str, host: str = "elsewhere", **status: object) -> Path:
    """A run folder without results: 6 epochs in 3 rounds."""
    path = folder / name
    path.mkdir(parents=True)
    tree = loading.load(tiny.write_recipe(folder)).tree()
    (path / "recipe.yaml").write_text(strict_yaml.dump(tree), encoding="utf-8")
    (path / "environment.json").write_text(json.dumps({"host": host}), encoding="utf-8")
    found = {"state": "running", "round": 1, "epoch": 1, "updated": "2026-01-10T11:57:00+00:00"} | status
    (path / "status.json").write_text(json.dumps(found), encoding="utf-8")
    return path


def items(number: int = 3) -> list[Listed]:
    names = ["剪枝 实验", "a-run-with-a-rather-long-name-that-goes-on", "b"]
    states = ["finished", "failed", "running"]
    return [
        Listed(names[i], states[i], 0.5, 2, 0.1, 91.25, None, "rsst", 5_000_000, "2026-01-10T11:57:00+00:00")
        for i in range(number)
    ]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[\d*m", "", text)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("is_colored", [True, False])
def test_no_line_is_wider_than_the_terminal(width, is_colored):
    lines = listing.table(items(), NOW, width, is_colored).splitlines()
    assert len(lines) == 4
    assert all(width_of(plain(line)) <= width for line in lines)
    assert ("\x1b[" in "".join(lines)) == is_colored
    assert lines[0].startswith("run")
    assert "state" in lines[0]
    assert "best val" in lines[0]


def test_a_narrow_terminal_keeps_state_progress_best_and_size():
    text = listing.table(items(), NOW, 60, False)
    assert text.splitlines()[0].split() == ["run", "state", "progress", "best", "val", "size"]
    assert [" ".join(line.split()[-5:]) for line in text.splitlines()[1:]] == [
        "finished 50% 91.25 4.8 MiB",
        "failed 50% 91.25 4.8 MiB",
        "running 50% 91.25 4.8 MiB",
    ]
    assert "a-run-…e-that-goes-on" in text, "names differ at the end"


@pytest.mark.parametrize(
    ("width", "expected"), [(99, "剪枝 abcdefgh"), (9, "剪…cdefgh"), (8, "剪…defgh"), (2, "…h"), (1, "…")]
)
def test_a_long_name_is_clipped_in_the_middle(width, expected):
    assert clipped("剪枝 abcdefgh", width) == expected


def test_a_wide_table_is_complete_and_aligned():
    text = listing.table(items(), NOW, None, False)
    head, first, *_ = text.splitlines()
    assert head.split("  ")[0] == "run"
    for part in ("剪枝 实验", "████░░░░  50%", "0.1000", "91.25", "rsst", "4.8 MiB", "3 min ago"):
        assert part in first
    assert "a-run-with-a-rather-long-name-that-goes-on" in text
    ends = [width_of(line[: line.index(word) + len(word)]) for line, word in ((head, "density"), (first, "0.1000"))]
    assert ends[0] == ends[1], "a Chinese character is two cells wide"


def test_color_changes_nothing_else():
    assert plain(listing.table(items(), NOW, 80, True)) == listing.table(items(), NOW, 80, False)


@pytest.mark.parametrize(
    ("environment", "is_terminal", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ],
)
def test_color_follows_the_terminal_and_the_environment(monkeypatch, environment, is_terminal, expected):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert listing.wants_color(is_terminal) == expected


def test_progress_counts_epochs_over_all_rounds(tmp_path):
    young = listing.listed(run_folder(tmp_path, "young"), tmp_path)
    assert young.progress == pytest.approx(3 / 6)
    assert (young.state, young.round, young.best) == ("running", 1, None)
    done = listing.listed(run_folder(tmp_path, "done", state="finished"), tmp_path)
    assert done.progress == 1.0
    (tmp_path / "young" / "recipe.yaml").write_text("name: r\nof_another_version: 1\n")
    assert listing.listed(tmp_path / "young", tmp_path).progress is None


def test_a_run_without_a_process_is_lost(tmp_path):
    path = run_folder(tmp_path, "r", host=socket.gethostname())
    lock = FileLock(path / ".lock")
    with lock:
        assert listing.listed(path, tmp_path).state == "running"
    (path / ".lock").touch()
    assert listing.listed(path, tmp_path).state == "lost"
    with lock.acquire(timeout=0):  # reading did not take the lock
        pass
    away = run_folder(tmp_path, "away", host="another machine")
    (away / ".lock").touch()
    assert listing.listed(away, tmp_path).state == "running"


def test_nested_runs_are_found_and_written_as_json(tmp_path, capsys):
    for name in ("study/a", "study/b", "c"):
        run_folder(tmp_path / "all" / Path(name).parent, Path(name).name)
    (tmp_path / "all" / "notes.txt").write_text("no run")
    assert tiny.command("runs", tmp_path / "all", "--json", tmp_path / "runs.json") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "c", "study/a", "study/b"]
    found = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert [(item["run"], item["progress"]) for item in found] == [("c", 0.5), ("study/a", 0.5), ("study/b", 0.5)]
    assert tiny.command("runs", tmp_path / "all" / "c") == 0


def test_a_hand_edited_folder_does_not_hide_the_others(tmp_path, capsys):
    path = run_folder(tmp_path, "odd", round="two", epoch=None)
    run_folder(tmp_path, "sound", state="finished")
    (path / "tickets").mkdir()
    (path / "tickets" / "round_00.json").write_text('{"row": {"round": 0, "val_top1": null}}')
    for content in (b"name: [", b"\xff\xfe\x00", b"name: x\npruning: null\n", b"pruning: {method: imp}\n"):
        (path / "recipe.yaml").write_bytes(content)
        assert tiny.command("report", path) == 0
        capsys.readouterr()
        assert tiny.command("runs", tmp_path) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines[1:]] == [["odd", "running"], ["sound", "finished"]]


def test_control_characters_in_a_name_are_not_printed():
    [item] = items(1)
    evil = Listed(**{**vars(item), "run": "a\x1b[2Jb\nc"})
    assert "\x1b" not in listing.table([evil], NOW, None, False)
    assert len(listing.table([evil], NOW, None, False).splitlines()) == 2


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("2026-01-10T11:59:30+00:00", "30 s ago"),
        ("2026-01-10T11:00:00+00:00", "60 min ago"),
        ("2026-01-10T02:00:00+00:00", "10 h ago"),
        ("2026-01-07T12:00:00+00:00", "3 days ago"),
        ("2025-11-01T12:00:00+00:00", "2025-11-01"),
        ("2026-01-10T12:00:09+00:00", "0 s ago"),
        ("", "–"),
    ],
)
def test_times_are_relative(when, expected):
    assert listing.ago(when, NOW) == expected


def test_listing_does_not_import_torch(tmp_path):
    run_folder(tmp_path / "runs", "r")
    code = "import sys; from vit_rsst import cli; cli.main(['runs', sys.argv[1]]); print('torch' in sys.modules)"
    done = tiny.python("-c", code, tmp_path / "runs")
    assert done.stdout.splitlines()[-1] == "False", done.stderr
