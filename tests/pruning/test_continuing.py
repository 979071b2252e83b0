"""A run restored from its state continues bit for bit: within a window, after a removal, between epochs."""

import functools
import json
from pathlib import Path

import pytest
import torch
from toys import Toy, batchnorm_mlp, bits, copied, mlp

from vit_rsst import loop
from vit_rsst.errors import Stopped
from vit_rsst.pruning.methods.dense import Dense
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Penalty
from vit_rsst.run import resume
from vit_rsst.run.checkpoint import ResumePoint
from vit_rsst.run.signals import StopFlag
from vit_rsst.run.state import Run
from vit_rsst.tickets import ticket_file
from vit_rsst.training import optim

# Rounds of 8 steps in epochs of 4. The window is steps 1 to 5, removal after the sixth.
RSST = Rsst(Penalty("quadratic", window=(0.125, 0.625)), remove_at=0.75)
COUPLED = Rsst(Penalty("linear", strength=0.5, window=(0.125, 0.625), coupling="gradient"), remove_at=0.75)
TOYS = {
    "rsst": Toy(RSST, network=batchnorm_mlp, round_epochs=(2, 2, 2)),
    "rsst, rewound": Toy(RSST, network=batchnorm_mlp, round_epochs=(2, 2, 2), rewind_epoch=1),
    "rsst, coupled": Toy(COUPLED, network=batchnorm_mlp, optimizer="sgd", lr=0.1, round_epochs=(2, 2, 2)),
    "rsst by epoch": Toy(
        Rsst(Penalty("cosine", window=(0.125, 0.625), span="epoch"), remove_at=0.75), round_epochs=(2, 2, 2)
    ),
    "imp, rewound": Toy(Imp(), network=batchnorm_mlp, optimizer="sgd", round_epochs=(2, 2, 2), rewind_epoch=0),
    "imp, random": Toy(Imp(), criterion="random", accumulation=2, round_epochs=(2, 2, 2)),
    "gmp": Toy(Gmp((0.1, 0.9), 5), network=batchnorm_mlp, curve="cubic", round_epochs=(6,)),
    "dense": Toy(Dense(), network=batchnorm_mlp, round_epochs=(6,)),
    "rsst, averaged": Toy(RSST, network=batchnorm_mlp, round_epochs=(2, 2, 2), ema_decay=0.9),
    "rsst, mixed and erased": Toy(RSST, round_epochs=(2, 2, 2), mixes=True, erases=True),
    "imp, best averaged epoch": Toy(Imp(), round_epochs=(2, 2, 2), ema_decay=0.9, keep_best=True),
    "imp, compensated": Toy(Imp(), network=batchnorm_mlp, round_epochs=(2, 2, 2), ema_decay=0.9, compensates=True),
    "gmp, compensated": Toy(Gmp((0.1, 0.9), 5), curve="cubic", round_epochs=(6,), compensates=True),
    "rsst, taught": Toy(RSST, round_epochs=(2, 2, 2), teacher=functools.cache(lambda: mlp().eval())),
}


