"""Schedules against values calculated by hand and against independent formulas."""

import math
from itertools import pairwise

import pytest

from vit_rsst.assembly.optim import make_lr
from vit_rsst.progress import Progress
from vit_rsst.pruning.methods.dense import Dense
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.recipe.schema import Optim, Pruning, Recipe, Schedule, StepDecay, Train
from vit_rsst.training.schedules import RAMPS, SPARSITY_CURVES, learning_rate, ramp

E_MINUS_1 = 1.718281828459045

# (name, exponent) -> the strength half way: e^0.5 - 1 = 0.64872127, e^(1/4) - 1 = 0.28402542, e^(1/8) - 1 = 0.13314845,
# e^(1/16) - 1 = 0.06449446, each over e - 1
HALF_WAY = {
    ("linear", 4.0): 0.5,
    ("quadratic", 4.0): 0.25,
    ("cubic", 4.0): 0.125,
    ("exponential", 1.0): 0.3775406688,
    ("exponential", 2.0): 0.1652961767,
    ("exponential", 3.0): 0.0774892982,
    ("exponential", 4.0): 0.0375342728,
    ("cosine", 4.0): 0.5,
}
GRID = [i / 200 for i in range(201)]


def exp_minus_1(y: float) -> float:
    """The power series, y + y²/2! + y³/3! + …"""
    return math.fsum(y**k / math.factorial(k) for k in range(1, 25))


def second_implementation(name: str, x: float, p: float) -> float:
    if name == "cosine":
        return math.sin(math.pi * x / 2) ** 2
    if name == "exponential":
        return exp_minus_1(math.pow(x, p)) / E_MINUS_1
    return math.prod([x] * {"linear": 1, "quadratic": 2, "cubic": 3}[name])


# -- ramps


def test_every_ramp_matches_a_value_calculated_by_hand():
    assert {name for name, _ in HALF_WAY} == set(RAMPS)


@pytest.mark.parametrize("name, exponent", HALF_WAY)
def test_a_ramp_starts_at_zero_passes_its_midpoint_and_ends_at_one(name, exponent):
    assert ramp(name, 0.0, exponent) == 0.0
    assert ramp(name, 0.5, exponent) == pytest.approx(HALF_WAY[name, exponent], abs=1e-9)
    assert ramp(name, 1.0, exponent) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("name", RAMPS)
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.28, 4.0])
def test_a_ramp_matches_an_independent_formula(name, exponent):
    for x in GRID:
        assert ramp(name, x, exponent) == pytest.approx(second_implementation(name, x, exponent), abs=1e-12)


@pytest.mark.parametrize("name", RAMPS)
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.28, 4.0])
def test_a_ramp_never_decreases(name, exponent):
    values = [ramp(name, x, exponent) for x in GRID]
    assert all(later > earlier for earlier, later in pairwise(values[1:]))


@pytest.mark.parametrize("name", sorted(set(RAMPS) - {"cosine"}))
@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.28, 4.0])
def test_ramps_except_cosine_are_convex_for_exponents_of_at_least_one(name, exponent):
    values = [ramp(name, x, exponent) for x in GRID]
    assert all(a - 2 * b + c >= -1e-14 for a, b, c in zip(values, values[1:], values[2:], strict=False))


def test_an_exponent_below_one_is_not_convex():
    assert ramp("exponential", 0.25, 0.5) > 0.5 * ramp("exponential", 0.5, 0.5)


@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_is_held_at_its_ends_outside_the_window(name):
    assert ramp(name, -0.5, 4.0) == 0.0
    assert ramp(name, 1.5, 4.0) == ramp(name, 1.0, 4.0)


def test_the_published_table_lies_within_009_of_exponent_3_and_within_001_of_exponent_228():
    batches, table = (0, 100, 200, 300, 390), (0.0, 0.02, 0.15, 0.42, 1.0)

    def error(exponent: float) -> float:
        found = [ramp("exponential", (i + 1) / 391, exponent) for i in batches]
        return max(abs(a - b) for a, b in zip(found, table, strict=True))

    assert error(2.28) < 0.01
    assert 0.05 < error(3.0) < 0.09  # the table was not made with the exponent that it names
    third = [ramp("exponential", (i + 1) / 391, 3.0) for i in batches]
    assert third == pytest.approx([0.0, 0.010, 0.085, 0.336, 1.0], abs=6e-4)


# -- sparsity


