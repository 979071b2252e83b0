"""Faults that a run survives, or on which it exits with one sentence; each is really injected.

`scripts/benchmarks/faults.py` runs every test marked with a fault, here and in other files, and reports what happened;
it prints `happened` instead of the name of the test.
"""

import ast
import importlib.metadata
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import faulty
import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from vit_rsst import files
from vit_rsst.errors import Damaged, Diverged, InputError, MissingRequirement
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.run.checkpoint import Checkpointer, ResumePoint
from vit_rsst.run.folder import RunFolder
from vit_rsst.tickets import ticket_file

EPOCH, TOTAL = 3, 18  # steps of the tiny recipe


@pytest.fixture
def happened(record_property) -> Callable[[str], None]:
    """Records what a test did and observed, for the benchmark's report."""
    return lambda text: record_property("happened", text)


def run_of(recipe: Path) -> Path:
    return recipe.parent / "runs" / "tiny"


def steps_of_points(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").glob("step-*"))]


def is_finite(point: ResumePoint) -> bool:
    tensors = [stored[:] for part in point.tensors.values() for stored in part.values()]
    return all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())


# -- F1 to F3, F5: signals. What comes after is compared to the last bit in test_cli.py and test_interruptions.py.


@pytest.mark.fault("F2")
@pytest.mark.parametrize("name", [pytest.param("SIGUSR1", marks=pytest.mark.slow), "SIGTERM"])
def test_a_signal_leaves_a_resume_point_and_the_same_command_resumes(tmp_path, happened, name):
    recipe = faulty.write_recipe(tmp_path)
    job = faulty.start("train", recipe, log=tmp_path / "log")
    faulty.wait_for_step(run_of(recipe), 4, job)
    os.kill(job[0].pid, getattr(signal, name))
    ended = faulty.ended(job, tmp_path / "log")
    assert ended.code == 75, ended.log
    step = tiny.status(run_of(recipe))["step"]
    assert steps_of_points(run_of(recipe))[-1] == step
    again = faulty.command("train", recipe)
    assert again.code == 0, again.log
    happened(f"{name} at step {step}: exit 75 with a resume point; the same command finished")


@pytest.mark.fault("F3")
def test_a_second_interrupt_ends_at_once_and_the_last_point_is_sound(tmp_path, happened):
    recipe = faulty.write_recipe(tmp_path)
    job = faulty.start("train", recipe, log=tmp_path / "log", FAULT="hang:0:7")
    faulty.wait_for_step(run_of(recipe), 6, job)  # a step is logged while the next one runs
    time.sleep(0.2)
    begin = time.monotonic()
    for _ in range(2):
        os.kill(job[0].pid, signal.SIGINT)
        time.sleep(0.05)
    ended = faulty.ended(job, tmp_path / "log")
    assert time.monotonic() - begin < 20
    assert ended.code == 130, ended.log
    assert Checkpointer(run_of(recipe) / "checkpoints").load().step == 6
    assert faulty.command("train", recipe).code == 0
    happened("two SIGINT 50 ms apart in a hanging step: exit 130, point 6 intact, finished when started again")


