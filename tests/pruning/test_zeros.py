"""Pruned weights are zero after every single step: no momentum, decay, clipping, accumulation or cast revives one."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from toys import Toy, train_rounds, vit

from vit_rsst import loop
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Penalty
from vit_rsst.run.state import Run


def is_plus_zero(values: Tensor) -> bool:
    """Whether every bit is 0, which rules out −0."""
    return not values.detach().contiguous().view(torch.int32).any()


def watch(run: Run) -> Counter:
    """Checks dead weights after every step; counts steps by phase, so that tests can assert coverage."""
    seen: Counter = Counter()
    after_step = run.controller.after_step

    def watched(progress: object, skipped: bool = False) -> None:
        had_condemned = run.controller.condemned is not None
        after_step(progress, skipped)
        dead = 0
        for name, weight in run.controller.weights.items():
            removed = ~run.controller.mask[name]
            assert is_plus_zero(weight[removed]), f"round {progress.round}, step {progress.round_step}: {name}"
            dead += int(removed.sum())
        if dead:
            is_commit = had_condemned and run.controller.condemned is None
            seen["commit" if is_commit else "window" if had_condemned else "after"] += 1

    run.controller.after_step = watched
    return seen


METHODS = {
    "rsst": Rsst(Penalty(window=(0.0, 0.5)), remove_at=0.75),
    "rsst with gradients": Rsst(Penalty(window=(0.25, 0.5), condemned_gradient=True), remove_at=0.75),
    "rsst, coupled": Rsst(Penalty(window=(0.0, 0.5), coupling="gradient"), remove_at=0.75),
    "rsst, coupled, with gradients": Rsst(
        Penalty(window=(0.25, 0.5), coupling="gradient", condemned_gradient=True), remove_at=0.75
    ),
    "imp": Imp(),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_dead_weights_are_plus_zero_after_every_step(tmp_path, method, optimizer, precision, accumulation):
    toy = Toy(
        METHODS[method], optimizer=optimizer, lr=0.05, weight_decay=0.1, clip=0.1, precision=precision,
        accumulation=accumulation, round_epochs=(1, 2, 2),
    )  # fmt: skip
    run = toy.make(tmp_path)
    seen = watch(run)
    train_rounds(run)
    if method == "imp":
        assert seen == {"after": 16}
    else:
        assert seen == {"window": 5, "commit": 2, "after": 4}  # in the first window nothing is dead yet
    assert run.controller.mask.density == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_dead_weights_of_a_vit_are_plus_zero_for_100_steps(tmp_path, optimizer):
    run = Toy(METHODS["rsst"], network=vit, optimizer=optimizer, lr=0.02, round_epochs=(1, 25)).make(tmp_path)
    seen = watch(run)
    train_rounds(run)
    assert seen == {"commit": 1, "after": 25}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_dead_weights_of_gmp_are_plus_zero_after_every_step(tmp_path, optimizer):
    run = Toy(Gmp(interval=3), optimizer=optimizer, lr=0.05, weight_decay=0.1, round_epochs=(10,)).make(tmp_path)
    seen = watch(run)
    train_rounds(run)
    assert seen["after"] > 30


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_kept_weights_do_change_so_the_zeros_are_meaningful(tmp_path, optimizer):
    run = Toy(Imp(), optimizer=optimizer, lr=0.05, round_epochs=(1, 1)).make(tmp_path)
    train_rounds(run, 1)
    run.controller.begin_round(1)
    before = {name: w.detach().clone() for name, w in run.controller.weights.items()}
    train_rounds(run)
    for name, weight in run.controller.weights.items():
        assert (weight != before[name])[run.controller.mask[name]].double().mean() > 0.99


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_removal_clears_the_moments_of_removed_weights_only(tmp_path, optimizer):
    run = Toy(METHODS["rsst with gradients"], optimizer=optimizer, round_epochs=(1, 2)).make(tmp_path)
    commits = 0
    after_step = run.controller.after_step

    def watched(progress: object, skipped: bool = False) -> None:
        nonlocal commits
        had_condemned = run.controller.condemned is not None
        after_step(progress, skipped)
        if not had_condemned or run.controller.condemned is not None:
            return
        commits += 1
        for name, weight in run.controller.weights.items():
            alive = run.controller.mask[name]
            moments = [value for key, value in run.optimizer.state[weight].items() if key != "step"]
            assert len(moments) == (1 if optimizer == "sgd" else 2)
            for moment in moments:
                assert not moment[~alive].any()
                assert moment[alive].count_nonzero() > 0.9 * alive.sum()

    run.controller.after_step = watched
    train_rounds(run)
    assert commits == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_stale_moment_revives_no_weight(tmp_path, optimizer):
    """Masked gradients alone would let it: the weights are written after the step."""
    run = Toy(Imp(), optimizer=optimizer, round_epochs=(1, 1)).make(tmp_path)
    train_rounds(run, 1)
    run.controller.begin_round(1)
    for weight in run.controller.weights.values():
        for key, moment in run.optimizer.state[weight].items():
            if key != "step":
                moment.fill_(1.0)
    loop.train_epoch(run)
    for name, weight in run.controller.weights.items():
        assert not weight[~run.controller.mask[name]].any()


def test_a_skipped_step_keeps_zeros_too(tmp_path):
    run = Toy(METHODS["rsst"], round_epochs=(1, 2, 2), max_skipped_steps=100).make(tmp_path)
    plain = run.loss
    run.loss = lambda logits, labels: plain(logits, labels) * (float("nan") if run.progress.step % 2 else 1.0)
    seen = watch(run)
    train_rounds(run)
    assert run.skipped_steps == 10
    assert sum(seen.values()) == 11
