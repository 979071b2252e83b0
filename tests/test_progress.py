"""Progress: every property against a count made step by step."""

import pytest

from vit_rsst.progress import Progress, at_fraction


@pytest.mark.parametrize("round_epochs", [(2, 1, 3), (0, 2), (1,), (3, 3, 3, 1)])
def test_all_counts_agree_with_counting_step_by_step(round_epochs):
    progress = Progress(3, round_epochs)
    seen = 0
    for round in progress.remaining_rounds():
        in_round = 0
        for epoch in progress.remaining_epochs():
            for step in range(3):
                assert (progress.round, progress.epoch, progress.step) == (round, epoch, step)
                assert (progress.round_step, progress.global_step) == (in_round, seen)
                assert progress.global_epoch == seen // 3
                progress.advance()
                in_round, seen = in_round + 1, seen + 1
        assert in_round == progress.round_steps == 3 * round_epochs[round]
        assert progress.round_step == in_round
    assert seen == progress.total_steps == 3 * progress.total_epochs


def test_a_round_without_epochs_is_visited_but_trains_nothing():
    progress = Progress(5, (0, 1))
    visited = [(round, list(progress.remaining_epochs())) for round in progress.remaining_rounds() if round == 0]
    assert visited == [(0, [])]


def test_a_resumed_run_continues_from_its_position():
    progress = Progress(2, (2, 2))
    progress.load_state_dict({"round": 1, "epoch": 1, "step": 1})
    walked = []
    for round in progress.remaining_rounds():
        for epoch in progress.remaining_epochs():
            while progress.epoch == epoch:
                walked.append((round, epoch, progress.step))
                progress.advance()
    assert walked == [(1, 1, 1)]


def test_a_completed_round_has_no_epochs_left_but_is_still_current():
    progress = Progress(2, (1, 1), round=0, epoch=1)
    first = next(progress.remaining_rounds())
    assert (first, list(progress.remaining_epochs()), progress.global_step) == (0, [], 2)


def test_the_state_is_three_numbers_and_round_trips():
    progress = Progress(7, (2, 2, 2), round=2, epoch=1, step=5)
    other = Progress(7, (2, 2, 2))
    other.load_state_dict(progress.state_dict())
    assert other == progress
    assert progress.state_dict() == {"round": 2, "epoch": 1, "step": 5}


@pytest.mark.parametrize(
    "fraction, steps, expected",
    [(0.0, 10, 0), (0.3, 10, 3), (1.0, 10, 10), (0.3, 391, 117), (0.26, 10, 3), (0.3, 1, 0)],
)
def test_a_fraction_rounds_to_the_nearest_step(fraction, steps, expected):
    assert at_fraction(fraction, steps) == expected
