"""Resume points: whatever crashes while one is written or is damaged later, an intact one is found or none at all."""

import json
import os
import pickle
import shutil
import stat
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vit_rsst import files, shards
from vit_rsst.errors import Damaged, MissingRequirement
from vit_rsst.run import checkpoint
from vit_rsst.run.checkpoint import Checkpointer, ResumePoint


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Disables fsync: power failure is not tested, and hundreds of points are written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def point(step: int) -> ResumePoint:
    """A resume point in which every number is its step."""
    return ResumePoint(
        step,
        {"model": {"w": torch.full((8, 4), float(step)), "n": torch.tensor(step)}, "optimizer": {}},
        {"progress": {"round": 0, "step": step}, "recipe": "abc"},
    )


def is_whole(found: ResumePoint) -> bool:
    expected = point(found.step)
    return (
        found.numbers == expected.numbers
        and found.tensors.keys() == expected.tensors.keys()
        and torch.equal(found.tensors["model"]["w"][:], expected.tensors["model"]["w"])
        and torch.equal(found.tensors["model"]["n"][:], expected.tensors["model"]["n"])
    )


def with_points(folder: Path, *steps: int, keep: int = 2) -> Path:
    checkpointer = Checkpointer(folder, keep)
    for step in steps:
        checkpointer.save(point(step))
    checkpointer.wait()
    return folder


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# -- round trips


def test_no_thread_outlives_a_save(tmp_path):
    before = set(threading.enumerate())
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2):
        checkpointer.save(point(step))
        checkpointer.wait()
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
        assert set(threading.enumerate()) == before


def test_a_resume_point_round_trips(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model": {
            "a.weight": torch.randn(5, 3, generator=generator).t(),  # not contiguous
            "b": torch.tensor([-0.0, 3e38, 1e-45]),
            "half": torch.randn(4, generator=generator).bfloat16(),
        },
        "optimizer": {},
        "controller": {"mask/a": torch.tensor([255, 1], dtype=torch.uint8), "step": torch.tensor(7)},
    }
    shared = torch.ones(3)
    tensors["model"] |= {"tied": shared, "tied too": shared}
    numbers = {"loss": 0.1 + 0.2, "penalty": None, "meter": [1.5, 2.0], "name": "ü", "nested": {"deep": {"x": True}}}
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(ResumePoint(12, tensors, numbers))
    checkpointer.wait()
    found = Checkpointer(tmp_path / "c").load()

    assert found.step == 12
    assert found.numbers == numbers
    assert found.tensors.keys() == tensors.keys()
    for stem in tensors:
        assert found.tensors[stem].keys() == tensors[stem].keys()
        for name, tensor in tensors[stem].items():
            back = found.tensors[stem][name][:]
            assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
            assert back.contiguous().flatten().view(torch.uint8).tolist() == (
                tensor.contiguous().flatten().view(torch.uint8).tolist()
            )


def test_a_lent_point_is_copied_and_an_own_one_is_not(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Checkpointer, "_write", lambda self, found: written.append(found))
    checkpointer, given = Checkpointer(tmp_path / "c"), point(3)
    for is_own in (False, True):
        checkpointer.save(given, is_own)
        checkpointer.wait()
        for name, tensor in written[-1].tensors["model"].items():
            assert torch.equal(tensor, given.tensors["model"][name])
            assert (tensor.data_ptr() == given.tensors["model"][name].data_ptr()) == is_own


def test_what_is_gathered_for_a_point_is_nobody_elses():
    net = torch.nn.Linear(2, 3)
    for copies in (False, True):
        found = shards.gathered(net.state_dict(), copies)
        assert (found["weight"].data_ptr() == net.weight.data_ptr()) != copies


def test_without_points_there_is_nothing_to_load(tmp_path):
    assert Checkpointer(tmp_path / "none").load() is None
    (tmp_path / "empty").mkdir()
    assert Checkpointer(tmp_path / "empty").load() is None


def test_the_newest_point_is_loaded_and_the_names_sort_by_step(tmp_path):
    folder = with_points(tmp_path / "c", 9, 10, 100, keep=5)
    assert visible(folder) == ["step-00000009", "step-00000010", "step-00000100"]
    assert Checkpointer(folder).load().step == 100
    assert (folder / "LATEST").read_text() == "step-00000100\n"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_requested_number_of_points_is_kept_and_nothing_else(tmp_path, keep):
    folder = with_points(tmp_path / "c", *range(10, 60, 10), keep=keep)
    assert visible(folder) == [f"step-000000{step}" for step in (10, 20, 30, 40, 50)][-keep:]
    assert hidden(folder) == []


