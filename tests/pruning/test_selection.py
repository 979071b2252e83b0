"""Selection against a slow second implementation: Python's stable sort over every element."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vit_rsst.pruning import contest
from vit_rsst.pruning.allocation import Allocation
from vit_rsst.pruning.criteria import CRITERIA, Criterion, Evidence
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.selector import Selector


def keep_top(scores: dict[str, Tensor], alive: MaskSet, density: float, scope: str) -> MaskSet:
    """Elements of the highest score."""
    selector = Selector(Criterion(lambda evidence: scores), allocation=Allocation(scope))
    return selector.units(Evidence(scores, alive, seed=0), density)


def by_sorting(scores: dict[str, Tensor], alive: MaskSet, density: float) -> dict[str, Tensor]:
    """Sorts all alive elements by descending score; Python's sort is stable, so ties keep the order of weights."""
    elements = [
        (name, i, float(scores[name].flatten()[i]))
        for name in alive
        for i in range(alive[name].numel())
        if alive[name].flatten()[i]
    ]
    k = round(density * sum(alive[name].numel() for name in alive))
    kept = {name: torch.zeros(alive[name].numel(), dtype=torch.bool) for name in alive}
    for name, i, _ in sorted(elements, key=lambda element: -element[2])[:k]:
        kept[name][i] = True
    return {name: kept[name].reshape(alive[name].shape) for name in alive}


