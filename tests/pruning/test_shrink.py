"""Effect of the penalty on real weights with real gradients, step by step through the loop's `train_step`."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Toy, copied, mlp, train_rounds, vit

from vit_rsst import loop
from vit_rsst.pruning.fading import Fading
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Penalty
from vit_rsst.run.state import Run
from vit_rsst.training import optim
from vit_rsst.training.schedules import RAMPS

RESIDUAL = 1e-3


def whole_round(**options: object) -> Rsst:
    return Rsst(Penalty(**{"window": (0.0, 1.0), "residual": RESIDUAL, **options}), remove_at=1.0)


def round_1(toy: Toy, folder: Path) -> tuple[Run, MaskSet, dict[str, Tensor], dict[str, Tensor]]:
    """Trains round 0 and round 1: the run, the condemned, their weights as the round began and just before removal."""
    run = toy.make(folder)
    seen: list[dict[str, Tensor]] = []

    def evaluate() -> dict[str, float]:
        seen.append(copied(run.controller.weights))
        return {"top1": 0.0, "loss": 0.0}

    run.controller.evaluate = evaluate
    train_rounds(run, 1)
    run.controller.begin_round(1)
    optim.reset_state_(run.optimizer)
    condemned, began = run.controller.condemned, copied(run.controller.weights)
    for _ in run.progress.remaining_epochs():
        loop.train_epoch(run)
    assert len(seen) == 2, "one removal, measured before and after"
    return run, condemned, began, seen[0]


def left(condemned: MaskSet, began: dict[str, Tensor], ended: dict[str, Tensor]) -> Tensor:
    """What is left of each condemned weight, as a share of where it began, in float64."""
    return torch.cat([ended[n][condemned[n]].double() / began[n][condemned[n]].double() for n in condemned])


def assert_residual(toy: Toy, folder: Path, residual: float = RESIDUAL) -> None:
    run, condemned, began, ended = round_1(toy, folder)
    shares = left(condemned, began, ended)
    assert len(shares) > 1000
    assert (shares / residual - 1).abs().max() < 1e-3
    for name, weight in run.controller.weights.items():
        assert not weight[condemned[name]].any()
    moved = [(ended[n] - began[n]).abs()[run.controller.mask[n]] for n in condemned]
    assert torch.cat(moved).mean() > 1e-4, "the kept weights do not train"


# -- decoupled


@pytest.mark.parametrize("optimizer, lr", [("sgd", 1e-2), ("sgd", 1e-1), ("adamw", 1e-3), ("adamw", 1e-2)])
def test_the_condemned_end_at_the_residual_after_100_steps_at_any_rate(tmp_path, optimizer, lr):
    toy = Toy(whole_round(), optimizer=optimizer, lr=lr, round_epochs=(1, 5), steps_per_epoch=20)
    assert_residual(toy, tmp_path)


@pytest.mark.parametrize(
    "optimizer, rates", [("adamw", (1e-3, 1e-2)), pytest.param("sgd", (1e-2, 1e-1), marks=pytest.mark.slow)]
)
def test_the_condemned_end_at_the_residual_after_6000_steps_at_two_rates(tmp_path, optimizer, rates):
    """The calls of `loop.train_step` in its order, without Accelerate around them: 6,000 steps in seconds.

    The two layers learn at two rates, tenfold apart.
    """
    toy = Toy(whole_round(), optimizer=optimizer, scope="layer", round_epochs=(1, 300), steps_per_epoch=20)
    run = toy.make(tmp_path)
    controller, progress = run.controller, run.progress
    seen: list[dict[str, Tensor]] = []
    controller.evaluate = lambda: seen.append(copied(controller.weights)) or {"top1": 0.0, "loss": 0.0}
    train_rounds(run, 1)
    batches = [micro_batches[0] for micro_batches in run.loader.steps(progress)]
    layers = zip(controller.weights.values(), rates, strict=True)
    groups = [{"params": [w], "lr": lr, "weight_decay": 0.05} for w, lr in layers]
    plain = torch.optim.SGD(groups, momentum=0.9) if optimizer == "sgd" else torch.optim.AdamW(groups)
    controller.optimizer = plain
    controller.begin_round(1)
    condemned, began = controller.condemned, copied(controller.weights)
    for step in range(6000):
        images, labels = batches[step % 20]
        F.cross_entropy(run.net(images), labels).backward()
        controller.after_backward(progress)
        nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
        controller.before_step(progress)
        plain.step()
        run.net.zero_grad()
        controller.after_step(progress)
        progress.advance()
    for name in condemned:
        shares = left(MaskSet({name: condemned[name]}), began, seen[0])
        assert len(shares) == began[name].numel() - round(0.1 * began[name].numel())
        assert (shares / RESIDUAL - 1).abs().max() < 1e-3, name
        assert (seen[0][name] - began[name]).abs()[controller.mask[name]].mean() > 1e-3


@pytest.mark.parametrize("optimizer, lr", [("sgd", 1e-1), ("adamw", 1e-2)])
def test_the_condemned_of_a_vision_transformer_end_at_the_residual(tmp_path, optimizer, lr):
    toy = Toy(whole_round(), network=vit, optimizer=optimizer, lr=lr, round_epochs=(1, 5), steps_per_epoch=20)
    assert_residual(toy, tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("ramp", RAMPS)
def test_every_ramp_ends_at_the_residual(tmp_path, optimizer, ramp):
    assert_residual(Toy(whole_round(ramp=ramp), optimizer=optimizer, round_epochs=(1, 2), steps_per_epoch=20), tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "change",
    [
        {"accumulation": 2},
        {"clip": 0.01},
        {"clip": None},
        {"precision": "bf16"},
        {"weight_decay": 0.5},
        {"weight_decay": 0.0},
        {"final_sparsity": 0.95, "criterion": "random"},
        {"rewind_epoch": 0},
    ],
    ids=str,
)
def test_the_residual_does_not_depend_on_the_rest_of_the_recipe(tmp_path, optimizer, change):
    toy = Toy(whole_round(), optimizer=optimizer, round_epochs=(1, 3), steps_per_epoch=20)
    assert_residual(replace(toy, **change), tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps_per_epoch, epochs", [(1, 1), (2, 1), (7, 2)])
def test_a_window_of_few_steps_ends_at_the_residual_too(tmp_path, optimizer, steps_per_epoch, epochs):
    toy = Toy(whole_round(), optimizer=optimizer, round_epochs=(20, epochs), steps_per_epoch=steps_per_epoch)
    _, condemned, began, ended = round_1(toy, tmp_path)
    assert (left(condemned, began, ended) / RESIDUAL - 1).abs().max() < 1e-3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_strength_multiplies_the_logarithm(tmp_path, optimizer):
    toy = Toy(whole_round(strength=2.0, residual=0.05), optimizer=optimizer, round_epochs=(1, 3), steps_per_epoch=20)
    assert_residual(toy, tmp_path, residual=0.05**2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_penalty_restarting_each_epoch_still_ends_at_the_residual(tmp_path, optimizer):
    method = whole_round(span="epoch", ramp="cubic")
    assert_residual(Toy(method, optimizer=optimizer, round_epochs=(1, 3), steps_per_epoch=20), tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_step_shrinks_the_condemned_by_its_own_factor(tmp_path, optimizer):
    """σ of 1, 2, 3, … tenths of a nat in a window of steps 4 to 8, in which training does not move the condemned."""
    method = Rsst(Penalty("linear", residual=math.exp(-1.0), window=(0.4, 0.8)), remove_at=1.0)
    run = Toy(method, optimizer=optimizer, round_epochs=(1, 1), steps_per_epoch=10).make(tmp_path)
    train_rounds(run, 1)
    run.controller.begin_round(1)
    condemned = run.controller.condemned
    shares, before = [], copied(run.controller.weights)
    after_step = run.controller.after_step

    def watched(progress: object, skipped: bool = False) -> None:
        nonlocal before
        after_step(progress, skipped)
        now = copied(run.controller.weights)
        shares.append(left(condemned, before, now))
        before = now

    run.controller.after_step = watched
    loop.train_epoch(run)
    for step, nats in zip(range(4, 8), (0.1, 0.2, 0.3, 0.4), strict=True):
        assert (shares[step] / math.exp(-nats) - 1).abs().max() < 1e-5
    assert shares[1].std() > 1e-4, "before the window they train like all others"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
@pytest.mark.parametrize("host_knows", [True, False], ids=["by the host", "on the device"])
def test_a_skipped_step_does_not_change_the_residual(tmp_path, monkeypatch, optimizer, criterion, host_knows):
    """Whether a step was skipped is for the host to see on a CPU; on a GPU only the device knows."""
    monkeypatch.setattr(Fading, "_host_knows_at_once", host_knows)
    options = {"weight_decay": 1.0, "criterion": criterion}
    toy = Toy(whole_round(), optimizer=optimizer, round_epochs=(1, 1), steps_per_epoch=20, **options)
    run = replace(toy, max_skipped_steps=2).make(tmp_path)
    plain = run.loss

    def now_and_then_not_a_number(logits: Tensor, labels: Tensor) -> Tensor:
        return plain(logits, labels) * (math.nan if run.progress.global_step in (23, 31) else 1.0)

    run.loss = now_and_then_not_a_number
    seen: list[dict[str, Tensor]] = []
    run.controller.evaluate = lambda: seen.append(copied(run.controller.weights)) or {"top1": 0.0, "loss": 0.0}
    train_rounds(run, 1)
    run.controller.begin_round(1)
    optim.reset_state_(run.optimizer)
    condemned, began = run.controller.condemned, copied(run.controller.weights)
    loop.train_epoch(run)
    assert run.skipped_steps == 2
    assert (left(condemned, began, seen[0]) / RESIDUAL - 1).abs().max() < 1e-3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_condemned_stay_at_the_residual_between_window_and_removal(tmp_path, optimizer):
    method = Rsst(Penalty(residual=RESIDUAL, window=(0.0, 0.25)), remove_at=1.0)
    toy = Toy(method, optimizer=optimizer, lr=0.05, weight_decay=0.1, round_epochs=(1, 4), steps_per_epoch=20)
    assert_residual(toy, tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_empty_window_removes_without_a_penalty(tmp_path, optimizer):
    method = Rsst(Penalty(window=(0.0, 0.0)), remove_at=0.5)
    run, condemned, began, ended = round_1(Toy(method, optimizer=optimizer, round_epochs=(1, 2)), tmp_path)
    assert left(condemned, began, ended).abs().median() > 0.5
    assert not any(run.controller.weights[n][condemned[n]].any() for n in condemned)


def test_with_the_gradient_of_the_loss_adamw_does_not_reach_the_residual(tmp_path):
    """Why the gradient is blocked by default: with it, `residual` is not reached."""
    toy = Toy(whole_round(condemned_gradient=True), lr=1e-3, round_epochs=(1, 5), steps_per_epoch=20)
    _, condemned, began, ended = round_1(toy, tmp_path)
    shares = left(condemned, began, ended).abs()
    assert (shares / RESIDUAL).median() > 3
    assert ((shares / RESIDUAL - 1).abs() < 1e-3).double().mean() < 0.01


def test_in_the_window_the_clipped_norm_is_that_of_kept_weights(tmp_path):
    """The blocked condemned must not contribute to the clipped norm."""
    run = Toy(whole_round(), round_epochs=(1, 1), steps_per_epoch=5).make(tmp_path)
    train_rounds(run, 1)
    run.controller.begin_round(1)
    [micro_batch] = next(iter(run.loader.steps(run.progress)))
    run.loss(run.net(micro_batch[0]), micro_batch[1]).backward()
    kept = run.controller.mask.minus(run.controller.condemned)
    expected = math.sqrt(
        sum(
            float((p.grad.double() * (kept[name] if name in kept.masks else 1)).square().sum())
            for name, p in run.net.named_parameters()
        )
    )
    run.optimizer.zero_grad()
    _, norm = loop.train_step(run, [micro_batch])
    assert norm == pytest.approx(expected, rel=1e-5)


def test_epoch_metrics_report_the_penalty_and_the_condemned(tmp_path):
    """Epochs of 20 steps, the window is the second: before it, at its last step, after the removal."""
    method = Rsst(Penalty("linear", residual=RESIDUAL, window=(0.25, 0.5)), remove_at=0.75)
    run = Toy(method, round_epochs=(2, 4), steps_per_epoch=20).make(tmp_path)
    train_rounds(run, 1)
    run.controller.begin_round(1)
    optim.reset_state_(run.optimizer)
    found = []
    for epoch in run.progress.remaining_epochs():
        loop.train_epoch(run)
        found.append(run.controller.metrics(replace(run.progress, epoch=epoch, step=19)))
    first, window, removed, last = found
    assert (first["prune/penalty"], window["prune/penalty"]) == (0.0, 1.0)
    assert first["prune/condemned_left"] > 0.1
    share = window["prune/condemned_left"] / first["prune/condemned_left"]
    assert share == pytest.approx(RESIDUAL, rel=1e-3)
    assert window["prune/condemned_ratio"] < 1e-3 < first["prune/condemned_ratio"] < 1
    assert (first["prune/density"], window["prune/density"]) == (1.0, 1.0)
    for after in (removed, last):
        assert set(after) == {"prune/density", "prune/what_if_gap"}
        assert after["prune/density"] == pytest.approx(0.1, abs=1e-3)


# -- coupled: grad += λ·w


class Reference:
    """SGD with momentum, decay, clipping, masks and the coupled penalty in float64, from the formulas alone."""

    def __init__(self, net: nn.Module, alive: MaskSet, condemned: MaskSet):
        self.net = mlp().double()
        self.net.load_state_dict(net.state_dict())
        self.alive, self.condemned = dict(alive.masks), dict(condemned.masks)
        self.velocity: dict[str, Tensor] = {}
        self.norms: list[float] = []

    def gradients(self, micro_batches: list) -> dict[str, Tensor]:
        self.net.zero_grad()
        for x, y in micro_batches:
            (F.cross_entropy(self.net(x.double()), y) / len(micro_batches)).backward()
        return {name: p.grad.clone() for name, p in self.net.named_parameters()}

    def step(self, micro_batches: list, lr: float, lam: float, clip: float, blocked: bool, decay: float) -> None:
        grads = self.gradients(micro_batches)
        for name in self.alive:
            grads[name] *= self.alive[name]
            if blocked:
                grads[name] *= ~self.condemned[name]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        self.norms.append(norm)
        with torch.no_grad():
            for name, w in self.net.named_parameters():
                g = grads[name] * min(1.0, clip / norm)
                if name in self.condemned:
                    g = g + lam * w * self.condemned[name]
                if w.ndim > 1:
                    g = g + decay * w
                self.velocity[name] = 0.9 * self.velocity.get(name, torch.zeros_like(g)) + g
                w -= lr * self.velocity[name]
                if name in self.alive:
                    w *= self.alive[name]

    def forget_the_velocity_of_the_condemned(self) -> None:
        for name in self.condemned:
            self.velocity[name] *= ~self.condemned[name]

    def remove(self) -> None:
        with torch.no_grad():
            for name, w in self.net.named_parameters():
                if name in self.condemned:
                    self.alive[name] = self.alive[name] & ~self.condemned[name]
                    w *= self.alive[name]
                    self.velocity[name] *= self.alive[name]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("condemned_gradient", [True, False])
def test_the_coupled_penalty_under_sgd_matches_an_independent_float64_implementation(
    tmp_path, condemned_gradient, accumulation
):
    """20 steps, λ = g·φ over steps 4 to 12 of 20, held at g until the removal after 18; clipped at every step."""
    penalty = Penalty(
        "quadratic", strength=0.7, window=(0.2, 0.6), coupling="gradient", condemned_gradient=condemned_gradient
    )
    toy = Toy(
        Rsst(penalty, remove_at=0.9), optimizer="sgd", lr=0.1, clip=0.05, accumulation=accumulation,
        round_epochs=(1, 1, 1), steps_per_epoch=20,
    )  # fmt: skip
    run = toy.make(tmp_path)
    train_rounds(run, 2)  # the second round, which has dead weights besides the condemned
    run.controller.begin_round(2)
    optim.reset_state_(run.optimizer)
    reference = Reference(run.net, run.controller.mask, run.controller.condemned)
    assert run.controller.mask.density < 1
    for t, micro_batches in enumerate(run.loader.steps(run.progress)):
        lam = 0.7 * min(max(t - 3, 0) / 8, 1.0) ** 2 if t < 18 else 0.0
        if t == 4 and not condemned_gradient:
            reference.forget_the_velocity_of_the_condemned()
        blocked = 4 <= t < 18 and not condemned_gradient
        reference.step(micro_batches, toy.rate(run.progress), lam, 0.05, blocked, toy.weight_decay)
        if t == 17:
            reference.remove()
        optim.set_lr_(run.optimizer, run.lr(run.progress))
        loop.train_step(run, micro_batches)
        run.progress.advance()
        expected = dict(reference.net.named_parameters())
        for name, parameter in run.net.named_parameters():
            difference = (parameter.double() - expected[name]).abs().max()
            assert difference < 2e-6 * expected[name].abs().max().clamp(min=0.1), (t, name, difference)
    assert min(reference.norms) > 0.05, "every step was clipped, so that the order of clip and penalty matters"
    assert run.controller.mask.density == pytest.approx(0.1, abs=1e-3)