def test_saving_a_step_again_replaces_its_point(tmp_path):
    folder = with_points(tmp_path / "c", 4, 8)
    checkpointer = Checkpointer(folder)
    checkpointer.save(ResumePoint(8, {"model": {"w": torch.zeros(1)}}, {"second": True}))
    checkpointer.wait()
    assert [name[:13] for name in visible(folder)] == ["step-00000004", "step-00000008"]
    assert hidden(folder) == []
    assert Checkpointer(folder).load().numbers == {"second": True}


def test_a_save_holds_the_tensors_of_its_moment(tmp_path, monkeypatch):
    """Training continues in place while the thread writes."""
    gate = threading.Event()

    def slow_save(*arguments: object) -> None:
        assert gate.wait(30)
        save_file(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", slow_save)
    tensors = {"model": {"w": torch.ones(3)}}
    numbers = {"progress": {"step": 1}}
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(ResumePoint(1, tensors, numbers))
    tensors["model"]["w"].zero_()
    assert visible(tmp_path / "c") == []
    gate.set()
    checkpointer.wait()
    assert Checkpointer(tmp_path / "c").load().tensors["model"]["w"][:].tolist() == [1, 1, 1]


def test_the_modes_of_all_files_follow_the_umask(tmp_path):
    (tmp_path / "plain").write_text("")
    folder = with_points(tmp_path / "c", 4) / "step-00000004"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes.keys() == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert set(modes.values()) == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


# -- crashes while a point is written


class Crash(OSError):
    """A simulated crash."""


class Bomb:
    """Counts what is written and dies at the n-th write: before it, in its middle or right after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, moment: str):
        self.count, self.at, self.moment = 0, at, moment
        for owner, name, tear in (
            (checkpoint, "save_file", lambda tensors, path: Path(path).write_bytes(b"\x10\0\0\0\0\0\0\0{half")),
            (files, "write_json", lambda path, value: path.write_text('{"format": "vit_rsst.res')),
            (files, "write_text", lambda path, text: None),
            (files, "settle", lambda path: None),
            (files, "settle_folder", lambda path: None),
            (os, "replace", lambda source, target: None),
            (os, "rename", lambda source, target: None),
            (shutil, "rmtree", lambda path: next(p for p in Path(path).rglob("*") if p.is_file()).unlink()),
        ):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name), tear))

    def wrapped(self, function: Callable, tear: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            self.count += 1
            if self.count != self.at:
                return function(*arguments, **options)
            self.at = -1  # dead: nothing after this one counts
            if self.moment == "after":
                function(*arguments, **options)
            elif self.moment == "amid":
                tear(*arguments)
            raise Crash(f"died {self.moment} write {self.count}")

        return call


def crashes(folder: Path, make: Callable[[], Checkpointer], save: ResumePoint, moment: str) -> int:
    """Saves once for every write that a save consists of, dying there; returns how many writes there were.

    After every crash a new process must find an intact point, the newest visible one, and be able to resume.
    """
    at = 0
    while True:
        at += 1
        shutil.rmtree(folder, ignore_errors=True)
        checkpointer = make()
        newest = checkpointer.load().step
        with pytest.MonkeyPatch.context() as patch:
            bomb = Bomb(patch, at, moment)
            checkpointer.save(save)
            death = None
            try:
                checkpointer.wait()
            except MissingRequirement as error:
                death = error.__cause__
            if death is None:
                assert bomb.count < at
                return at - 1
        assert isinstance(death, Crash)
        where = f"dead {moment} write {at}"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a visible point is never damaged
            found = Checkpointer(folder).load()
        assert found is not None, f"{where}: no point is left"
        assert is_whole(found), where
        is_there = any(name.startswith(f"step-{save.step:08d}") for name in visible(folder))
        assert found.step == (save.step if is_there else newest), f"{where}: the newest complete point is gone"
        with_points(folder, found.step + 4)
        assert hidden(folder) == [], where
        assert Checkpointer(folder).load().step == found.step + 4


@pytest.mark.fault("F4")
@pytest.mark.parametrize("moment", ["before", "amid", "after"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_write_leaves_a_whole_point(tmp_path, keep, moment):
    folder = tmp_path / "c"

    def make() -> Checkpointer:
        with_points(folder, *(4, 8)[-keep:], keep=keep)
        return Checkpointer(folder, keep)

    writes = crashes(folder, make, point(12), moment)
    assert writes >= 12, "save_file × 2, write_json × 2, settle × 3, settle_folder × 2, three renames at least"


@pytest.mark.parametrize("moment", ["before", "amid", "after"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_while_a_step_is_saved_again_leaves_its_point(tmp_path, keep, moment):
    folder = tmp_path / "c"

    def make() -> Checkpointer:
        with_points(folder, *(4, 8)[-keep:], keep=keep)
        return Checkpointer(folder, keep)

    assert crashes(folder, make, point(8), moment) >= 12


def test_the_first_save_that_crashes_leaves_nothing_that_could_be_loaded(tmp_path, monkeypatch):
    for at in range(1, 30):
        with monkeypatch.context() as patch:
            bomb = Bomb(patch, at, "amid")
            checkpointer = Checkpointer(tmp_path / str(at))
            checkpointer.save(point(4))
            try:
                checkpointer.wait()
            except MissingRequirement:
                pass
            else:
                break
        found = Checkpointer(tmp_path / str(at)).load()
        assert found is None or is_whole(found)
    assert 10 < bomb.count < at


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_wait_reports_a_write_error_and_older_points_are_kept(tmp_path, monkeypatch, error):
    folder = with_points(tmp_path / "c", 4, 8)

    def full(*_: object) -> None:
        raise error

    checkpointer = Checkpointer(folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        checkpointer.save(point(12))
        with pytest.raises(MissingRequirement, match=r"earlier ones are untouched.*the same command to resume"):
            checkpointer.wait()
        checkpointer.wait()  # reported once
        checkpointer.save(point(12))
        with pytest.warns(UserWarning, match=r"Training continues; 1 of at most 3"):
            checkpointer.save(point(16))  # reported by the next save at the latest
        with pytest.raises(MissingRequirement):
            checkpointer.wait()
    assert visible(folder) == ["step-00000004", "step-00000008"]
    assert is_whole(Checkpointer(folder).load())
    checkpointer.save(point(20))
    checkpointer.wait()
    assert visible(folder) == ["step-00000008", "step-00000020"]


def test_wait_reports_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "c").write_text("a file stands in the way")
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(point(4))
    with pytest.raises(MissingRequirement, match="could not be written"):
        checkpointer.wait()


# -- damage


def flip(path: Path, place: int, bit: int = 0x01) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def falls_back(folder: Path) -> str:
    """The older point is loaded with a warning that names the newest, which is set aside; returns the warning."""
    with pytest.warns(UserWarning, match="step-00000008") as caught:
        found = Checkpointer(folder).load()
    assert found.step == 4
    assert is_whole(found)
    assert visible(folder) == ["step-00000004"]
    assert len([name for name in hidden(folder) if name.startswith(".bad-step-00000008")]) == 1
    [warning] = caught
    return str(warning.message)


POINT_FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.fault("F8")
@pytest.mark.parametrize("name", POINT_FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut short", "emptied", "longer", "gone", "a folder"])
def test_a_damaged_file_makes_the_older_point_the_newest(tmp_path, name, damage):
    folder = with_points(tmp_path / "c", 4, 8)
    path = folder / "step-00000008" / name
    whole = path.read_bytes()
    if damage == "flipped":
        flip(path, len(whole) // 2)
    elif damage == "cut short":
        path.write_bytes(whole[:-1])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "longer":
        path.write_bytes(whole + b"}")
    else:
        path.unlink()
        if damage == "a folder":
            path.mkdir()
    if name == "manifest.json" and damage == "cut short":
        path.write_bytes(whole[:-10])  # its last byte is a line break
    falls_back(folder)


def test_a_flip_anywhere_in_the_manifest_makes_the_older_point_the_newest(tmp_path):
    folder = with_points(tmp_path / "c", 4, 8)
    shutil.copytree(folder, tmp_path / "copy")
    manifest = folder / "step-00000008" / "manifest.json"
    length, crashed, silent = len(manifest.read_bytes()), [], 0
    for place in range(0, length, 3):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)
        flip(manifest, place)
        near = (tmp_path / "copy" / "step-00000008" / "manifest.json").read_text()[max(place - 8, 0) : place + 8]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = Checkpointer(folder).load()
            except Exception as error:
                crashed.append(f"{type(error).__name__} near {near!r}")
                continue
        assert is_whole(found)
        silent += found.step == 8  # white space is free
    assert not crashed, f"{len(crashed)} of {length // 3} flips, the first: {crashed[0]}"
    assert silent < length / 3 / 4


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"format": "vit_rsst.resume/1"}', "3", '"text"'])
def test_a_manifest_of_another_shape_makes_the_older_point_the_newest(tmp_path, content):
    folder = with_points(tmp_path / "c", 4, 8)
    (folder / "step-00000008" / "manifest.json").write_text(content)
    falls_back(folder)


def test_a_point_of_another_format_is_named_with_its_format(tmp_path):
    folder = with_points(tmp_path / "c", 4, 8)
    path = folder / "step-00000008" / "manifest.json"
    path.write_text(path.read_text().replace("vit_rsst.resume/1", "vit_rsst.resume/2"))
    assert "'vit_rsst.resume/2'" in falls_back(folder)


@pytest.mark.fault("F9")
def test_the_warning_names_the_damaged_file(tmp_path):
    folder = with_points(tmp_path / "c", 4, 8)
    flip(folder / "step-00000008" / "model.safetensors", -1)
    assert "model.safetensors" in falls_back(folder)


def test_when_every_point_is_damaged_the_run_does_not_start_from_nothing(tmp_path):
    folder = with_points(tmp_path / "c", 4, 8)
    for name in visible(folder):
        flip(folder / name / "state.json", 5)
    with (
        pytest.warns(UserWarning, match="setting it aside") as caught,
        pytest.raises(Damaged, match="no intact resume point is left") as error,
    ):
        Checkpointer(folder).load()
    assert len(caught) == 2
    assert error.value.exit_code == 5
    assert len(hidden(folder)) == 2


def test_quarantined_points_are_kept_when_the_run_resumes(tmp_path):
    folder = with_points(tmp_path / "c", 4, 8)
    flip(folder / "step-00000008" / "model.safetensors", -1)
    falls_back(folder)
    with_points(folder, 8, 12)
    assert visible(folder) == ["step-00000008", "step-00000012"]
    assert [name[:18] for name in hidden(folder)] == [".bad-step-00000008"]


# -- foreign files


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.target, "executed"))


@pytest.mark.fault("F10")
def test_a_planted_pickle_is_never_read(tmp_path):
    folder = with_points(tmp_path / "c", 4, 8)
    target = tmp_path / "executed"
    evil = pickle.dumps(Payload(target))
    path = folder / "step-00000008"
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("pytorch_model.bin", "optimizer.bin", "random_states_0.pkl", "custom.pt", "state.pkl"):
        (path / name).write_bytes(evil)
        manifest["files"][name] = {"bytes": len(evil), "sha256": files.sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    found = Checkpointer(folder).load()
    assert is_whole(found)
    assert found.step == 8
    assert not target.exists()
    pickle.loads(evil)
    assert target.exists(), "the payload works"


@pytest.mark.fault("F10")
def test_a_pickle_under_the_name_of_a_tensor_file_is_set_aside(tmp_path):
    folder = with_points(tmp_path / "c", 4, 8)
    path = folder / "step-00000008"
    (path / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    manifest = json.loads((path / "manifest.json").read_text())
    size = (path / "model.safetensors").stat().st_size
    manifest["files"]["model.safetensors"] = {"bytes": size, "sha256": files.sha256(path / "model.safetensors")}
    (path / "manifest.json").write_text(json.dumps(manifest))
    falls_back(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.fault("F11")
@pytest.mark.parametrize("prefix", ["../", "../../outside/", "/", "sub/../../"])
def test_a_manifest_cannot_point_outside_its_folder(tmp_path, prefix):
    folder = with_points(tmp_path / "c", 4, 8)
    path = folder / "step-00000008"
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file({"secret": torch.ones(1)}, outside / "secret.safetensors")
    for place in (folder, tmp_path):
        shutil.copy(outside / "secret.safetensors", place / "secret.safetensors")
    entry = {
        "bytes": (outside / "secret.safetensors").stat().st_size,
        "sha256": files.sha256(outside / "secret.safetensors"),
    }
    name = f"{outside}/secret.safetensors" if prefix == "/" else f"{prefix}secret.safetensors"
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))
    falls_back(folder)


def test_a_file_verified_only_by_an_outside_namesake_is_not_read(tmp_path):
    folder = with_points(tmp_path / "c", 4, 8)
    path = folder / "step-00000008"
    save_file({"w": torch.ones(1)}, folder / "extra.safetensors")
    save_file({"w": torch.zeros(1)}, path / "extra.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    outside = folder / "extra.safetensors"
    manifest["files"]["../extra.safetensors"] = {"bytes": outside.stat().st_size, "sha256": files.sha256(outside)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    falls_back(folder)
