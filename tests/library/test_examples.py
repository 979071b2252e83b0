"""The scripts of the pages run on the digits, and the plain one could as well be the trainer."""

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from test_same_as_the_trainer import plain_steps

import vit_rsst
from vit_rsst.assembly.build import build
from vit_rsst.recipe.loading import load
from vit_rsst.run.folder import RunFolder
from vit_rsst.run.heartbeat import Heartbeat
from vit_rsst.run.ranks import Ranks
from vit_rsst.run.signals import StopFlag
from vit_rsst.tickets import ticket_file
from vit_rsst.train import make_accelerator

EXAMPLES = tiny.REPOSITORY / "docs" / "examples"
TOLD = {"plain": "condemned/kept", "with_accelerate": "heads left", "with_trainer": "eval_accuracy"}


def ran(folder: Path, monkeypatch, name: str, *argv: object) -> str:
    """What a script prints in an empty folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    with tiny.alone_on_cpu(), contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return out.getvalue()


@pytest.mark.parametrize("name", TOLD)
def test_a_script_of_the_page_runs_and_has_at_most_40_lines(tmp_path, monkeypatch, name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 40
    assert TOLD[name] in ran(tmp_path, monkeypatch, name, 1)
    if name == "plain":
        model = vit_rsst.load(tmp_path / "digits.safetensors")
        zeros = sum(int((w == 0).sum()) for n, w in model.named_parameters() if "blocks" in n and w.ndim == 2)
        assert zeros / sum(w.numel() for n, w in model.named_parameters() if "blocks" in n and w.ndim == 2) > 0.89


def test_every_script_of_the_folder_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*TOLD, "timm_train"}


TIMM = """\
import sys
import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler

assert sys.argv == [__file__, "--epochs", "2"]
torch.manual_seed(0)
model = create_model("test_vit", img_size=8, patch_size=2, num_classes=10, depth=1)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
ema, scaler = ModelEmaV3(model, decay=0.9), NativeScaler("cpu")
for step in range(10):
    loss = model(torch.randn(4, 3, 8, 8)).square().mean()
    scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
    optimizer.zero_grad()
    ema.update(model, step=step)
weight = model.blocks[0].mlp.fc1.weight
print("zeros", float((weight == 0).float().mean()), ema.module(torch.zeros(1, 3, 8, 8)).shape)
"""


def test_the_parts_of_timms_script_train_under_the_wrapper(tmp_path, monkeypatch):
    import timm.optim

    monkeypatch.setattr(timm.optim, "create_optimizer_v2", timm.optim.create_optimizer_v2)  # put back afterwards
    (tmp_path / "train.py").write_text(TIMM, encoding="utf-8")
    out = ran(tmp_path, monkeypatch, "timm_train", 10, "train.py", "--epochs", 2)
    assert out.count("Event(name='round ended'") == 5
    assert float(out.split("zeros ")[1].split()[0]) > 0.7


def test_the_trainer_and_a_plain_loop_leave_equal_tickets(tmp_path):
    recipe = load(tiny.write_recipe(tmp_path))
    assert tiny.command("train", tmp_path / "tiny.yaml", "name=trainer") == 0
    with tiny.alone_on_cpu():
        folder = RunFolder(recipe.run_folder)
        ranks = Ranks(0, 1, Heartbeat(0, 1, 60.0, tmp_path / "stacks.txt", None, print))
        run, lock = build(recipe, make_accelerator(recipe), folder, StopFlag(), ranks)
        lock.release()
        pruner = vit_rsst.Pruner(
            run.model, run.optimizer, total_steps=run.progress.total_steps, dense_steps=6, rounds=2,
            method={"name": "rsst", "remove_at": 0.8}, final_sparsity=0.9,
            on_event=lambda event: run.optimizer.state.clear() if event.name == "round began" else None,
        )  # fmt: skip
        plain_steps(recipe.optim.clip_grad_norm, run)
        pruner.finish()
        path = pruner.save_ticket(tmp_path / "own.safetensors", name="vit_tiny", args=tiny.MODEL_ARGS)
    theirs = tmp_path / "runs" / "trainer" / "tickets" / "round_02.safetensors"
    with safe_open(path, "pt") as own, safe_open(theirs, "pt") as other:
        assert set(own.keys()) == set(other.keys())
        for name in own.keys():  # noqa: SIM118 - safe_open is no mapping
            assert torch.equal(own.get_tensor(name), other.get_tensor(name)), name
    assert ticket_file.load(path).mask.density == pytest.approx(0.1, abs=1e-3)