class StopAt(StopFlag):
    """Asks for a stop after one step."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def agreed(self, step: int) -> bool:
        return step == self.step


def end(folder: Path) -> list:
    """Everything a run writes: tickets bit for bit, and the report of every round."""
    found = []
    for path in sorted((folder / "tickets").glob("*.safetensors")):
        ticket, report = ticket_file.load(path), json.loads(path.with_suffix(".json").read_text())
        report["row"].pop("seconds")
        found.append((bits(ticket.state), ticket.mask.fingerprint(), report))
    return found


_UNDISTURBED: dict[str, list] = {}


def undisturbed(name: str, folder: Path) -> list:
    if name not in _UNDISTURBED:
        run = TOYS[name].make(folder / "undisturbed")
        loop.train(run)
        _UNDISTURBED[name] = end(folder / "undisturbed")
    return _UNDISTURBED[name]


STOPS = {
    "in round 0": 3,
    "at the end of round 0": 8,
    "before the window": 9,
    "at the first step of the window": 10,
    "in the window": 11,
    "at the end of an epoch in the window": 12,
    "after the window": 13,
    "after the removal": 14,
    "at the end of a sparse round": 16,
    "in the last window": 19,
    "one step before the end": 23,
}


EVERYWHERE = [("rsst, rewound", stop) for stop in STOPS]
IN_THE_MIDDLE = [(name, stop) for name in TOYS for stop in ("in the window", "after the removal")]


@pytest.mark.parametrize("name, stop", dict.fromkeys(EVERYWHERE + IN_THE_MIDDLE))
def test_a_stopped_and_restored_run_ends_bit_for_bit_the_same(tmp_path, name, stop):
    expected = undisturbed(name, tmp_path)
    first = TOYS[name].make(tmp_path / "stopped")
    first.stop = StopAt(STOPS[stop])
    with pytest.raises(Stopped):
        loop.train(first)
    second = TOYS[name].make(tmp_path / "stopped")
    resume.restore_(second, second.checkpointer.load())
    assert second.progress.global_step == STOPS[stop]
    loop.train(second)
    assert end(tmp_path / "stopped") == expected


def halves(run: Run, stop: int) -> None:
    """Trains up to a step."""
    run.stop = StopAt(stop)
    with pytest.raises(Stopped):
        loop.train(run)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("stop", [9, 11, 15])
def test_controller_state_is_tensors_and_json_and_round_trips(tmp_path, name, stop):
    run = TOYS[name].make(tmp_path / "a")
    halves(run, stop)
    tensors, numbers = run.controller.state_dict()
    numbers = json.loads(json.dumps(numbers))
    assert all(isinstance(t, torch.Tensor) for t in tensors.values())
    other = TOYS[name].make(tmp_path / "b").controller
    other.load_state_dict(copied(tensors), numbers)
    assert other.state == run.controller.state
    assert other.mask.fingerprint() == run.controller.mask.fingerprint()
    assert (other.condemned is None) == (run.controller.condemned is None)
    if other.condemned is not None:
        assert other.condemned.fingerprint() == run.controller.condemned.fingerprint()
    assert (other.rewind_point is None) == (run.controller.rewind_point is None)
    if other.rewind_point is not None:
        assert bits(other.rewind_point) == bits(run.controller.rewind_point)


def test_state_holds_condemned_and_penalty_in_the_window_but_not_after_the_removal(tmp_path):
    window, removed = (TOYS["rsst"].make(tmp_path / str(stop)) for stop in (11, 15))
    halves(window, 11)
    halves(removed, 15)
    assert any(path.startswith("condemned/") for path in window.controller.state_dict()[0])
    assert window.controller.state_dict()[1]["what_if_gap"] is None
    assert not any(path.startswith("condemned/") for path in removed.controller.state_dict()[0])
    assert removed.controller.state_dict()[1]["what_if_gap"] is not None


def test_a_round_under_way_is_not_begun_again(tmp_path):
    run = TOYS["rsst, rewound"].make(tmp_path)
    halves(run, 11)
    weights, condemned = bits(run.controller.weights), run.controller.condemned.fingerprint()
    assert run.controller.begin_round(1) is False
    assert bits(run.controller.weights) == weights
    assert run.controller.condemned.fingerprint() == condemned
    assert run.controller.begin_round(2) is True


def test_a_state_copied_to_the_host_is_unaffected_by_further_training(tmp_path):
    """What `Checkpointer.save` does; masks and rewind point must not be views of what trains on."""
    run = TOYS["rsst, rewound"].make(tmp_path)
    halves(run, 11)
    point = ResumePoint(11, {"controller": copied(run.controller.state_dict()[0])}, {})
    before = bits(point.tensors["controller"])
    run.stop = StopAt(-1)
    loop.train(run)
    assert bits(point.tensors["controller"]) == before


@pytest.mark.parametrize("missing", ["model", "optimizer", "controller"])
def test_each_part_of_a_point_is_needed(tmp_path, missing):
    """Shows that the tests above can fail: without any one part the run ends differently."""
    name = "rsst"
    expected = undisturbed(name, tmp_path)
    first = TOYS[name].make(tmp_path / "stopped")
    halves(first, 11)
    second = TOYS[name].make(tmp_path / "stopped")
    fresh = TOYS[name].make(tmp_path / "fresh")
    resume.restore_(second, second.checkpointer.load())
    if missing == "model":
        second.net.load_state_dict(fresh.net.state_dict())
    elif missing == "optimizer":
        optim.reset_state_(second.optimizer)
    else:
        second.controller.fading = None
    loop.train(second)
    assert end(tmp_path / "stopped") != expected
