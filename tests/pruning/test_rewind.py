"""Rewinds: exactly the saved weights and buffers are restored, into the same tensors, from an unchanged point."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import Toy, batchnorm_mlp, bits, copied, train_rounds, vit

from vit_rsst import loop
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Penalty
from vit_rsst.run.state import Run
from vit_rsst.training import optim

METHODS = {"imp": Imp(), "rsst": Rsst(Penalty(window=(0.0, 0.5)), remove_at=0.5), "rsst at once": Rsst(remove_at=0.0)}


def digest(state: dict[str, Tensor]) -> str:
    return hashlib.sha256(repr(sorted(bits(state).items())).encode()).hexdigest()


def point_taken(run: Run, epoch: int) -> dict[str, Tensor]:
    """The model's state when the rewind point should be taken, recorded independently of the controller."""
    noted: dict[str, Tensor] = {}

    def note(progress: object) -> None:
        if (progress.round, progress.epoch) == (0, epoch):
            noted.update(copied(run.net.state_dict()))
        after_epoch(progress)

    after_epoch, run.controller.after_epoch = run.controller.after_epoch, note
    if epoch == 0:
        noted.update(copied(run.net.state_dict()))
    return noted


def begin_next_round(run: Run, round: int) -> None:
    run.controller.begin_round(round)
    optim.reset_state_(run.optimizer)


@pytest.mark.parametrize("network", [batchnorm_mlp, vit])
@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_every_round_starts_from_exactly_the_rewind_point_under_its_mask(tmp_path, method, epoch, network):
    toy = Toy(METHODS[method], network=network, rewind_epoch=epoch, round_epochs=(3, 1, 1))
    run = toy.make(tmp_path)
    noted = point_taken(run, epoch)
    for round in (1, 2):
        train_rounds(run, round)
        assert digest(run.net.state_dict()) != digest(noted)
        begin_next_round(run, round)
        for name, tensor in run.net.state_dict().items():
            expected = noted[name]
            if name in run.controller.weights:
                expected = torch.where(run.controller.mask[name], expected, 0.0)
            assert torch.equal(tensor, expected), (round, name)
        alive = sum(int(t.count_nonzero()) for t in run.controller.weights.values())
        assert alive == run.controller.mask.num_alive
    if network is batchnorm_mlp:
        assert noted["2.num_batches_tracked"] == epoch * toy.steps_per_epoch
        assert run.net.state_dict()["2.num_batches_tracked"] == epoch * toy.steps_per_epoch


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_rewind_point_is_not_aliased_and_unchanged_after_all_rounds(tmp_path, epoch):
    run = Toy(Imp(), network=batchnorm_mlp, optimizer="sgd", lr=0.1, rewind_epoch=epoch).make(tmp_path)
    noted = point_taken(run, epoch)
    train_rounds(run, 1)
    before = digest(run.controller.rewind_point)
    assert before == digest(noted)
    addresses = {t.data_ptr() for t in run.net.state_dict().values()}
    assert not addresses & {t.data_ptr() for t in run.controller.rewind_point.values()}
    train_rounds(run)
    assert run.controller.state.round == 3
    assert digest(run.controller.rewind_point) == before


@pytest.mark.parametrize("epoch", [None, 0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_parameters_keep_identity_and_storage_through_all_rounds(tmp_path, method, epoch):
    run = Toy(METHODS[method], network=batchnorm_mlp, rewind_epoch=epoch).make(tmp_path)
    before = {name: (id(t), t.data_ptr()) for name, t in [*run.net.named_parameters(), *run.net.named_buffers()]}
    train_rounds(run)
    after = {name: (id(t), t.data_ptr()) for name, t in [*run.net.named_parameters(), *run.net.named_buffers()]}
    assert after == before
    known = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert {id(w) for w in run.controller.weights.values()} <= known


@pytest.mark.parametrize("method", METHODS)
def test_learning_rate_rewinding_keeps_the_trained_weights_and_buffers(tmp_path, method):
    run = Toy(METHODS[method], network=batchnorm_mlp, rewind_epoch=None).make(tmp_path)
    train_rounds(run, 1)
    trained = copied(run.net.state_dict())
    begin_next_round(run, 1)
    for name, tensor in run.net.state_dict().items():
        expected = trained[name]
        if name in run.controller.weights:
            expected = torch.where(run.controller.mask[name], expected, 0.0)
        assert torch.equal(tensor, expected), name
    assert run.controller.rewind_point is None


def test_selection_sees_the_trained_weights_and_not_the_rewound_ones(tmp_path):
    run = Toy(Imp(), rewind_epoch=0, lr=0.05, final_sparsity=0.5, round_epochs=(3, 1)).make(tmp_path)
    train_rounds(run, 1)
    trained = torch.cat([w.detach().abs().flatten() for w in run.controller.weights.values()])
    begin_next_round(run, 1)
    kept = torch.cat([run.controller.mask[name].flatten() for name in run.controller.weights])
    rewound = torch.cat([run.controller.rewind_point[name].abs().flatten() for name in run.controller.weights])
    assert trained[kept].min() >= trained[~kept].max()
    assert rewound[kept].min() < rewound[~kept].max()


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_dead_weights_are_plus_zero_after_a_rewind_and_every_later_step(tmp_path, method, epoch):
    """The rewind writes old weights over the zeros, and a negative one times a mask of 0 is −0."""
    run = Toy(METHODS[method], rewind_epoch=epoch, round_epochs=(2, 1, 1)).make(tmp_path)
    train_rounds(run, 2)
    begin_next_round(run, 2)

    def assert_plus_zero() -> None:
        for name, weight in run.controller.weights.items():
            removed = ~run.controller.mask[name]
            assert removed.any()
            assert not weight.detach()[removed].view(torch.int32).any(), f"{name}: −0 at {run.progress}"

    assert_plus_zero()
    loop.train_epoch(run)
    assert_plus_zero()


def test_the_rewind_point_exists_after_a_round_0_without_epochs(tmp_path: Path):
    """A run that starts from a trained model has it as its `init`."""
    run = Toy(Imp(), rewind_epoch=0, round_epochs=(0, 1, 1)).make(tmp_path)
    began = copied(run.net.state_dict())
    train_rounds(run, 2)
    assert digest(run.controller.rewind_point) == digest(began)
