"""Runs whose weights FSDP2 shards over two and three processes, against DDP and one process."""

import csv
from dataclasses import dataclass
from pathlib import Path

import faulty
import pytest
import tiny
import torch
from safetensors.torch import load_file

from vit_rsst import files
from vit_rsst.tickets import ticket_file
from vit_rsst.tickets.ticket_file import Ticket

pytestmark = pytest.mark.distributed

RECIPE = (
    tiny.RECIPE.replace('"depth": 1', '"depth": 2').replace('"embed_dim": 24', '"embed_dim": 27') + "plugins: [small]\n"
).replace("global_batch: 32", "global_batch: 48")
"""Odd widths, so that units lie on two ranks."""

SMALL = """\
import os, signal
from vit_rsst import loop
from vit_rsst.assembly import calibration, data

data.EVALUATION_BATCH = 50  # of 144 and 360 images, so that ranks have different numbers of batches
calibration.CALIBRATION_BATCH = 32  # of 150
train_step = loop.train_step

def stopping(run, micro_batches):
    done = train_step(run, micro_batches)
    is_last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if is_last and str(run.progress.global_step) == os.environ.get("STOP_AT"):
        os.kill(os.getpid(), signal.SIGTERM)
    return done

loop.train_step = stopping
if os.environ.get("STANDS_STILL"):
    loop.optim.step_unless_ = lambda *_: None
"""
"""A plugin of the recipe: small evaluation batches, a signal to the last rank, and steps without effect."""

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    run: Path
    log: str

    @property
    def tickets(self) -> list[Ticket]:
        return [ticket_file.load(path) for path in sorted((self.run / "tickets").glob("*.safetensors"))]

    @property
    def bytes(self) -> list[dict[str, bytes]]:
        """The tensors of every ticket; headers name the recipe, which names the folder."""
        paths = sorted((self.run / "tickets").glob("*.safetensors"))
        return [{name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()} for path in paths]

    @property
    def losses(self) -> list[float]:
        return [float(row["val_loss"]) for row in csv.DictReader((self.run / "rounds.csv").open())]


def prepared(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "small.py").write_text(SMALL, encoding="utf-8")
    return tiny.write_recipe(folder, RECIPE)


def command(folder: Path, ranks: int, *overrides: str, is_sharded: bool = True, **variables: str) -> faulty.Job:
    """`vit-rsst train` in as many processes."""
    recipe, launch = prepared(folder), FSDP2 if is_sharded else {}
    return faulty.command("train", recipe, "optim.name=adamw", *overrides, ranks=ranks, **launch, **variables)


def trained(folder: Path, ranks: int, *overrides: str, is_sharded: bool = True) -> Trained:
    """A run to its end in as many processes."""
    job = command(folder, ranks, *overrides, is_sharded=is_sharded)
    assert not any(job.codes), job.log
    assert ("(FSDP2)" in job.log) == is_sharded, job.log
    return Trained(folder / "runs" / "tiny", job.log)


def assert_alike(found: Trained, expected: Trained) -> None:
    """Zeros are exact, losses within float noise, and so are weights and masks, which start from equal ones.

    The first mask that a run selects between rounds is equal; one selected after other steps may differ in few places.
    """
    assert found.losses == pytest.approx(expected.losses, rel=2e-3)
    for number, (ours, theirs) in enumerate(zip(found.tickets, expected.tickets, strict=True)):
        assert list(ours.state) == list(theirs.state)
        assert all(not ours.state[name][~ours.mask[name]].any() for name in ours.mask)
        assert ours.mask.num_alive == theirs.mask.num_alive
        differ = sum(int((ours.mask[name] ^ theirs.mask[name]).sum()) for name in ours.mask)
        if len(found.tickets) > 1 and number < 2:
            assert not differ
            assert all(torch.allclose(ours.state[name], theirs.state[name], atol=1e-3) for name in ours.state)
        assert differ <= 0.02 * ours.mask.num_alive


UNITS = ["pruning.granularity=head+neuron", "pruning.schedule.final_sparsity=0.6"]
METHODS = {
    "rsst": ["train.ema_decay=0.9", "train.keep_best=true"],
    "rsst of units": [*UNITS, "train.batch_per_device=8"],
    "rsst by saliency": ["pruning.criterion=saliency"],
    "rsst of units by taylor": [*UNITS, "pruning.criterion=taylor"],
    "rsst by movement": ["pruning.criterion=movement"],
    "rsst with gradients": ["pruning.method={name: rsst, penalty: {condemned_gradient: true, span: epoch}}"],
    "rst": ["pruning.method={name: rst}"],
    "imp": ["pruning.method={name: imp}", "pruning.criterion=activation_l2", "pruning.rewind=init"],
    "imp of 1:3": ["pruning.method={name: imp}", "pruning.granularity=1:3", "pruning.schedule={rounds: 2}"],
    "refill": ["pruning.method={name: refill}", *UNITS],
    "gmp": ["pruning.method={name: gmp, interval: 2}", "train.epochs=4"],
    "ste": ["pruning.method={name: ste, interval: 2}", "train.epochs=4", "train.grad_checkpointing=true"],
    "set": ["pruning.method={name: set, interval: 2}", "train.epochs=4"],
    "rigl": ["pruning.method={name: rigl, interval: 2}", "train.epochs=4", "train.ema_decay=0.9"],
    "distilled": ["train.distill={teacher: dense, weight: 0.5}"],
}