@pytest.mark.slow
@pytest.mark.fault("F5")
def test_a_run_whose_launcher_is_killed_leaves_a_resume_point(tmp_path, happened):
    recipe = faulty.write_recipe(tmp_path, "max_skipped_steps: 0", steps_per_epoch=40)
    options = ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    path = os.pathsep.join((str(tmp_path), str(tiny.REPOSITORY)))
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "vit_rsst.train", str(recipe)],
            env=tiny.environment(PYTHONPATH=path), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    alive = type("Launcher", (), {"is_alive": lambda self: launcher.poll() is None})()
    faulty.wait_for_step(run_of(recipe), 5, [alive])
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while tiny.status(run_of(recipe))["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    found = tiny.status(run_of(recipe))
    assert (found["state"], found["exit_code"]) == ("stopped", 75), (tmp_path / "log").read_text()
    assert "stopped by loss of the launcher" in found["reason"]
    happened(f"launcher killed: the orphan stopped at step {found['step']} with a resume point and code 75")


# -- F4: killed while a point is written

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir"}
"""Audit events for file operations; os.replace is a rename."""


def point(step: int, size: int = 8) -> ResumePoint:
    tensors = {part: {"w": torch.full((size,), float(step))} for part in ("model", "optimizer")}
    return ResumePoint(step, tensors, {"recipe": "r"})


def saved(folder: Path, *steps: int) -> Path:
    checkpointer = Checkpointer(folder, keep=1)
    for step in steps:
        checkpointer.save(point(step))
    checkpointer.wait()
    return folder


def die_before_each_operation(parent: Path, step: int) -> None:
    """A process that lets its children save and die; leaves a list of the points that were found after each death."""
    kept: list[int] = []
    while True:
        folder = saved(parent / str(len(kept)), 4)
        if not (child := os.fork()):
            save_and_die(folder, step, len(kept) + 1)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        kept.append(sound(folder, 4, step))
        saved(folder, 12)
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["LATEST", "step-00000012"], left
    (parent / "kept").write_text(json.dumps(kept))


def save_and_die(folder: Path, step: int, at: int) -> None:
    """Saves, and is killed before its operation number `at` on files."""
    done = 0

    def count(event: str, args: tuple) -> None:
        nonlocal done
        if event in OPERATIONS and str(args[0]).startswith(str(folder)):
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    saved(folder, step)


def sound(folder: Path, *expected: int) -> int:
    """The step of the point that a new process finds, which has to be whole and one of those expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a visible point is never damaged
        found = Checkpointer(folder, keep=1).load()
    assert found is not None, "no point is left"
    assert found.step in expected
    assert all((part["w"][:] == found.step).all() for part in found.tensors.values())
    return found.step


@pytest.mark.fault("F4")
@pytest.mark.parametrize("step", [8, 4], ids=["a new step", "the same step again"])
def test_a_kill_before_any_file_operation_of_a_save_leaves_a_sound_point(tmp_path, happened, step):
    assert faulty.exit_code(die_before_each_operation, tmp_path, step) == 0
    kept = json.loads((tmp_path / "kept").read_text())
    killed = len(kept)
    assert killed > 20
    if step == 8:
        assert kept == sorted(kept), "once the new point is there, it stays"
        assert set(kept) == {4, 8}
    happened(f"killed before each of {killed} file operations; a sound point every time, with keep 1")


def save_large(folder: Path) -> None:
    """32 MB, in several writes a file."""
    checkpointer = Checkpointer(folder, keep=1)
    checkpointer.save(point(8, size=4_000_000))
    checkpointer.wait()


@pytest.mark.slow
@pytest.mark.fault("F4")
def test_a_kill_at_any_moment_of_a_large_save_leaves_a_sound_point(tmp_path, happened):
    begin = time.monotonic()
    save_large(tmp_path / "timed")
    seconds, kept = time.monotonic() - begin, []
    for moment in range(12):
        folder = saved(tmp_path / str(moment), 4)
        process = faulty.CONTEXT.Process(target=save_large, args=(folder,))
        process.start()
        while not list(folder.glob(".tmp-*")) and process.is_alive():
            time.sleep(0.001)
        time.sleep(seconds * moment / 12)
        process.kill()
        process.join()
        kept.append(sound(folder, 4, 8))
        shutil.rmtree(folder)
    happened(f"killed at {len(kept)} moments of a save of {seconds:.2f} s: {kept.count(4)} times the old point, "
             f"{kept.count(8)} times the new")  # fmt: skip


# -- F6, F7: disks


@pytest.mark.fault("F6")
def test_a_full_disk_keeps_the_old_point_is_warned_of_and_ends_the_run_when_it_stays_full(tmp_path, happened):
    recipe = faulty.write_recipe(tmp_path)
    assert faulty.command("train", recipe, FAULT="memory:0:7").code == 3
    run = run_of(recipe)
    assert steps_of_points(run) == [3, 6]
    full = faulty.command("train", recipe, file_bytes=60_000)  # metrics and tickets are smaller, moments are not
    assert full.code == 3, full.log
    assert full.log.count("warning: the resume point could not be written") == 2
    assert "3 of at most 3" not in full.log
    assert "Free some space there" in full.last
    assert steps_of_points(run) == [3, 6]
    assert not list((run / "checkpoints").glob(".tmp-*"))
    found = tiny.status(run)
    assert (found["state"], found["exit_code"]) == ("failed", 3)
    assert [event["event"] for event in tiny.events(run)].count("warning") >= 3
    assert faulty.command("train", recipe).code == 0
    happened(
        "writes beyond 60 kB fail: two warnings, exit 3 at the third, points 3 and 6 kept; finished with room again"
    )


@pytest.mark.fault("F6")
def test_a_disk_without_any_space_is_one_sentence(tmp_path, happened):
    recipe = faulty.write_recipe(tmp_path)
    assert faulty.command("train", recipe, FAULT="memory:0:7").code == 3
    before = (run_of(recipe) / "metrics.jsonl").read_text()
    full = faulty.command("train", recipe, file_bytes=len(before) // 2)
    assert full.code == 3, full.log
    assert "Traceback" not in full.log
    assert "Free some space there" in full.log or "cannot be written" in full.log
    assert faulty.command("train", recipe).code == 0
    happened(f"no file may exceed {len(before) // 2} bytes: exit 3 in a sentence; finished with room again")


def save_on_a_full_disk(path: Path, mask: MaskSet) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        ticket_file.save(path, {"w": torch.zeros(50_000)}, mask, {})
    except MissingRequirement as error:
        sys.exit(error.exit_code)


@pytest.mark.fault("F6")
def test_a_ticket_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "t.safetensors"
    mask = MaskSet({"w": torch.ones(50_000, dtype=torch.bool)})
    ticket_file.save(path, {"w": torch.ones(50_000)}, mask, {})
    assert faulty.exit_code(save_on_a_full_disk, path, mask) == 3
    assert ticket_file.load(path).state["w"].sum() == 50_000
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.fault("F7")
@pytest.mark.parametrize("what", ["a file", "read-only"])
def test_an_unwritable_folder_is_rejected_before_waiting_for_other_processes(tmp_path, happened, what):
    place = tmp_path / "place"
    if what == "a file":
        place.write_text("")
    else:
        place.mkdir(mode=0o555)
        if os.access(place, os.W_OK):
            pytest.skip("root may write everywhere")
    recipe = tiny.write_recipe(tmp_path)
    begin = time.monotonic()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    job = faulty.command("train", recipe, f"output_dir={place / 'runs'}", **alone)
    assert job.code == 3, job.log
    assert f"output_dir: {place / 'runs' / 'tiny'} cannot be created" in job.last
    assert time.monotonic() - begin < 30
    happened(f"output_dir below {what}: exit 3 while the second process was still missing")


# -- F10: pickles


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.target, "executed"))


def test_nothing_in_the_package_unpickles():
    seen = 0
    for path in sorted(tiny.PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not {"pickle", "dill", "joblib", "shelve"} & set(names), path
            if called == "np.load" and "allow_pickle=False" in ast.unparse(node):
                continue
            assert called not in ("torch.load", "np.load", "torch.jit.load", "eval", "exec"), path
        seen += 1
    assert seen > 60


@pytest.mark.fault("F10")
def test_a_pickle_is_never_loaded_as_weights(tmp_path, happened, capsys):
    target = tmp_path / "executed"
    refused = []
    for suffix in (".pkl", ".bin", ".pt", ".pth", ".safetensors"):
        evil = tmp_path / f"model{suffix}"
        evil.write_bytes(pickle.dumps(Payload(target)))
        recipe = tiny.write_recipe(tmp_path)
        for option in (f"model.start_from={evil}", f"model.args.checkpoint_path={evil}"):
            code = tiny.command("train", recipe, option)
            assert code == (5 if "start_from" in option else 2)
            refused.append(capsys.readouterr().err)
        assert tiny.command("evaluate", evil) == 5
    capsys.readouterr()
    assert "loads weights without checks" in refused[1]
    assert not target.exists()
    assert not (tmp_path / "runs").exists()
    pickle.loads(evil.read_bytes())
    assert target.exists(), "the payload works"
    happened(f"{len(refused)} planted pickles refused, none loaded")


@pytest.mark.fault("F10")
def test_pickled_weights_of_a_folder_of_transformers_are_refused(tmp_path, happened, capsys):
    from transformers import ViTConfig

    target, folder = tmp_path / "executed", tmp_path / "vit"
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 24}
    ViTConfig(**sizes, image_size=32, patch_size=8).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(target)))
    recipe = tiny.write_recipe(tmp_path)
    options = (f"model.name=hf:{folder}", "model.args={}", "model.pretrained=true")
    assert tiny.command("train", recipe, *options) == 5
    assert "model.pretrained" in capsys.readouterr().err
    assert not target.exists()
    happened("a pytorch_model.bin in a transformers folder: exit 5, not loaded")


# -- F11: paths


@pytest.mark.fault("F11")
def test_a_run_folder_that_links_elsewhere_is_rejected(tmp_path, happened, capsys):
    recipe = tiny.write_recipe(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tmp_path / "elsewhere")
    assert tiny.command("train", recipe) == 2
    assert "is a link to" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())
    happened("runs/NAME is a link to another folder: exit 2, nothing written there")


@pytest.mark.fault("F11")
@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/../../b", "a\\..\\b", "..", ".", "a\0b", "a\nb", ".hidden", "x" * 300]
)
def test_a_name_never_leads_out_of_the_output_folder(tmp_path, capsys, name):
    recipe = tiny.write_recipe(tmp_path)
    assert tiny.command("train", recipe, f"name={json.dumps(name)}") == 2
    assert "name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.fault("F11")
def test_points_that_are_or_contain_links_are_not_followed(tmp_path, happened):
    folder, outside = saved(tmp_path / "c", 4), saved(tmp_path / "outside", 8)
    (folder / "step-00000008").symlink_to(outside / "step-00000008")
    assert sound(folder, 4) == 4
    (folder / ".tmp-link").symlink_to(outside)
    saved(folder, 12)
    assert sound(folder, 12) == 12
    assert sound(outside, 8) == 8, "what a link leads to is not deleted"
    inside = folder / "step-00000012" / "model.safetensors"
    shutil.move(inside, tmp_path / "moved")
    inside.symlink_to(tmp_path / "moved")
    with pytest.warns(UserWarning, match="model.safetensors"), pytest.raises(Damaged):
        Checkpointer(folder).load()
    happened("links among the points: not read, their targets untouched")


@pytest.mark.fault("F11")
def test_names_of_tensors_are_never_paths(tmp_path, happened):
    folder = saved(tmp_path / "c", 4)
    name = "../../../evil"
    tensors = {"model": {name: torch.ones(2), "/abs/evil": torch.ones(2)}, "optimizer": {}}
    checkpointer = Checkpointer(folder)
    checkpointer.save(ResumePoint(8, tensors, {}))
    checkpointer.wait()
    assert Checkpointer(folder).load().tensors["model"].keys() == {name, "/abs/evil"}
    path = tmp_path / "t.safetensors"
    ticket_file.save(path, {name: torch.ones(2)}, MaskSet({name: torch.ones(2, dtype=torch.bool)}), {})
    with pytest.raises(Damaged, match="does not match"):
        ticket_file.load_into_(torch.nn.Linear(2, 2), ticket_file.load(path), "t")
    assert not list(tmp_path.rglob("*evil*"))
    happened("tensors named ../../../evil and /abs/evil: kept as names, refused by the model, no such file")


# -- F15: too little data


@pytest.mark.fault("F15")
@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("train.global_batch=2000", "2000 is more than the 1293 training images"),
        (
            "data.train_samples=3",
            "3 training images; set train.global_batch=2 train.batch_per_device=null",
        ),
        ("data.val_fraction=0.0001", "the val split is empty; hold out more of train, as with data.val_fraction=0.2"),
    ],
)
def test_too_little_data_is_rejected_with_the_arithmetic(tmp_path, capsys, happened, option, sentence):
    assert tiny.command("train", tiny.write_recipe(tmp_path), option) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    happened(f"{option}: exit 2, {sentence!r}")


# -- F18: numbers that are not finite


@pytest.mark.distributed
@pytest.mark.fault("F18")
def test_nan_on_one_of_two_ranks_stops_both_and_the_last_point_is_sound(tmp_path, happened):
    recipe = faulty.write_recipe(tmp_path, "rank_timeout: 20")
    job = faulty.command("train", recipe, ranks=2, FAULT="nan:1:7")
    assert job.codes == [4, 4], job.log
    assert job.log.count("error:") == 1
    found = tiny.status(run_of(recipe))
    assert (found["state"], found["exit_code"]) == ("failed", 4)
    assert "step 7: " in job.log, "the losses are read a moment later; the message names the step that was bad"
    newest = Checkpointer(run_of(recipe) / "checkpoints").load()
    assert newest.step == 6
    assert is_finite(newest)
    again = faulty.command("train", recipe, ranks=2)
    assert again.codes == [0, 0], again.log
    happened("NaN in a batch of rank 1: both ranks exit 4 at step 7, point 6 is finite, the same command finished")


@pytest.mark.fault("F18")
def test_nan_that_is_tolerated_is_skipped_by_both_ranks_alike(tmp_path, happened):
    recipe = faulty.write_recipe(tmp_path, "rank_timeout: 20, max_skipped_steps: 1")
    job = faulty.command("train", recipe, ranks=2, FAULT="nan:1:7")
    assert job.codes == [0, 0], job.log
    assert job.log.count("skipped a step whose gradient norm is nan") == 1
    [report] = [json.loads(p.read_text()) for p in (run_of(recipe) / "tickets").glob("round_02.json")]
    first, second = report["pruning"]["mask_fingerprints"]
    assert first == second
    happened("NaN in a batch of rank 1 with max_skipped_steps 1: skipped by both, masks equal, finished")


@pytest.mark.fault("F18")
def test_a_point_that_is_not_finite_is_not_written(tmp_path, happened):
    folder = saved(tmp_path / "c", 4)
    for value in (float("nan"), float("inf")):
        bad = point(8)
        bad.tensors["model"]["w"][3] = value
        checkpointer = Checkpointer(folder)
        checkpointer.save(bad)
        with pytest.raises(Diverged, match=r"w of the model is not finite"):
            checkpointer.wait()
        assert sound(folder, 4) == 4
    happened("weights with NaN or Inf: no resume point is written, exit 4")


@pytest.mark.fault("F18")
def test_weights_that_overflow_end_the_run_with_4_and_a_finite_point(tmp_path):
    recipe = faulty.write_recipe(tmp_path, "max_skipped_steps: 9")
    job = faulty.command("train", recipe, FAULT="overflow:0:7")
    assert job.code == 4, job.log
    assert is_finite(Checkpointer(run_of(recipe) / "checkpoints").load())


# -- F19 to F21: memory and ranks


@pytest.mark.fault("F19")
def test_out_of_memory_is_explained_with_the_next_smaller_batch(tmp_path, happened):
    recipe = faulty.write_recipe(tmp_path)
    job = faulty.command("train", recipe, FAULT="memory:0:4")
    assert job.code == 3, job.log
    assert "train.batch_per_device=16" in job.last
    happened("torch.OutOfMemoryError at step 4: exit 3, suggesting train.batch_per_device=16")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.fault("F20")
@pytest.mark.fault("F21")
@pytest.mark.parametrize("what", ["exit", "hang"])
def test_a_rank_that_dies_or_hangs_does_not_block_the_other(tmp_path, happened, what):
    recipe = faulty.write_recipe(tmp_path, "rank_timeout: 5")
    log = tmp_path / "log"
    processes = faulty.start("train", recipe, ranks=2, log=log, FAULT=f"{what}:1:7")
    processes[0].join(60)
    assert processes[0].exitcode not in (None, 0), log.read_text()
    processes[1].kill()
    faulty.ended(processes, log)
    assert tiny.status(run_of(recipe))["exit_code"] == 3
    again = faulty.command("train", recipe, ranks=2)
    assert again.codes == [0, 0], again.log
    did = {"exit": "died (os._exit(9))", "hang": "slept for ten minutes"}[what]
    happened(f"rank 1 {did} at step 7: rank 0 ended with 3, the same command finished")


# -- F23: another number of processes. Which images each has is compared in test_stream.py.


@pytest.mark.distributed
@pytest.mark.fault("F23")
def test_resuming_mid_epoch_with_a_different_number_of_processes_needs_a_flag(tmp_path, happened):
    recipe = faulty.write_recipe(tmp_path, "save_every_steps: 2, rank_timeout: 20", steps_per_epoch=5)
    assert set(faulty.command("train", recipe, ranks=2, FAULT="nan:1:4").codes) == {4}
    assert steps_of_points(run_of(recipe)) == [2, 4]
    refused = faulty.command("train", recipe)
    assert refused.code == 2, refused.log
    assert "with 2 processes, and now has 1" in refused.last
    allowed = faulty.command("train", recipe, "--allow-world-size-change")
    assert allowed.code == 0, allowed.log
    assert "processes 2 → 1" in allowed.log
    happened("stopped mid-epoch with 2 processes, resumed with 1: exit 2; resumed with --allow-world-size-change")


# -- F24: another model


@pytest.mark.fault("F24")
@pytest.mark.parametrize("change", ["depth", "mask dropped", "shape permuted", "moment of another shape"])
def test_a_point_of_another_model_is_refused_with_the_differences(tmp_path, happened, change):
    recipe = faulty.write_recipe(tmp_path)
    assert faulty.command("train", recipe, FAULT="memory:0:4").code == 3
    [folder] = (run_of(recipe) / "checkpoints").glob("step-*")
    part = {"mask dropped": "controller", "moment of another shape": "optimizer"}.get(change, "model")
    tensors = load_file(folder / f"{part}.safetensors")
    if change == "depth":
        block = {name: tensor for name, tensor in tensors.items() if "blocks.0" in name}
        tensors |= {name.replace("blocks.0", "blocks.1"): tensor.clone() for name, tensor in block.items()}
    elif change == "mask dropped":
        tensors.pop(next(name for name in tensors if name.startswith("mask/")))
    else:
        name = next(name for name in tensors if "qkv.weight" in name)
        tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, folder / f"{part}.safetensors")
    rewrite_manifest(folder)
    job = faulty.command("train", recipe)
    assert job.code == 5, job.log
    assert "does not match this model in" in job.last
    assert job.last.count(" in the file") <= 5
    happened(f"{change}: exit 5, {job.last[job.last.index('does not match') :][:70]}…")


def rewrite_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


# -- F25, F26: densities


@pytest.mark.fault("F25")
def test_an_unreachable_sparsity_is_rejected_with_the_highest_reachable(happened):
    """Random layer sizes and floors: whatever is refused, the highest sparsity that it names is accepted."""
    draw, refused, accepted = random.Random(0), 0, 0
    for _ in range(60):
        sizes = [draw.randint(1, 40) for _ in range(draw.randint(1, 5))]
        most = draw.choice([0.5, 0.9, 0.99])
        sparsity = draw.uniform(0.3, 0.999)
        found = highest_sparsity(sizes, most, sparsity)
        if found is None:
            accepted += 1
            continue
        refused += 1
        assert found < sparsity
        assert highest_sparsity(sizes, most, found) is None, (sizes, most, found)
    assert min(refused, accepted) > 10
    happened(
        f"{refused} of 60 random models refused with a highest sparsity, which then was accepted; {accepted} accepted"
    )


def highest_sparsity(sizes: list[int], most: float, sparsity: float) -> float | None:
    """What the refusal names; None when nothing is refused."""
    from vit_rsst.pruning.allocation import Allocation
    from vit_rsst.pruning.criteria import CRITERIA
    from vit_rsst.pruning.selector import Floors, Selector

    weights = {f"w{i}": torch.nn.Parameter(torch.randn(size, 4)) for i, size in enumerate(sizes)}
    allocation = Allocation("global", final_density=1 - sparsity)
    selector = Selector(CRITERIA["magnitude"], "element", [], allocation, Floors(max_layer_sparsity=most))
    try:
        selector.check(weights)
    except InputError as error:
        return float(re.search(r"at most ([0-9.]+):", str(error))[1])
    return None


@pytest.mark.fault("F26")
@pytest.mark.parametrize("granularity", ["element", "head", "neuron", "head+neuron"])
def test_a_tiny_layer_at_an_extreme_sparsity_is_rejected_or_keeps_its_minimum(tmp_path, capsys, happened, granularity):
    recipe = tiny.write_recipe(tmp_path)
    options = ("pruning.schedule={rounds: 1, final_sparsity: 0.999}", "pruning.min_neurons=1")
    code = tiny.command("train", recipe, *options, f"pruning.granularity={granularity}", "train.epochs=1")
    told = capsys.readouterr().err
    assert code in (0, 2), told
    if code == 2:
        assert "highest" in told or "at most" in told, told
    else:
        ticket = ticket_file.load(run_of(recipe) / "tickets" / "round_01.safetensors")
        assert all(mask.any() for mask in ticket.mask.masks.values())
        assert all(t.isfinite().all() for t in ticket.state.values())
    happened(f"0.999 of {granularity}: {'rejected with the highest' if code else 'every layer keeps its minimum'}")


# -- F27: wandb, the real one

WANDB = """\
import os, sys
from pathlib import Path
from accelerate import PartialState
from vit_rsst.run.tracking import Tracker
what, folder = sys.argv[1], Path(sys.argv[2])
if what == "missing":
    sys.modules["wandb"] = None
PartialState(cpu=True)
(folder / "logs").mkdir()
warned = []
tracker = Tracker(folder / "metrics.jsonl", True, warned.append)
tracker.start(("wandb",), "p", "r", {"seed": 0}, folder / "logs")
for step in range(1, 4):
    tracker.log("step", step, {"train/loss": 1.0})
    if what == "dies" and step == 1:
        import psutil, time
        [service] = [p for p in psutil.Process().children(recursive=True) if "wandb-core" in p.name()]
        service.kill()
        time.sleep(0.5)
tracker.finish()
print("told", len(warned), *warned, sep="|")
"""


@pytest.mark.slow
@pytest.mark.fault("F27")
@pytest.mark.parametrize("what", ["missing", "no key", "unreachable", "silent", "refused", "dies"])
def test_wandb_in_trouble_is_one_warning_within_seconds(tmp_path, happened, what):
    pytest.importorskip("wandb")
    variables = {"HOME": str(tmp_path), "WANDB_MODE": "offline" if what == "dies" else "online"}
    key = {"WANDB_API_KEY": "0" * 40}
    (tmp_path / "run").mkdir()
    begin = time.monotonic()
    with faulty.service(500 if what == "silent" else 401) as (url, _):
        if what in ("no key", "refused", "silent"):
            variables |= {"WANDB_BASE_URL": url} | (key if what != "no key" else {})
        elif what == "unreachable":
            variables |= {"WANDB_BASE_URL": "http://127.0.0.1:9"} | key
        done = tiny.python("-c", WANDB, what, tmp_path / "run", timeout=120, **variables)
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("told|")]  # wandb has last words of its own
    _, count, *warned = line.split("|")
    assert int(count) <= 1, warned
    assert (int(count) == 1) or what == "dies"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert seconds < 75
    happened(f"wandb {what}: {count} warning, all metrics in metrics.jsonl")


# -- F28: the Hub


@pytest.mark.fault("F28")
@pytest.mark.parametrize(
    ("code", "error", "sentence"),
    [
        pytest.param(401, "RepoNotFound", "cannot be read from the Hub", marks=pytest.mark.slow),
        pytest.param(403, "GatedRepo", "is a gated dataset", marks=pytest.mark.slow),
        pytest.param(404, "RevisionNotFound", "doesn't exist for dataset", marks=pytest.mark.slow),
        (503, "", "returns HTTP 503"),
        pytest.param(0, "", "is unreachable", marks=pytest.mark.slow),
        pytest.param(-1, "", "cannot be read from the Hub", marks=pytest.mark.slow),
    ],
)
def test_data_unavailable_from_the_hub_exit_with_3_in_seconds(tmp_path, happened, code, error, sentence):
    recipe = tiny.write_recipe(tmp_path)
    with faulty.service(code if code > 0 else 404, {"X-Error-Code": error}) as (url, asked):
        variables = {"HF_ENDPOINT": url if code else "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1" if code < 0 else "0"}
        variables |= {"HF_HOME": str(tmp_path / "hf"), "ACCELERATE_USE_CPU": "true"}
        options = ["data.source=cifar10", "data.revision=0123abc"]
        begin = time.monotonic()
        done = tiny.python("-m", "vit_rsst.cli", "train", recipe, *options, timeout=100, **variables)
    seconds = time.monotonic() - begin
    assert done.returncode == 3, done.stderr
    assert sentence in done.stderr
    for way in ("data.path=FOLDER", "HF_TOKEN", "data.revision"):
        assert way in done.stderr.strip().splitlines()[-1]
    assert seconds < 30, "mostly imports"
    assert not (tmp_path / "runs").exists()
    happened(f"{({0: 'no server', -1: 'HF_HUB_OFFLINE=1'}).get(code, code)}: exit 3 after {len(asked)} requests")


@pytest.mark.slow
@pytest.mark.fault("F28")
@pytest.mark.parametrize("model", ["hf:google/vit", "vit_small_patch16_224"])
def test_weights_unavailable_from_the_hub_exit_with_3_in_seconds(tmp_path, happened, model):
    recipe = tiny.write_recipe(tmp_path)
    options = [f"model.name={model}", "model.pretrained=true", "model.args={}", "data.image_size=224"]
    with faulty.service(503) as (url, asked):
        variables = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "ACCELERATE_USE_CPU": "true"}
        done = tiny.python("-m", "vit_rsst.cli", "train", recipe, *options, timeout=100, **variables)
    assert done.returncode == 3, done.stderr
    assert "returns HTTP 503" in done.stderr
    happened(f"weights of {model}, 503: exit 3 after {len(asked)} requests")


# -- F29: two runs in one folder


@pytest.mark.fault("F29")
def test_a_lock_names_its_holder_and_a_stale_one_is_free(tmp_path, happened):
    recipe = faulty.write_recipe(tmp_path)
    first = faulty.start("train", recipe, log=tmp_path / "log", FAULT="hang:0:5")
    faulty.wait_for_step(run_of(recipe), 4, first)
    second = faulty.command("train", recipe)
    assert second.code == 3, second.log
    assert f"process {first[0].pid} on {os.uname().nodename}, since 20" in second.last
    assert steps_of_points(run_of(recipe)) == [3]
    first[0].kill()
    first[0].join()
    third = faulty.command("train", recipe)
    assert third.code == 0, third.log
    happened("a second run was rejected with pid and host of the first; after kill -9 of the first, it started")


def die_before_a_worker(folder: RunFolder) -> None:
    folder.open()
    if os.fork():
        os._exit(9)
    time.sleep(2)
    os._exit(0)


@pytest.mark.fault("F29")
def test_the_workers_of_a_killed_process_do_not_keep_its_lock(tmp_path, happened):
    """A worker inherits its descriptors and lives some seconds longer than its parent."""
    folder = RunFolder(tmp_path / "r")
    assert faulty.exit_code(die_before_a_worker, folder) == 9
    folder.open().release()
    happened("the process died, its worker lived on: the lock was free")


@pytest.mark.fault("F29")
def test_the_workers_of_a_killed_run_end_too(tmp_path, happened):
    recipe = faulty.write_recipe(tmp_path)
    workers = ("data.workers=2", "data.augment={crop: resized}")
    [run] = faulty.start("train", recipe, *workers, log=tmp_path / "log", FAULT="hang:0:5")
    faulty.wait_for_step(run_of(recipe), 4, [run])
    family = psutil.Process(run.pid).children(recursive=True)
    assert len(family) >= 3, "two workers and their fork server"
    run.kill()
    run.join()
    _, left = psutil.wait_procs(family, timeout=20)
    for process in left:
        process.kill()
    assert not left
    happened(f"kill -9 of a run with two workers: all {len(family)} processes below it ended")


# -- F30: drift


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that stopped at step 4 with a point at step 3."""
    recipe = faulty.write_recipe(tmp_path_factory.mktemp("stopped"))
    assert faulty.command("train", recipe, FAULT="memory:0:4").code == 3
    return recipe.parent


def edited(stopped: Path, folder: Path, key: str, part: str, value: object) -> Path:
    """A copy of the run whose resume point was taken in another environment."""
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    recipe = faulty.write_recipe(folder)
    [saved] = (run_of(recipe) / "checkpoints").glob("step-*")
    state = json.loads((saved / "state.json").read_text())
    place = state["environment"][part] if part else state
    place[key] = value
    (saved / "state.json").write_text(json.dumps(state))
    rewrite_manifest(saved)
    return recipe


@pytest.mark.fault("F30")
def test_a_changed_environment_is_reported_when_a_run_resumes(stopped, tmp_path, happened):
    recipe = edited(stopped, tmp_path, "torch", "versions", "2.11.0")
    job = faulty.command("train", recipe)
    assert job.code == 0, job.log
    [line] = [line for line in job.log.splitlines() if "the environment has changed since" in line]
    assert f"versions.torch 2.11.0 → {importlib.metadata.version('torch')}" in line
    texts = [event.get("text", "") for event in tiny.events(run_of(recipe))]
    assert sum("versions.torch 2.11.0" in text for text in texts) == 1
    happened("torch 2.11.0 in the resume point: reported as a difference, also in metrics.jsonl; resumed")


@pytest.mark.fault("F30")
def test_other_data_are_rejected_unless_allowed(stopped, tmp_path, happened):
    recipe = edited(stopped, tmp_path, "rows", "data", 999)
    records = [run_of(recipe) / name for name in ("status.json", "recipe.yaml", "environment.json")]
    before = [path.read_bytes() for path in records]
    job = faulty.command("train", recipe)
    assert job.code == 2, job.log
    assert [path.read_bytes() for path in records] == before, "a refusal leaves the folder as it was"
    assert "data.rows was 999, is 1797" in job.last
    assert "--allow-data-change" in job.last
    assert steps_of_points(run_of(recipe)) == [3]
    job = faulty.command("train", recipe, "--allow-data-change")
    assert job.code == 0, job.log
    happened("999 rows in the resume point, 1797 now: exit 2; resumed with --allow-data-change")


@pytest.mark.fault("F30")
def test_a_point_of_another_recipe_is_refused_whatever_the_folder_says(stopped, tmp_path, happened):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    recipe = faulty.write_recipe(tmp_path)
    (run_of(recipe) / "recipe.yaml").unlink()
    job = faulty.command("train", recipe, "optim.lr=1e-2", "seed=5")
    assert job.code == 2, job.log
    assert "belongs to a different recipe" in job.last
    happened("lr and seed changed and recipe.yaml gone: exit 2")


# -- the line after the table


PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A process that knows ASCII alone."""


@pytest.mark.fault("+ locale, paths, HOME")
@pytest.mark.parametrize(
    ("folder", "name", "locale"),
    [
        pytest.param("plain", "run", PLAIN, marks=pytest.mark.slow),
        pytest.param("données 实验 with space", "run 第一 (é)", {}, marks=pytest.mark.slow),
        ("plain", "run 第一", PLAIN),
    ],
)
def test_a_plain_locale_odd_paths_and_no_home_work(tmp_path, happened, folder, name, locale):
    place = tmp_path / folder
    place.mkdir()
    text = tiny.RECIPE.replace("name: tiny", f"name: {name}").replace("epochs: 2, round_epochs: 2", "epochs: 1")
    variables = tiny.environment(ACCELERATE_USE_CPU="true", **locale)
    for variable in ("HOME", "LANG", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "USER", "LOGNAME"):
        variables.pop(variable, None)
    runs = place / "runs"
    for argv in (["train", tiny.write_recipe(place, text)], ["evaluate", runs / name], ["runs", runs]):
        done = subprocess.run(
            [sys.executable, "-m", "vit_rsst.cli", *map(str, argv)], env=variables, capture_output=True, timeout=100
        )
        told = done.stderr.decode(errors="replace")
        if locale and not name.isascii():
            assert done.returncode == 3, told
            assert "PYTHONUTF8=1" in told
            assert not runs.exists()
            break
        assert done.returncode == 0, told
    done = "refused with PYTHONUTF8=1" if done.returncode else "trained, evaluated and listed"
    happened(f"{'ASCII alone' if locale else 'UTF-8'}, no HOME, {folder}/{name}: {done}")


@pytest.mark.fault("+ clock")
def test_durations_come_from_a_monotonic_clock():
    for path in sorted(tiny.PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "time.time()" not in text, path


def test_a_folder_that_cannot_hold_new_folders_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(MissingRequirement, match="output_dir"):
        RunFolder(tmp_path / "loop" / "r").check_place()
