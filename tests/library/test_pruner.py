"""`vit_rsst.Pruner` in loops of all kinds: zeros after every step, the stated shrink, a sentence for each mistake."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from toys_of_others import resnet, tiny_bert, tokens, vit
from watching import Watch

import vit_rsst
from vit_rsst.errors import CheckFailed, InputError
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Penalty

RSST = {"name": "rsst", "penalty": {"residual": 0.01, "window": [0.25, 0.75]}, "remove_at": 0.75}
STE = {"name": "ste", "window": [0.1, 0.7], "interval": 2}
IMAGES, LABELS = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 4


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def adamw(model: nn.Module, **more) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **more)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None) -> float:
    loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip) if clip else 0.0
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def dead_are_zero(model: nn.Module, pruner: vit_rsst.Pruner) -> bool:
    return all(not (model.get_parameter(name).detach() * ~alive).any() for name, alive in pruner.masks.items())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_condemned_shrink_by_the_stated_factor_and_the_dead_stay_zero(name):
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = vit_rsst.Pruner(
        model, optimizer, total_steps=24, rounds=2, final_sparsity=0.75, method=RSST, dense_steps=8
    )
    window, sizes = range(10, 14), {}
    total = sum(range(1, 5))
    for done in range(24):
        condemned = pruner._controller.condemned
        before = {n: w.detach().clone() for n, w in model.named_parameters()}
        step(model, optimizer, clip=1.0)
        assert dead_are_zero(model, pruner)
        if done in window:
            sigma = -math.log(0.01) * (done - 9) / total  # a linear ramp over four steps
            for weight, leaves in condemned.masks.items():
                expected = before[weight][leaves].double() * math.exp(-sigma)
                found = model.get_parameter(weight).detach()[leaves].double()
                found = found if done < 13 else expected * 0  # removed in the last step of the window
                sizes[done] = float((found - expected).abs().max() / expected.abs().max())
    assert all(sizes[done] < 1e-6 for done in range(10, 13))
    assert [round(result.density, 3) for result in pruner.results] == [1.0, 0.5, 0.25]
    assert pruner.results[1].condemned_ratio < 0.05
    pruner.finish()


def test_the_norm_that_clipping_sees_is_that_of_alive_weights():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=9, rounds=1, method="imp", final_sparsity=0.5, dense_steps=0)
    by_hand = copy.deepcopy(model)
    nn.functional.cross_entropy(by_hand(IMAGES), LABELS).backward()
    parts = [(p.grad * pruner.masks.get(n, torch.ones(()))) for n, p in by_hand.named_parameters()]
    expected = math.sqrt(sum(float(part.double().square().sum()) for part in parts))
    assert step(model, optimizer, clip=1e9) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler_only_steps_that_were_made_are_counted(fused):
    model = mlp()
    optimizer = adamw(model, fused=fused)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=12, rounds=1, method=RSST, final_sparsity=0.5, dense_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for done in range(14):
        scale = float("inf") if done in (5, 9) else 1.0
        before = copy.deepcopy(model.state_dict())
        scaler.scale(nn.functional.cross_entropy(model(IMAGES), LABELS) * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert dead_are_zero(model, pruner)
        if done in (5, 9) and not fused:
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        if pruner.is_over:
            break
    # A fused optimizer decides on the device, and its skipped steps count, as they do in the trainer.
    assert done == (11 if fused else 13)
    assert pruner.density == 0.5
    pruner.finish()


@pytest.mark.parametrize("fused", [False, True])
def test_a_penalty_in_the_gradient_has_its_own_size_under_a_grad_scaler(fused):
    penalty = {"coupling": "gradient", "strength": 0.5, "window": [0.0, 0.75]}
    models, scaler = [mlp(), mlp()], torch.amp.GradScaler("cpu", init_scale=1024.0)
    for model, scales in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        method = {"name": "rsst", "penalty": penalty, "remove_at": 0.75}
        vit_rsst.Pruner(model, optimizer, total_steps=9, rounds=1, method=method, final_sparsity=0.5, dense_steps=1)
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
            (scaler.scale(loss) if scales else loss).backward()
            scaler.step(optimizer) if scales else optimizer.step()
            scaler.update() if scales else None
            optimizer.zero_grad()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_a_closure_is_trained_like_a_plain_step():
    models = [mlp(), mlp()]
    words = {"total_steps": 12, "rounds": 2, "method": RSST, "final_sparsity": 0.8}
    first, second = (adamw(model) for model in models)
    for model, optimizer in zip(models, (first, second), strict=True):
        vit_rsst.Pruner(model, optimizer, **words)
    for _ in range(12):
        step(models[0], first)

        def closure():
            second.zero_grad()
            loss = nn.functional.cross_entropy(models[1](IMAGES), LABELS)
            loss.backward()
            return loss

        second.step(closure)
    assert all(torch.equal(one, two) for one, two in zip(*(m.parameters() for m in models), strict=True))


def test_straight_through_evaluates_what_it_will_keep_and_keeps_the_dense_weights():
    model = mlp()
    optimizer = adamw(model)
    method = {"name": "ste", "window": [0.1, 0.5], "interval": 1}
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=20, method=method, final_sparsity=0.5)
    for done in range(20):
        step(model, optimizer)
        if done == 12:
            dense = copy.deepcopy(model.state_dict())
            assert not dead_are_zero(model, pruner)
            masked = copy.deepcopy(model)
            masked._forward_pre_hooks.clear(), masked._forward_hooks.clear()
            pruner.apply_(masked)
            model.eval()
            with torch.no_grad():
                assert torch.equal(model(IMAGES), masked(IMAGES))
            model.train()
            assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())
            model(IMAGES)  # a forward pass without a step, then an evaluation
            with torch.no_grad():
                assert torch.equal(model(IMAGES), masked(IMAGES))
    assert dead_are_zero(model, pruner)
    pruner.finish()
    assert pruner.density == 0.5


@pytest.mark.parametrize("accumulation, precision", [(1, "no"), (3, "no"), (2, "bf16")])
def test_accelerate_with_accumulation_and_clipping_counts_optimizer_steps(accumulation, precision):
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation)
    model = mlp()
    model, optimizer = accelerator.prepare(model, adamw(model))
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=24, rounds=2, method=RSST, final_sparsity=0.8)
    watch = Watch(pruner, 0.01, (0.25, 0.75))
    for number in range(24 * accumulation):
        assert pruner.progress.global_step == number // accumulation
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(IMAGES), LABELS))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    pruner.finish()
    assert pruner.density == pytest.approx(0.2, abs=0.01)
    assert (watch.steps, len(watch.shrunk)) == (24, 6)
    assert max(watch.shrunk) < 1e-6


def test_an_update_that_moves_masked_weights_is_undone_for_methods_without_a_penalty():
    model = mlp()
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-2, weight_decay=0.1)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=12, rounds=2, method="imp", final_sparsity=0.8)
    for _ in range(12):
        step(model, optimizer)
        assert dead_are_zero(model, pruner)


@pytest.mark.parametrize("method, compiles_first", [(RSST, True), (STE, True), (STE, False)])
def test_a_compiled_model_is_pruned_like_a_plain_one(method, compiles_first):
    models, words = [mlp(), mlp()], {"total_steps": 12, "method": method, "final_sparsity": 0.75}
    torch._dynamo.reset()
    plain = vit_rsst.Pruner(models[0], first := adamw(models[0]), **words)
    model, second = models[1], adamw(models[1])
    compiled = torch.compile(model, backend="aot_eager")
    pruner = vit_rsst.Pruner(compiled if compiles_first else model, second, **words)
    for _ in range(12):
        step(models[0], first, clip=1.0)
        step(compiled, second, clip=1.0)
        compiled.eval()
        with torch.no_grad():
            assert torch.allclose(compiled(IMAGES), models[0](IMAGES), atol=1e-5)
        compiled.train()
    pruner.finish()
    assert all(torch.equal(plain.masks[name], alive) for name, alive in pruner.masks.items())
    assert dead_are_zero(model, pruner)


def test_resnet18_is_pruned_while_it_trains():
    model, images = resnet(), torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    pruner = vit_rsst.Pruner(
        model, optimizer, total_steps=3, dense_steps=1, rounds=1, method="imp", final_sparsity=0.5,
        granularity="channel", protect=["conv1.*", "fc.*"],
    )  # fmt: skip
    for _ in range(3):
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    small, report = vit_rsst.slim(model.eval())
    assert torch.allclose(small(images), model(images), atol=1e-4)
    assert "channels left" in str(report)


@pytest.mark.parametrize("granularity, criterion", [("element", "activation_l2"), ("head", "taylor")])
def test_bert_is_pruned_while_it_trains(granularity, criterion):
    model = tiny_bert()
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(
        model, optimizer, total_steps=6, rounds=1, method=RSST, final_sparsity=0.5, granularity=granularity,
        criterion=criterion, calibration=[tokens(1), tokens(2)], protect=["classifier*", "*pooler*"],
    )  # fmt: skip
    for number in range(6):
        model(**tokens(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert dead_are_zero(model, pruner)
    pruner.finish()
    assert pruner.density == pytest.approx(0.5, abs=0.01)


def test_events_metrics_and_report_tell_the_rounds():
    model, events = mlp(), []
    optimizer = adamw(model)
    accuracies = iter([90.0, 89.5, 88.0, {"top1": 80.0, "loss": 1.0}])
    model[1].eval()

    def evaluate():
        assert not model.training
        return next(accuracies)

    pruner = vit_rsst.Pruner(
        model, optimizer, total_steps=12, rounds=1, method=RSST | {"remove_at": 1.0}, final_sparsity=0.5,
        recovery_steps=2, dense_steps=2, on_event=events.append, evaluate=evaluate,
    )  # fmt: skip
    assert pruner.progress.round_epochs == (2, 8, 2)
    for _ in range(5):
        step(model, optimizer)
    assert pruner.metrics()["prune/condemned_left"] < 1
    for _ in range(7):
        step(model, optimizer)
    names = [(event.name, event.round, event.step) for event in events]
    assert names == [
        ("round began", 0, 0), ("round ended", 0, 2), ("round began", 1, 2), ("round ended", 1, 10),
        ("round began", 2, 10), ("round ended", 2, 12), ("training ended", 2, 12),
    ]  # fmt: skip
    assert pruner.results[1].what_if_gap == 0.5
    assert events[3].result == pruner.results[1]
    assert [line.split()[0] for line in pruner.report().splitlines()] == ["round", "0", "1", "2"]
    assert "+0.50" in pruner.report()
    assert [module.training for module in model] == [True, False, True]


def test_a_moving_average_of_the_model_gets_the_zeros_too():
    model = vit()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=4, rounds=1, method="imp", final_sparsity=0.5, dense_steps=2)
    for _ in range(4):
        nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    assert not dead_are_zero(average.module, pruner)
    pruner.apply_(average)
    assert dead_are_zero(average.module, pruner)
    with pytest.raises(InputError, match=r"^Pruner\.apply_: Sequential has no parameter blocks\.\S+ of shape"):
        pruner.apply_(mlp())


def test_steps_after_the_end_hold_the_masks_and_are_said_once():
    model = mlp()
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=4, rounds=1, method="imp", final_sparsity=0.5)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(8):
            step(model, optimizer)
            assert dead_are_zero(model, pruner)
    told = [str(one.message) for one in found if "Pruner" in str(one.message)]
    assert told == ["Pruner: a step after total_steps=4; the masks are held, and nothing more is pruned."]
    pruner.finish()


def test_finish_refuses_before_the_last_removal_and_finds_what_others_changed():
    model = mlp()
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=12, rounds=2, method=RSST, final_sparsity=0.8)
    for _ in range(9):
        step(model, optimizer)
    with pytest.raises(InputError, match=r"^Pruner\.finish: after step 9 of total_steps=12, before the last removal"):
        pruner.finish()
    for _ in range(2):  # the last step of recovery is missing: scalers skip some
        step(model, optimizer)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(CheckFailed, match=r"^Pruner: \d+ masked elements of 0\.weight are not zero"):
        pruner.finish()
    assert len(pruner.results) == 2


def test_finish_finds_a_layer_that_was_replaced():
    model = mlp()
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=4, rounds=1, method="imp", final_sparsity=0.5)
    model[2] = nn.Linear(16, 4)
    for _ in range(4):
        step(model, optimizer)
    with pytest.raises(
        CheckFailed, match=r"^Pruner\.finish: 2\.weight is another tensor than when the Pruner was made"
    ):
        pruner.finish()


def test_an_exception_in_a_callback_does_not_stop_the_rounds():
    def on_event(event: vit_rsst.Event) -> None:
        events.append((event.name, event.round))
        if event.name == "round ended":
            raise KeyError(event.round)

    model, events = mlp(), []
    optimizer = adamw(model)
    words = {"total_steps": 12, "rounds": 2, "method": RSST, "final_sparsity": 0.8, "seed": 1}
    pruner = vit_rsst.Pruner(model, optimizer, on_event=on_event, **words)
    for number in range(1, 13):
        if number in (4, 8, 12):
            with pytest.raises(KeyError):
                step(model, optimizer)
            optimizer.zero_grad()
        else:
            step(model, optimizer)
    names = ["round began", "round ended"]
    assert events == [(name, round) for round in range(3) for name in names] + [("training ended", 2)]
    pruner.finish()
    assert pruner.density == pytest.approx(0.2, abs=0.01)
    twin = mlp()
    with pytest.raises(ZeroDivisionError):
        vit_rsst.Pruner(twin, adamw(twin), method=STE, total_steps=4, final_sparsity=0.5, on_event=lambda event: 1 / 0)
    assert not twin._forward_pre_hooks


def test_a_selection_that_was_interrupted_is_made_before_the_next_step():
    def calibration() -> list:
        served.append(0)
        if len(served) == 3:  # the first is a trial, the second of round 1
            raise KeyboardInterrupt
        return [(IMAGES, LABELS)]

    model, served = mlp(), []
    optimizer = adamw(model)
    words = {"total_steps": 12, "rounds": 2, "method": "imp", "final_sparsity": 0.8, "criterion": "activation_l2"}
    pruner = vit_rsst.Pruner(model, optimizer, calibration=calibration, **words)
    for number in range(1, 13):
        if number == 8:
            with pytest.raises(KeyboardInterrupt):
                step(model, optimizer)
            optimizer.zero_grad()
            densities = [pruner.density]
        else:
            step(model, optimizer)
    pruner.finish()
    assert [*densities, pruner.density] == pytest.approx([0.2**0.5, 0.2], abs=0.01)


def test_a_step_without_gradients_of_the_pruned_weights_is_a_step():
    model = mlp()
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=4, rounds=1, method="imp", final_sparsity=0.5, dense_steps=0)
    optimizer.step()
    for _ in range(3):
        step(model, optimizer)
    pruner.finish()
    assert dead_are_zero(model, pruner)


def test_numbers_of_numpy_are_numbers():
    model = mlp()
    words = {"total_steps": np.int64(12), "rounds": np.int64(2), "final_sparsity": np.float32(0.5)}
    assert vit_rsst.Pruner(model, adamw(model), **words).progress.round_epochs == (4, 4, 4)


def test_a_model_that_moves_after_its_pruner_is_named():
    model = mlp()
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=4, rounds=1, method="imp", final_sparsity=0.5, dense_steps=0)
    pruner._controller.mask = MaskSet(
        {name: mask.to("meta") for name, mask in pruner.masks.items()}
    )  # no second device
    with pytest.raises(InputError, match=r"^Pruner\(model=…\): it was on meta and is on cpu; make the Pruner after"):
        step(model, optimizer)


def test_a_training_that_has_diverged_is_named_at_the_end_of_the_round():
    model = mlp()
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=4, rounds=1, method="imp", final_sparsity=0.8)
    optimizer.param_groups[0]["lr"] = math.inf
    step(model, optimizer)
    with pytest.raises(CheckFailed, match=r"^Pruner: 0\.weight is not finite: training has diverged"):
        step(model, optimizer)
    assert not pruner.results


def test_straight_through_forgets_an_interrupted_step_when_a_state_is_loaded():
    def trained(steps: int) -> tuple:
        model = mlp()
        optimizer = adamw(model)
        pruner = vit_rsst.Pruner(model, optimizer, total_steps=20, method=STE, final_sparsity=0.8)
        for _ in range(steps):
            step(model, optimizer)
        return model, optimizer, pruner

    expected, *_ = trained(20)
    states = [copy.deepcopy(part.state_dict()) for part in trained(12)]
    parts = trained(15)
    parts[0](IMAGES).sum().backward()  # and then an interrupt
    parts[1].zero_grad()
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    for _ in range(8):
        step(*parts[:2])
    assert all(torch.equal(*pair) for pair in zip(parts[0].parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("method", [RSST, STE])
def test_pickling_or_copying_a_pruner_is_refused(method):
    model = mlp()
    pruner = vit_rsst.Pruner(model, adamw(model), total_steps=24, method=method, final_sparsity=0.5)
    for what in (pruner, model) if method is STE else (pruner,):
        with pytest.raises(InputError, match=r"^Pruner: it cannot be pickled"):
            pickle.dumps(what)
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(InputError, match=r"^Pruner: it cannot be (pickled|copied)"):
            copied(pruner)
    assert isinstance(copy.deepcopy(model), nn.Module)
    pruner.detach()
    assert isinstance(pickle.loads(pickle.dumps(model)), nn.Module)


def test_after_finish_no_hook_is_left():
    model = mlp()
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(model, optimizer, total_steps=2, rounds=1, method="imp", final_sparsity=0.5)
    for _ in range(2):
        step(model, optimizer)
    pruner.finish()
    step(model, optimizer)
    assert not dead_are_zero(model, pruner)
    vit_rsst.Pruner(model, optimizer, total_steps=2, rounds=1, method="imp", final_sparsity=0.5).detach()


def test_a_state_is_refused_with_other_keywords_and_before_the_weights_are_loaded():
    words = {"total_steps": 4, "rounds": 1, "method": "imp", "final_sparsity": 0.5, "dense_steps": 1}
    model = mlp()
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(model, optimizer, **words)
    for _ in range(2):
        step(model, optimizer)
    state, other = pruner.state_dict(), mlp(seed=1)
    fresh = vit_rsst.Pruner(other, adamw(other), **words)
    with pytest.raises(InputError, match=r"^Pruner\.load_state_dict: 0\.weight is not zero where this state has"):
        fresh.load_state_dict(state)
    with pytest.raises(InputError, match=r"^Pruner\.load_state_dict: controller is missing; expected what"):
        fresh.load_state_dict({"tensors": {}})
    fresh.detach()
    with pytest.raises(InputError, match=r"^Pruner\.load_state_dict: this one is finished or detached; make a new"):
        fresh.load_state_dict(state)
    other = vit_rsst.Pruner(other, adamw(other), **(words | {"total_steps": 5}))
    with pytest.raises(InputError, match=r"^Pruner\.load_state_dict: rounds was \[1, 3\] and is \[1, 4\]; pass the"):
        other.load_state_dict(state)


PENALIZED = Rsst(Penalty(span="epoch"))
WRONG = [
    ({"total_steps": 2.5}, "Pruner(total_steps=…): 2.5 is not a whole number of at least 1."),
    ({"total_steps": 3}, "Pruner(total_steps=…): 3 steps, less 0 dense and 0 of recovery, do not hold 4 rounds; pass"),
    ({"dense_steps": 1.0}, "Pruner(dense_steps=…): 1.0 is neither a number of steps below total_steps=20 nor a"),
    ({"dense_steps": 20}, "Pruner(dense_steps=…): 20 is neither a number of steps below total_steps=20 nor a"),
    (
        {"method": "gmp", "rounds": None, "dense_steps": 2},
        "Pruner(dense_steps=…): has no effect with gmp, which has one",
    ),
    ({"method": "gmp", "dense_steps": None}, "Pruner(rounds=…): has no effect with gmp, which has one round; omit it."),
    ({"method": "dense", "rounds": None, "final_sparsity": 0.5}, "Pruner(final_sparsity=…): has no effect with dense,"),
    ({"final_sparsity": 1.2}, "Pruner(final_sparsity=…): 1.2 is out of range; expected less than 1."),
    ({"method": "rst", "rewind": "lr"}, "Pruner(rewind=…): rst starts every round from the initial weights, not from"),
    ({"method": "rssst"}, "Pruner(method=…): unknown method 'rssst'; expected"),
    ({"method": {"name": "rsst", "remove": 1}}, "Pruner(method.remove=…): unknown key; did you mean 'remove_at'?"),
    ({"method": {"name": "rsst", "remove_at": 2}}, "Pruner(method.remove_at=…): 2 is out of range; expected at most 1"),
    (
        {"method": {"name": "rsst", "remove_at": 0.1}},
        "Pruner(method.remove_at=…): 0.1 is before the end of the",
    ),
    ({"method": PENALIZED}, "Pruner(method.penalty.span=…): steps are not counted in epochs here; use round."),
    ({"method": "set", "rounds": None, "dense_steps": None}, "Pruner(method.interval=…): no step of the window [0.0,"),
    ({"criterion": "movement"}, "Pruner(criterion=…): movement adds up over the steps of the round before a removal,"),
    ({"rewind": "epoch:3"}, "Pruner(rewind=…): steps are not counted in epochs here; use init, or omit it."),
    ({"method": "constant", "rounds": None, "dense_steps": None}, "Pruner(model=…): it has no zeros to keep; prune"),
    (
        {"method": "refill", "criterion": "magnitude"},
        "Pruner(granularity=…): refill restores whole units;",
    ),
    ({"schedule": "cubc"}, "Pruner(schedule=…): unknown value 'cubc'; expected geometric, cubic, linear or explicit."),
    ({"rounds": 0}, "Pruner(rounds=…): 0 prunes nothing; rsst needs at least 1."),
    ({"criterion": "taylor", "granularity": "neuron"}, "Pruner(granularity=…): Sequential has no neuron that can be"),
    ({"criterion": "saliency"}, "Pruner(calibration=…): missing; saliency needs gradients: pass a loader of (inputs, "),
    (
        {"criterion": "saliency", "calibration": iter([])},
        "Pruner(calibration=…): an iterator serves one round; pass",
    ),
    ({"criterion": "saliency", "calibration": [(IMAGES,)]}, "Pruner(calibration=…): a batch of type tuple; expected"),
    ({"protect": ["*"]}, "Pruner(protect=…): no prunable weight is left; protect fewer or include some."),
]


@pytest.mark.parametrize("words, sentence", WRONG)
def test_a_wrong_keyword_is_one_sentence_and_leaves_no_hook(words, sentence):
    model = mlp()
    optimizer = adamw(model)
    with pytest.raises(InputError) as caught:
        vit_rsst.Pruner(model, optimizer, **({"total_steps": 20, "rounds": 4, "dense_steps": 0} | words))
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert not optimizer._optimizer_step_pre_hooks
    vit_rsst.Pruner(model, optimizer, total_steps=20, rounds=4)


def test_a_weight_with_two_names_is_pruned_by_one_of_them():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight = model[0].weight
    words = {"total_steps": 4, "rounds": 1, "final_sparsity": 0.5}
    with pytest.raises(InputError, match=r"^Pruner\(protect=…\): 0\.weight and 1\.weight are one weight; protect one"):
        vit_rsst.Pruner(model, adamw(model), **words)
    assert list(vit_rsst.Pruner(model, adamw(model), protect=["1.*"], **words).masks) == ["0.weight", "2.weight"]


def test_models_and_optimizers_that_do_not_fit_are_one_sentence_each():
    model, words = mlp(), {"total_steps": 20, "rounds": 2}
    optimizer = adamw(model)
    vit_rsst.Pruner(model, optimizer, **words)
    plain = mlp()
    cases = [
        (model, optimizer, "Pruner(model=…): it has a Pruner already; call finish() or detach() of that one first."),
        (nn.ReLU(), optimizer, "Pruner(protect=…): no prunable weight is left; protect fewer or include some."),
        (plain, optimizer, "Pruner(optimizer=…): does not hold 2 of 2 prunable weights, such as 0.weight; build it"),
        (plain, adamw(plain[0]), "Pruner(optimizer=…): does not hold 1 of 2 prunable weights, such as 2.weight; build"),
        (
            plain,
            plain,
            "Pruner(optimizer=…): a Sequential; expected an optimizer of torch that makes one pass in",
        ),
        (plain, torch.optim.LBFGS(plain.parameters()), "Pruner(optimizer=…): a LBFGS; expected an optimizer of torch"),
        (plain, torch.optim.NAdam(plain.parameters()), "Pruner(optimizer=…): the penalty is exact with SGD, Adam and"),
        (plain, adamw(plain, maximize=True), "Pruner(optimizer=…): the penalty is exact with SGD, Adam and AdamW that"),
        (
            plain,
            torch.optim.Adam(plain.parameters(), weight_decay=0.1),
            "Pruner(optimizer=…): with adam, weight decay is part of the gradient and would move the condemned",
        ),
    ]
    for given, held, sentence in cases:
        with pytest.raises(InputError) as caught:
            vit_rsst.Pruner(given, held, **words)
        assert str(caught.value).startswith(sentence)
        assert "\n" not in str(caught.value)


def test_a_removal_with_compensation_is_that_of_prune():
    model, loader = mlp(), [(IMAGES[:20], LABELS[:20]), (IMAGES[20:], LABELS[20:])]
    optimizer = adamw(model)
    pruner = vit_rsst.Pruner(
        model, optimizer, total_steps=8, dense_steps=4, method="imp", rounds=1, final_sparsity=0.5,
        compensate="least_squares", calibration=loader,
    )  # fmt: skip
    for _ in range(3):
        step(model, optimizer)
    twin = copy.deepcopy(model)
    unpruned = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer)  # the last of the dense round, after which the removal comes
    after = adamw(twin)
    after.load_state_dict(unpruned)
    step(twin, after)
    found = vit_rsst.prune(twin, 0.5, compensate="least_squares", calibration=loader)
    assert all(torch.equal(alive, pruner.masks[name]) for name, alive in found.mask.masks.items())
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))
    for _ in range(4):
        step(model, optimizer)
        assert dead_are_zero(model, pruner)
    pruner.finish()


@pytest.mark.parametrize(
    "words, sentence",
    [
        ({"method": "imp"}, "Pruner(calibration=…): missing; least_squares needs inputs of layers"),
        ({"method": "ste", "calibration": [(IMAGES, LABELS)]}, "Pruner(compensate=…): needs weights that leave for"),
        ({"method": "imp", "calibration": iter([(IMAGES, LABELS)])}, "Pruner(calibration=…): an iterator serves one"),
    ],
)
def test_a_compensation_that_cannot_be_is_refused(words, sentence):
    model = mlp()
    with pytest.raises(InputError) as error:
        vit_rsst.Pruner(model, adamw(model), total_steps=24, compensate="least_squares", **words)
    assert str(error.value).startswith(sentence)