@pytest.mark.nccl
def test_a_sharded_run_is_that_of_one_process(tmp_path):
    overrides = METHODS["rsst"]
    assert_alike(trained(tmp_path / "2", 2, *overrides), trained(tmp_path / "1", 1, *overrides, is_sharded=False))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_what_it_gives_under_ddp(tmp_path, method):
    runs = [trained(tmp_path / f"fsdp{ranks}", ranks, *METHODS[method]) for ranks in (2, 3)]
    expected = [trained(tmp_path / f"ddp{ranks}", ranks, *METHODS[method], is_sharded=False) for ranks in (1, 2)]
    for run in runs:
        for other in expected:
            assert_alike(run, other)


@pytest.mark.slow
def test_bf16_learns_as_under_ddp(tmp_path):
    overrides = ["train.precision=bf16", "optim.clip_grad_norm=null"]
    found, expected = (trained(tmp_path / str(fsdp), 2, *overrides, is_sharded=fsdp) for fsdp in (True, False))
    assert found.losses == pytest.approx(expected.losses, rel=2e-2)
    assert found.tickets[0].state["head.weight"].dtype == torch.float32
    assert [t.mask.num_alive for t in found.tickets] == [t.mask.num_alive for t in expected.tickets]


@pytest.mark.nccl
@pytest.mark.slow
def test_a_sharded_run_resumes_to_the_bit_and_with_any_processes(tmp_path):
    """Stopped within the dense round, within a penalty, and after a removal; then resumed with 3 ranks, and by DDP."""
    overrides = ["train.ema_decay=0.9", "train.keep_best=true"]
    undisturbed = trained(tmp_path / "undisturbed", 2, *overrides)
    for step in ("2", "7", "11"):
        stopped = command(tmp_path / "stopped", 2, *overrides, STOP_AT=step)
        assert set(stopped.codes) == {75}, stopped.log
    resumed = trained(tmp_path / "stopped", 2, *overrides)
    resumes = [event for event in tiny.events(resumed.run) if event["event"] == "resume"]
    assert [event["bit_exact"] for event in resumes] == [True] * 3, resumes
    assert resumed.bytes == undisturbed.bytes
    for ranks, is_sharded, why in (
        (3, True, "processes 2 → 3"),
        (2, False, "sharding FSDP2 → None"),
        (1, False, "sharding"),
    ):
        folder = tmp_path / f"{ranks}{is_sharded}"
        stopped = command(folder, 2, *overrides, STOP_AT="8")
        assert set(stopped.codes) == {75}, stopped.log
        other = trained(folder, ranks, *overrides, "--allow-world-size-change", is_sharded=is_sharded)
        assert "not bit-exact" in other.log
        assert why in other.log
        assert_alike(other, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_not_sharded_goes_on_sharded(tmp_path, ranks):
    overrides = ["train.ema_decay=0.9", "train.keep_best=true", "pruning.rewind=init"]
    undisturbed = trained(tmp_path / "undisturbed", 2, *overrides)
    stopped = command(tmp_path / "stopped", ranks, *overrides, is_sharded=False, STOP_AT="8")
    assert set(stopped.codes) == {75}, stopped.log
    resumed = trained(tmp_path / "stopped", 2, *overrides, "--allow-world-size-change")
    assert "not bit-exact" in resumed.log
    assert "sharding None → FSDP2" in resumed.log
    assert_alike(resumed, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rsst", "refill"])
def test_equal_weights_give_equal_files_however_they_are_held(tmp_path, method):
    """Steps without effect leave the same weights to any number of processes; masks and files then are the same too."""
    found = []
    for ranks, is_sharded in ((1, False), (2, False), (2, True), (3, True)):
        folder = tmp_path / f"{ranks}{is_sharded}"
        job = command(folder, ranks, *METHODS[method], is_sharded=is_sharded, STANDS_STILL="1")
        assert not any(job.codes), job.log
        found.append([files.sha256(path) for path in sorted(folder.glob("runs/tiny/tickets/*.safetensors"))])
    assert len(set(found[0])) == len(found[0]) == 3
    assert all(hashes == found[0] for hashes in found), found