@pytest.mark.parametrize(
    "name, final, fraction, expected",
    [
        ("geometric", 0.9, 0.5, 0.683772234),  # 1 - sqrt(0.1)
        ("geometric", 0.488, 1 / 3, 0.2),  # three rounds of 20 %: 0.8³ = 0.512
        ("geometric", 0.488, 2 / 3, 0.36),
        ("cubic", 0.8, 0.5, 0.7),  # 0.8 · (1 - 1/8)
        ("cubic", 0.9, 0.1, 0.2439),  # 0.9 · (1 - 0.729)
        ("linear", 0.9, 0.5, 0.45),
    ],
)
def test_a_sparsity_curve_passes_a_point_calculated_by_hand(name, final, fraction, expected):
    assert SPARSITY_CURVES[name](fraction, final) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", SPARSITY_CURVES)
@pytest.mark.parametrize("final", [0.3, 0.9, 0.99])
def test_a_sparsity_curve_rises_from_dense_to_its_final_value(name, final):
    values = [SPARSITY_CURVES[name](x, final) for x in GRID]
    assert values[0] == 0.0
    assert values[-1] == pytest.approx(final, abs=1e-15)
    assert all(later > earlier for earlier, later in pairwise(values))


def test_a_pruning_rate_removes_the_same_fraction_of_the_rest_every_round():
    schedule = Schedule(rate=0.2, rounds=3)
    assert [schedule.density(r / 3) for r in range(4)] == pytest.approx([1.0, 0.8, 0.64, 0.512])
    assert schedule.final == pytest.approx(0.488)


def test_listed_sparsities_are_those_of_the_rounds():
    schedule = Schedule(name="explicit", sparsities=(0.5, 0.8, 0.9))
    assert [schedule.density(r / 3) for r in range(4)] == pytest.approx([1.0, 0.5, 0.2, 0.1])


# -- learning rates


def test_a_four_step_warm_up_rises_by_quarters_then_the_cosine_starts_at_the_peak():
    rates = [learning_rate(t, 10, lr=0.8, warmup=0.4, schedule="cosine", min_lr=0.2) for t in range(11)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[7] == pytest.approx(0.5)  # half of the six steps after the warm-up
    assert rates[10] == pytest.approx(0.2)
    # cos 30° = 0.8660254: 0.2 + 0.6 · (1 + 0.8660254) / 2
    assert rates[5] == pytest.approx(0.75980762)


def test_a_constant_rate_stays_at_its_value_after_warm_up():
    rates = [learning_rate(t, 8, lr=0.5, warmup=0.25, schedule="constant") for t in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])


def test_steps_decay_exactly_at_their_milestone():
    options = {"lr": 1.0, "warmup": 0.0, "schedule": "steps", "milestones": (0.3, 0.6), "gamma": 0.1}
    rates = [learning_rate(t, 10, **options) for t in range(10)]
    assert rates == pytest.approx([1.0] * 3 + [0.1] * 3 + [0.01] * 4)


@pytest.mark.parametrize("epochs, milestone", [(90, 30), (90, 60), (120, 91), (160, 80), (7, 3)])
def test_a_milestone_given_in_epochs_falls_on_the_first_step_of_that_epoch(epochs, milestone):
    recipe = make_recipe(Optim(lr=1.0, schedule=StepDecay((milestone,))), Train(epochs=epochs))
    lr = make_lr(recipe)
    assert lr(at(391, recipe, round=0, epoch=milestone - 1, step=390)) == 1.0
    assert lr(at(391, recipe, round=0, epoch=milestone, step=0)) == pytest.approx(0.1)
    assert lr(at(391, recipe, round=1, epoch=milestone - 1, step=390)) == 1.0
    assert lr(at(391, recipe, round=1, epoch=milestone, step=0)) == pytest.approx(0.1)


# -- the learning rate of a round


def make_recipe(optim: Optim, train: Train, rewind: str = "lr", method: object = None, rounds: int = 2) -> Recipe:
    pruning = Pruning(method=method or Imp(), rewind=rewind, schedule=Schedule(rounds=rounds, final_sparsity=0.5))
    return Recipe(name="toy", optim=optim, train=train, pruning=pruning)


def at(steps_per_epoch: int, recipe: Recipe, **where: int) -> Progress:
    return Progress(steps_per_epoch, recipe.round_epochs, **where)


