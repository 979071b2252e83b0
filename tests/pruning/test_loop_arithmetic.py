"""The loop adds nothing to training: dense is a bare PyTorch loop bit for bit, and pruning nothing is dense."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import Toy, batchnorm_mlp, bits, copied, mlp, train_rounds, vit

from vit_rsst import loop
from vit_rsst.errors import Diverged
from vit_rsst.progress import Progress
from vit_rsst.pruning.methods.dense import Dense
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.methods.rsst import Rsst


def bare_loop(toy: Toy, batches: list) -> nn.Module:
    """Training as in PyTorch's tutorials, with explicit parameter groups, clipping and accumulation."""
    torch.manual_seed(toy.seed)
    net = toy.network()
    decayed = [p for p in net.parameters() if p.ndim > 1 and p is not getattr(net, "pos_embed", None)]
    decayed = [p for p in decayed if p is not getattr(net, "cls_token", None)]
    free = [p for p in net.parameters() if not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": toy.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(groups, lr=toy.lr, momentum=0.9, fused=True),
        "adam": lambda: torch.optim.Adam(groups, lr=toy.lr, fused=True),
        "adamw": lambda: torch.optim.AdamW(groups, lr=toy.lr, fused=True),
    }[toy.optimizer]()
    net.train()
    for step, micro_batches in enumerate(batches):
        warmup = 0.2 * len(batches)
        if step < warmup:
            lr = toy.lr * min(1.0, (step + 1) / warmup)
        else:
            x = (step - warmup) / (len(batches) - warmup)
            lr = 0.1 * toy.lr + (toy.lr - 0.1 * toy.lr) * (1 + math.cos(math.pi * x)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        for images, labels in micro_batches:
            (F.cross_entropy(net(images), labels) / len(micro_batches)).backward()
        if toy.clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), toy.clip)
        optimizer.step()
    return net


def all_batches(run: loop.Run) -> list:
    found = []
    for epoch in range(run.progress.total_epochs):
        found += run.loader.steps(Progress(run.progress.steps_per_epoch, (run.progress.total_epochs,), epoch=epoch))
    return found


@pytest.mark.parametrize("accumulation, clip", [(1, 1.0), (2, 0.1), (1, None)])
@pytest.mark.parametrize("network", [mlp, batchnorm_mlp, vit])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_dense_is_a_bare_pytorch_loop_bit_for_bit(tmp_path, optimizer, network, accumulation, clip):
    toy = Toy(
        Dense(), network=network, optimizer=optimizer, lr=0.02, accumulation=accumulation, clip=clip, round_epochs=(3,)
    )
    run = toy.make(tmp_path)
    batches = all_batches(run)
    assert len(batches) == 12
    train_rounds(run)
    assert bits(run.net.state_dict()) == bits(bare_loop(toy, batches).state_dict())


def test_a_whole_run_with_its_files_ends_where_the_bare_loop_ends(tmp_path):
    toy = Toy(Dense(), network=vit, round_epochs=(3,))
    run = toy.make(tmp_path)
    batches = all_batches(run)
    loop.train(run)
    expected = bare_loop(toy, batches).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.net.state_dict().items())


@pytest.mark.parametrize("method", [Gmp(window=(0.9, 1.0), interval=100), Imp(), Rsst(), Rsst(remove_at=0.0)])
def test_every_method_equals_dense_until_it_prunes(tmp_path, method):
    dense = Toy(Dense(), round_epochs=(2,)).make(tmp_path / "dense")
    train_rounds(dense)
    toy = replace(Toy(method), round_epochs=(20,) if method.one_round else (2, 1))
    other = toy.make(tmp_path / "other")
    other.lr = lambda progress: toy.rate(Progress(4, (2,), 0, progress.epoch, progress.step))
    for _ in range(2):
        other.controller.begin_round(0)
        loop.train_epoch(other)
    assert bits(other.net.state_dict()) == bits(dense.net.state_dict())


@pytest.mark.parametrize("method", [Imp(), Rsst()])
def test_every_round_starts_with_fresh_optimizer_state(tmp_path, method):
    run = Toy(method, round_epochs=(1, 1, 1)).make(tmp_path)
    remembered = []
    before_step = run.controller.before_step

    def watched(progress: Progress) -> None:
        remembered.append((progress.round, progress.step, len(run.optimizer.state)))
        before_step(progress)

    run.controller.before_step = watched
    loop.train(run)
    parameters = len(list(run.net.parameters()))
    assert remembered == [(round, step, parameters if step else 0) for round in range(3) for step in range(4)]


def test_an_epoch_trains_in_training_mode_whatever_the_mode_before(tmp_path):
    run = Toy(Dense(), network=batchnorm_mlp, round_epochs=(1,)).make(tmp_path)
    run.net.eval()
    train_rounds(run)
    assert run.net.state_dict()["2.num_batches_tracked"] == 4


def test_two_micro_batches_equal_one_batch_up_to_rounding(tmp_path):
    states = []
    for accumulation in (1, 2, 4):  # one after the other: Accelerate's accumulation is global
        run = Toy(Dense(), optimizer="sgd", accumulation=accumulation, round_epochs=(3,)).make(tmp_path)
        train_rounds(run)
        states.append(copied(run.net.state_dict()))
    one, *others = states
    for other in others:
        assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)
        assert bits(one) != bits(other)


def test_a_nan_loss_stops_the_run_before_any_weight_changes(tmp_path):
    run = Toy(Dense(), round_epochs=(1,)).make(tmp_path)
    run.loss = lambda logits, labels: logits.sum() * math.nan
    before = bits(run.net.state_dict())
    with pytest.raises(Diverged, match="not finite"):
        train_rounds(run)
    assert bits(run.net.state_dict()) == before


def test_the_running_loss_of_an_epoch_is_the_mean_over_its_steps(tmp_path):
    run = Toy(Dense(), lr=1e-30, accumulation=2, round_epochs=(1,)).make(tmp_path)
    net = run.net
    with torch.no_grad():
        pairs = [(net(x), y) for micro_batches in all_batches(run) for x, y in micro_batches]
    losses = [float(F.cross_entropy(logits.double(), y)) for logits, y in pairs]
    hits = [float((logits.argmax(1) == y).double().mean()) for logits, y in pairs]
    train_rounds(run)
    found = run.meter.compute_and_reset()
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["top1"] == pytest.approx(100 * sum(hits) / len(hits))
