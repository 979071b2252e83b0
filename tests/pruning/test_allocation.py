"""Allocation and contests against values calculated by hand, and budgets against the resulting slim model."""

import pytest
import torch

from vit_rsst.assembly.pruning import build_selection
from vit_rsst.errors import InputError
from vit_rsst.models import complexity, slim, zoo
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.pruning.allocation import Allocation
from vit_rsst.pruning.contest import Entry, contest, keep_n_of_m, spread
from vit_rsst.pruning.criteria import Evidence
from vit_rsst.pruning.device_contest import keep_best
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.recipe.schema import Pruning, Recipe, Schedule


def entry(name: str, scores: list[float], kind: str = "neuron", cost: float = 1.0, least: int = 0) -> Entry:
    values = torch.tensor(scores)
    return Entry(name, kind, values, torch.ones(len(scores), dtype=torch.bool), cost, least)


def numbers(kept: list[torch.Tensor]) -> list[list[int]]:
    return [mask.nonzero().flatten().tolist() for mask in kept]


def test_floors_hold_and_other_entries_compensate():
    entries = [entry("a", [1.0, 2.0, 3.0], least=2), entry("b", [9.0, 8.0, 7.0, 6.0])]
    assert numbers(contest(entries, 4)) == [[1, 2], [0, 1]]


def test_units_of_different_costs_fill_the_budget_to_nearest():
    heads, neurons = entry("h", [5.0, 1.0], "head", cost=10.0), entry("n", [4.0, 3.0, 2.0])
    assert numbers(contest([heads, neurons], 12)) == [[0], [0, 1]]
    assert numbers(contest([heads, neurons], 18)) == [[0, 1], [0, 1, 2]]  # 23 is 5 away, 13 is 5 away: the larger
    assert numbers(contest([heads, neurons], 17.9)) == [[0], [0, 1, 2]]
    assert numbers(contest([heads, neurons], 22.9, never_above=True)) == [[0], [0, 1, 2]]


def test_the_excess_of_a_capped_part_goes_to_the_others():
    assert spread(10, [1, 1, 2], [1, 10, 10]) == pytest.approx([1, 3, 6])
    assert spread(10, [1, 1], [3, 4]) == [3, 4]
    assert spread(6, [0, 1, 2], [9, 9, 9]) == pytest.approx([0, 2, 4])


@pytest.mark.parametrize("shape, window", [((3, 8), 4), ((2, 8, 3, 3), 8), ((5, 6), 3)])
def test_windows_run_along_the_input_and_each_keeps_its_best(shape, window):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for kept in range(1, window):
        mask = keep_n_of_m(scores, torch.ones(shape, dtype=torch.bool), kept, window)
        rows = scores.movedim(1, -1).reshape(-1, window).tolist()
        marks = mask.movedim(1, -1).reshape(-1, window).tolist()
        for row, mark in zip(rows, marks, strict=True):
            best = sorted(range(window), key=lambda i: -row[i])[:kept]
            assert [i for i in range(window) if mark[i]] == sorted(best)


def test_ties_in_a_window_keep_the_first_and_dead_inputs_stay_dead():
    alive = torch.tensor([[True, True, True, True], [False, True, False, False]])
    assert keep_n_of_m(torch.ones(2, 4), alive, 2, 4).tolist() == [
        [True, True, False, False],
        [False, True, False, False],
    ]


FOUR = [
    entry("blocks.0.attn", [0.1, 0.2, 0.3, 0.4], "head"),
    entry("blocks.0.mlp", [1.0, 2.0, 3.0, 4.0], "neuron"),
    entry("blocks.1.attn", [0.5, 0.6, 0.7, 0.8], "head"),
    entry("blocks.1.mlp", [5.0, 6.0, 7.0, 8.0], "neuron"),
]
DEPTHS = [0, 0, 1, 1]


def kept_by(allocation: Allocation, density: object) -> list[int]:
    return [int(mask.sum()) for mask in allocation.keep(FOUR, DEPTHS, density).values()]


def test_scopes_decide_which_entries_compete():
    assert kept_by(Allocation("global"), 0.5) == [0, 4, 0, 4]
    assert kept_by(Allocation("isomorphic"), 0.5) == [0, 0, 4, 4]
    assert kept_by(Allocation("layer"), 0.5) == [2, 2, 2, 2]


def test_a_depth_ramp_prunes_early_blocks_less_at_the_same_total():
    assert kept_by(Allocation("layer", depth_ramp=(0.5, 1.5)), 0.5) == [3, 3, 1, 1]
    assert kept_by(Allocation("layer", depth_ramp=(0.0, 1.0)), 0.75) == [4, 4, 2, 2]