def assert_same(found: MaskSet, expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def random_case(seed: int) -> tuple[dict[str, Tensor], MaskSet, float]:
    """Two to four weights of odd shapes, half of the elements dead, and mostly tied scores in every second case."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    shapes = [(number(1, 9), number(1, 9)) for _ in range(number(2, 5))]
    scores = {f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    if seed % 2:
        scores = {name: s.round() for name, s in scores.items()}
    alive = MaskSet(
        {name: torch.rand(s.shape, generator=generator) < 0.5 + 0.5 * (seed % 3 == 0) for name, s in scores.items()}
    )
    return scores, alive, float(torch.rand((), generator=generator, dtype=torch.float64))


# -- by hand


def test_the_largest_scores_survive_over_all_weights_together():
    scores = {"a": torch.tensor([[5.0, 1.0]]), "b": torch.tensor([3.0, 2.0, 4.0])}
    kept = keep_top(scores, MaskSet.full(scores), 0.6, "global")
    assert_same(kept, {"a": torch.tensor([[True, False]]), "b": torch.tensor([True, False, True])})


def test_by_layer_every_weight_keeps_the_same_share():
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([1.0, 2.0])}
    kept = keep_top(scores, MaskSet.full(scores), 0.5, "layer")
    assert_same(kept, {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([False, True])})


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.25, 0.5, 0.77, 1.0])
def test_equal_scores_still_keep_exactly_k(scope, density):
    scores = {"a": torch.full((5, 7), 0.5), "b": torch.full((3, 3), 0.5), "c": torch.full((10,), 0.5)}
    kept = keep_top(scores, MaskSet.full(scores), density, scope)
    if scope == "global":
        assert kept.num_alive == round(density * 54)
    else:
        assert [int(kept[name].sum()) for name in kept] == [round(density * n) for n in (35, 9, 10)]


def test_ties_go_to_the_lower_index_in_weight_order():
    scores = {"b": torch.tensor([1.0, 0.5, 0.5]), "a": torch.tensor([[0.5, 2.0], [0.5, 0.5]])}
    kept = keep_top(scores, MaskSet.full(scores), 4 / 7, "global")
    assert_same(kept, {"b": torch.tensor([True, True, True]), "a": torch.tensor([[False, True], [False, False]])})
    kept = keep_top(scores, MaskSet.full(scores), 5 / 7, "global")
    assert_same(kept, {"b": torch.tensor([True, True, True]), "a": torch.tensor([[True, True], [False, False]])})


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("value", [float("inf"), 1e30, float("nan")])
def test_dead_elements_never_come_back_whatever_their_score(scope, value):
    alive = MaskSet({"w": torch.tensor([True, False, True, False, True, True])})
    scores = {"w": torch.tensor([0.4, value, 0.3, value, 0.2, 0.1])}
    kept = keep_top(scores, alive, 0.5, scope)
    assert_same(kept, {"w": torch.tensor([True, False, True, False, True, False])})


def test_requesting_more_than_is_alive_keeps_everything_alive():
    alive = MaskSet({"w": torch.tensor([True, False, False, True])})
    assert_same(keep_top({"w": torch.ones(4)}, alive, 0.9, "global"), dict(alive.masks))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_density_of_one_keeps_everything(scope):
    scores = {"a": torch.tensor([3.0, -1.0, 2.0]), "b": torch.tensor([[0.0], [7.0]])}
    assert keep_top(scores, MaskSet.full(scores), 1.0, scope).density == 1.0


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_nan_score_is_rejected(scope):
    scores = {"w": torch.tensor([1.0, float("nan"), 3.0])}
    with pytest.raises(ValueError, match="not a number"):
        keep_top(scores, MaskSet.full(scores), 0.5, scope)


@pytest.mark.parametrize("low", [0.0, -float("inf")])
def test_zero_and_minus_infinity_rank_like_any_score(low):
    scores = {"w": torch.tensor([low, 2.0, low, 1.0, low])}
    kept = keep_top(scores, MaskSet.full(scores), 0.6, "global")
    assert_same(kept, {"w": torch.tensor([True, True, False, True, False])})


# -- against the independent implementation


@pytest.mark.parametrize("seed", range(40))
def test_global_selection_equals_sorting(seed):
    scores, alive, density = random_case(seed)
    assert_same(keep_top(scores, alive, density, "global"), by_sorting(scores, alive, density))


@pytest.mark.parametrize("seed", range(40))
def test_selection_by_layer_equals_sorting_each_weight(seed):
    scores, alive, density = random_case(seed)
    expected = {}
    for name in alive:
        expected |= by_sorting({name: scores[name]}, MaskSet({name: alive[name]}), density)
    assert_same(keep_top(scores, alive, density, "layer"), expected)


def some_entries(seed: int) -> list[contest.Entry]:
    """15,002 scores of three weights, in every second case with ties; a tenth of them alive, most or all."""
    draw, entries = np.random.default_rng(seed), []
    for size in (9000, 1, 6001):
        scores = draw.normal(size=size).astype(np.float32)
        scores = scores.round(1) + 0.0 if seed % 2 else scores
        scores[draw.random(size) < 0.01] = np.inf if seed % 4 < 2 else -np.inf
        alive = torch.from_numpy(draw.random(size) < (0.1, 0.9, 1.0)[seed % 3])
        entries.append(contest.Entry("w", "", torch.from_numpy(scores), alive))
    return entries


@pytest.mark.parametrize("seed", range(12))
def test_a_threshold_bracketed_by_a_sample_is_that_of_sorting(monkeypatch, seed):
    monkeypatch.setattr(contest, "SAMPLE", 512)
    entries = some_entries(seed)
    alive = torch.cat([entry.scores[entry.alive] for entry in entries]).sort(descending=True)[0]
    for k in (1, 2, len(alive) // 7, len(alive) // 2, len(alive) - 1, len(alive)):
        assert contest._kth_largest(entries, k) == alive[k - 1]


def test_a_sample_brackets_a_part_of_the_scores_and_one_that_is_unlike_the_rest_changes_nothing(monkeypatch):
    monkeypatch.setattr(contest, "SAMPLE", 512)
    scores, alive = np.random.default_rng(0).normal(size=20_000).astype(np.float32), np.ones(20_000, dtype=bool)
    low, high = contest._bracket([scores], [alive], 5000)
    assert 500 < ((scores >= low) & (scores <= high)).sum() < 10_000
    assert low < np.sort(scores)[-5000] < high
    scores[:: 20_000 // 512 | 1] = np.linspace(8, 9, len(scores[:: 20_000 // 512 | 1]))  # those that are drawn
    low, high = contest._bracket([scores], [alive], 5000)
    expected = np.sort(scores)[-5000]
    assert not low <= expected <= high
    entry = contest.Entry("w", "", torch.from_numpy(scores), torch.from_numpy(alive))
    assert contest._kth_largest([entry], 5000) == expected
    few = np.arange(20_000) == 1  # not drawn
    assert contest._kth_largest([contest.Entry("w", "", entry.scores, torch.from_numpy(few))], 1) == scores[1]


def test_the_random_cases_contain_ties_and_dead_elements():
    cases = [random_case(seed) for seed in range(40)]
    assert sum(alive.density < 1 for _, alive, _ in cases) >= 20
    assert sum(len(torch.cat([s.flatten() for s in scores.values()]).unique()) < 8 for scores, _, _ in cases) >= 15


def test_bf16_scores_full_of_ties_keep_exactly_k():
    scores = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0)).bfloat16()}
    assert len(scores["w"].unique()) < 3000
    kept = keep_top(scores, MaskSet.full(scores), 0.1, "global")
    assert kept.num_alive == 1000
    assert scores["w"][kept["w"]].min() >= scores["w"][~kept["w"]].max()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_column_major_scores_and_masks_are_ranked_in_row_order(scope):
    straight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 2.0]])
    turned = straight.t().contiguous().t()
    alive = MaskSet({"w": torch.ones_like(turned, dtype=torch.bool)})
    kept = keep_top({"w": turned}, alive, 0.5, scope)
    assert_same(kept, {"w": torch.tensor([[True, True, False], [False, False, True]])})


# -- criteria


def test_magnitude_is_the_absolute_value_in_float32():
    weights = {"w": torch.tensor([-2.0, 0.5], dtype=torch.bfloat16, requires_grad=True)}
    scores = CRITERIA["magnitude"].elements(Evidence(weights, MaskSet.full(weights), 0))
    assert scores["w"].tolist() == [2.0, 0.5]
    assert scores["w"].dtype == torch.float32
    assert not scores["w"].requires_grad


def test_random_scores_depend_on_the_seed_alone():
    weights = {"a": torch.zeros(3, 4), "b": torch.ones(5)}
    first, again, other = (
        CRITERIA["random"].elements(Evidence(weights, MaskSet.full(weights), seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in weights)
    assert not torch.equal(first["a"], other["a"])
    assert {name: s.shape for name, s in first.items()} == {name: w.shape for name, w in weights.items()}
