"""The penalty's arithmetic: its sum, where it is zero, and how it is distributed over steps."""

import math
from fractions import Fraction

import pytest

from vit_rsst.pruning.plan import Penalty
from vit_rsst.training.schedules import RAMPS

# steps a round, steps an epoch, window: whole rounds, windows that begin and end in mid-epoch, one step, many
ROUNDS = [
    (100, 10, (0.0, 1.0)),
    (100, 10, (0.0, 0.3)),
    (100, 10, (0.13, 0.67)),
    (97, 13, (0.21, 0.5)),
    (12, 4, (0.25, 0.75)),
    (1, 1, (0.0, 1.0)),
    (10, 5, (0.4, 0.5)),
    (39100, 391, (0.0, 0.3)),
]


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("span", ["round", "epoch"])
@pytest.mark.parametrize("round_steps, steps_per_epoch, window", ROUNDS)
def test_the_shrink_sums_to_strength_times_the_log_of_the_residual(ramp, span, round_steps, steps_per_epoch, window):
    for strength, residual in ((1.0, 1e-3), (0.5, 0.2)):
        penalty = Penalty(ramp, strength=strength, residual=residual, window=window, span=span)
        shrinks = [penalty.shrink_at(t, round_steps, steps_per_epoch) for t in range(round_steps)]
        assert math.fsum(shrinks) == pytest.approx(strength * math.log(1 / residual), rel=1e-12)
        assert all(sigma >= 0 for sigma in shrinks)


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("span", ["round", "epoch"])
@pytest.mark.parametrize("round_steps, steps_per_epoch, window", ROUNDS)
def test_the_shrink_is_zero_outside_the_window_and_positive_inside(ramp, span, round_steps, steps_per_epoch, window):
    penalty = Penalty(ramp, window=window, span=span)
    start, stop = (round(Fraction(str(x)) * round_steps) for x in window)
    for t in range(-1, min(round_steps, 2000) + 1):
        assert (penalty.shrink_at(t, round_steps, steps_per_epoch) > 0) == (start <= t < stop), t


def test_a_linear_ramp_over_four_steps_splits_the_log_one_to_four():
    penalty = Penalty("linear", residual=math.exp(-10), window=(0.0, 0.5))
    assert [penalty.shrink_at(t, 8, 4) for t in range(8)] == pytest.approx([1, 2, 3, 4, 0, 0, 0, 0])


def test_a_quadratic_ramp_splits_it_one_to_sixteen():
    penalty = Penalty("quadratic", residual=math.exp(-30), window=(0.5, 1.0))
    assert [penalty.shrink_at(t, 8, 8) for t in range(8)] == pytest.approx([0, 0, 0, 0, 1, 4, 9, 16])


def test_span_epoch_restarts_in_each_epoch():
    penalty = Penalty("linear", residual=math.exp(-9), window=(0.0, 1.0), span="epoch")
    assert [penalty.shrink_at(t, 6, 2) for t in range(6)] == pytest.approx([1, 2, 1, 2, 1, 2])


def test_span_epoch_restarts_at_epoch_boundaries_within_the_window():
    penalty = Penalty("linear", window=(0.25, 0.75), span="epoch")  # steps 2 to 5 of 8, epochs of 4
    shrinks = [penalty.shrink_at(t, 8, 4) for t in range(8)]
    assert shrinks[2] < shrinks[3] > shrinks[4] < shrinks[5]
    assert shrinks[2] == shrinks[4]


def test_one_step_takes_the_whole_log():
    assert Penalty("cubic", residual=0.01, window=(0.4, 0.5)).shrink_at(4, 10, 5) == pytest.approx(math.log(100))


def test_a_growing_ramp_never_shrinks_less_than_at_the_previous_step():
    for ramp in RAMPS:
        penalty = Penalty(ramp, window=(0.1, 0.9))
        shrinks = [penalty.shrink_at(t, 100, 10) for t in range(10, 90)]
        assert shrinks == sorted(shrinks)
        assert shrinks[-1] > shrinks[0]


def test_the_ramp_is_zero_before_the_window_one_at_its_last_step_and_held_after_it():
    penalty = Penalty("linear", window=(0.2, 0.6))
    found = [penalty.ramp_at(t, 10, 5) for t in range(10)]
    assert found == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_an_empty_window_means_no_penalty_at_any_step():
    penalty = Penalty(window=(0.3, 0.3))
    assert not penalty.steps(100)
    assert {penalty.shrink_at(t, 100, 10) for t in range(100)} == {0.0}
    assert {penalty.ramp_at(t, 100, 10) for t in range(100)} == {0.0}


def test_the_sum_does_not_depend_on_earlier_penalties():
    """The sum is cached; a penalty that differs in any field, or another length, has its own."""
    for other in (Penalty(), Penalty("quadratic"), Penalty(window=(0.0, 0.5)), Penalty(span="epoch")):
        for steps in (40, 80):
            total = math.fsum(other.shrink_at(t, steps, 10) for t in range(steps))
            assert total == pytest.approx(math.log(1000), rel=1e-12)