@pytest.mark.parametrize("rewind", ["lr", "init"])
def test_every_round_replays_the_whole_schedule_with_its_warm_up(rewind):
    recipe = make_recipe(Optim(lr=0.8, warmup_epochs=1, min_lr=0.2), Train(epochs=3), rewind)
    lr = make_lr(recipe)
    by_hand = [0.2, 0.4, 0.6, 0.8, 0.8, None, None, None, 0.5]  # 4 steps of warm-up, then 8 of cosine
    for round in (0, 1, 2):
        rates = [lr(at(4, recipe, round=round, epoch=t // 4, step=t % 4)) for t in range(9)]
        assert [r for r, e in zip(rates, by_hand, strict=True) if e] == pytest.approx([e for e in by_hand if e])


def test_a_rewind_to_an_epoch_replays_the_schedule_from_there():
    recipe = make_recipe(Optim(lr=1.0), Train(epochs=4), "epoch:1")
    lr = make_lr(recipe)
    assert lr(at(10, recipe, round=0)) == pytest.approx(1.0)
    assert lr(at(10, recipe, round=0, epoch=1)) == pytest.approx(0.8535533906)  # (1 + cos 45°) / 2
    # round 1 has four epochs for the remaining three quarters: 1/4 + 3/4 · 1/2 = 0.625 half way
    assert lr(at(10, recipe, round=1)) == pytest.approx(0.8535533906)
    assert lr(at(10, recipe, round=1, epoch=2)) == pytest.approx(0.3086582838)  # (1 + cos 112.5°) / 2
    assert lr(at(10, recipe, round=2, epoch=2)) == pytest.approx(0.3086582838)


def test_a_milestone_in_a_replayed_schedule_falls_on_its_step_despite_rounding():
    """1/6 + 5/6 · 24/30 is 5/6, where floats come out just below it."""
    recipe = make_recipe(Optim(lr=1.0, schedule=StepDecay((5,))), Train(epochs=6), "epoch:1")
    lr = make_lr(recipe)
    assert 1 / 6 + (1 - 1 / 6) * 24 / 30 < 5 / 6
    assert lr(at(5, recipe, round=1, epoch=4, step=3)) == 1.0
    assert lr(at(5, recipe, round=1, epoch=4, step=4)) == pytest.approx(0.1)


def test_a_rewind_into_the_warm_up_continues_the_warm_up():
    recipe = make_recipe(Optim(lr=1.0, warmup_epochs=2), Train(epochs=4), "epoch:1")
    lr = make_lr(recipe)
    # 40 steps a round, 20 of warm-up; round 1 begins at step 10 of them, and 11/20 is its rate
    assert lr(at(10, recipe, round=0, epoch=1)) == pytest.approx(0.55)
    assert lr(at(10, recipe, round=1)) == pytest.approx(0.55)


@pytest.mark.parametrize(
    "schedule, min_lr, expected", [("cosine", 0.03, 0.03), ("constant", 0.0, 1.0), (StepDecay((1, 3)), 0.0, 0.01)]
)
def test_without_a_rewind_later_rounds_keep_the_final_rate_of_round_0(schedule, min_lr, expected):
    optim = Optim(lr=1.0, schedule=schedule, min_lr=min_lr, warmup_epochs=1)
    recipe = make_recipe(optim, Train(epochs=4), "none")
    lr = make_lr(recipe)
    for epoch, step in ((0, 0), (1, 2), (3, 4)):
        assert lr(at(5, recipe, round=1, epoch=epoch, step=step)) == pytest.approx(expected)
    assert lr(at(5, recipe, round=0)) == pytest.approx(0.2)


@pytest.mark.parametrize("method", [Dense(), Gmp()])
def test_a_single_round_method_has_one_schedule_with_warm_up_and_milestones_in_epochs(method):
    train = Train(epochs=4, round_epochs=3)  # 4 + 3 + 3 epochs together
    recipe = make_recipe(Optim(lr=1.0, warmup_epochs=2, schedule=StepDecay((3,))), train, method=method)
    assert recipe.round_epochs == (10,)
    lr = make_lr(recipe)
    assert lr(at(5, recipe)) == pytest.approx(0.1)  # the first of ten steps of warm-up
    assert lr(at(5, recipe, epoch=1, step=4)) == pytest.approx(1.0)
    assert lr(at(5, recipe, epoch=2, step=4)) == pytest.approx(1.0)
    assert lr(at(5, recipe, epoch=3)) == pytest.approx(0.1)
    assert lr(at(5, recipe, epoch=9, step=4)) == pytest.approx(0.1)


def test_a_shorter_round_plays_the_same_schedule_faster():
    recipe = make_recipe(Optim(lr=1.0, warmup_epochs=2), Train(epochs=4, round_epochs=2))
    lr = make_lr(recipe)
    assert [lr(at(4, recipe, round=1, step=t)) for t in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert lr(at(4, recipe, round=1, epoch=1, step=2)) == pytest.approx(0.5)  # half of the cosine