def test_layer_sparsity_overrides_one_layer_and_the_others_compensate():
    allocation = Allocation("layer", layer_sparsity={"blocks.0.*": 0.0}, final_density=0.5)
    assert kept_by(allocation, 0.5) == [4, 4, 0, 0]
    halfway = Allocation("layer", layer_sparsity={"blocks.0.attn": 0.5}, final_density=0.5)
    assert kept_by(halfway, 0.75)[0] == 3  # half of the way to 0.5 is 0.25


def test_each_kind_can_have_its_own_density():
    assert kept_by(Allocation("layer"), {"head": 0.25, "neuron": 0.75}) == [1, 3, 1, 3]


def test_erk_budgets_are_proportional_to_the_sum_of_dimensions():
    alive = {"a": torch.ones(2, 2, dtype=torch.bool), "b": torch.ones(8, 8, dtype=torch.bool)}
    entries = [Entry(name, name, torch.rand(mask.shape), mask) for name, mask in alive.items()]
    kept = Allocation("erk").keep(entries, [0, 1], 20 / 68)  # 20 elements in the ratio 4 : 16
    assert [int(kept[name].sum()) for name in alive] == [4, 16]


@pytest.mark.fault("F25")
def test_an_unreachable_sparsity_is_rejected_with_the_reachable_maximum():
    entries = [entry("a", [1.0] * 4, least=1), entry("b", [1.0] * 4, least=3)]
    with pytest.raises(InputError, match=r"sparsity of 0\.75 cannot be reached, at most 0\.5:"):
        Allocation("global", final_density=0.25).check(entries)
    Allocation("global", final_density=0.5).check(entries)
    assert [int(m.sum()) for m in Allocation("global").keep(entries, [0, 1], 0.5).values()] == [1, 3]


@pytest.mark.parametrize("scope", ["global", "layer", "isomorphic"])
@pytest.mark.parametrize("budget", [{"flops": 0.6}, {"params": 0.55}])
def test_a_budget_is_met_by_the_slim_model(scope, budget):
    torch.manual_seed(0)
    args = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 6, "mlp_ratio": 2.0}
    net = zoo.create(*zoo.describe("vit_tiny", args, 10)).eval()
    weights, groups = prunable_parts(net, "head+neuron")
    recipe = Recipe(name="r", pruning=Pruning(granularity="head+neuron", scope=scope, schedule=Schedule(budget=budget)))
    selector, density = build_selection(recipe.pruning, net, weights, groups, 32)
    mask = selector.units(Evidence(weights, MaskSet.full(weights), 0), density(1.0))

    def size() -> float:
        return complexity.flops(net, 32) if "flops" in budget else sum(p.numel() for p in net.parameters())

    whole = size()
    largest = max(selector.costs.values())
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(mask[name])
    slim.shrink_(net, slim.kept_units(net, mask))
    [share] = budget.values()
    assert size() <= share * whole
    assert size() > share * whole - len(groups) * largest


def entries_of(random: torch.Generator) -> list[Entry]:
    """One to six entries with ties, infinities, dead elements and floors."""

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=random))

    made = []
    for number in range(1 + below(6)):
        size = (1, 3, 17, 200, 1000)[below(5)]
        scores = torch.randn(size, generator=random)
        kind = below(4)
        if kind == 1:
            scores = (scores * 2).round() * -0.0 if below(2) else (scores * 2).round() / 4
        elif kind == 2:
            scores[torch.rand(size, generator=random) < 0.2] = torch.inf
            scores[torch.rand(size, generator=random) < 0.2] = -torch.inf
        alive = torch.rand(size, generator=random) < (1.0, 0.7, 0.1, 0.0)[below(4)]
        made.append(Entry(str(number), "x", scores, alive, least=(0, 1, 5, size // 3, size)[below(5)]))
    return made


def test_a_device_contest_keeps_exactly_what_the_cpu_contest_keeps():
    random, floors_met = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        entries = entries_of(random)
        total = sum(entry.scores.numel() for entry in entries)
        budget = float(torch.rand((), generator=random)) * 1.1 * total
        expected = contest(entries, budget)
        least = [entry.least for entry in entries]
        found = keep_best([e.scores for e in entries], [e.alive for e in entries], least, round(budget))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        floors_met += sum(map(int, (mask.sum() for mask in found))) > round(budget)
    assert floors_met > 10
