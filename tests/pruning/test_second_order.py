"""The criterion `obs` against what a removal really costs a layer: float64, by least squares."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import vit

from vit_rsst.errors import InputError
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.models.resnet import CifarResNet
from vit_rsst.pruning.calibration import collect
from vit_rsst.pruning.compensation import DAMPING
from vit_rsst.pruning.criteria import CRITERIA, Evidence
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.second_order import element_losses, inverse, unit_losses

COLUMNS = 12


def inputs(tokens: int = 200) -> Tensor:
    """Inputs that depend on each other."""
    torch.manual_seed(0)
    return torch.randn(tokens, COLUMNS).double() @ torch.randn(COLUMNS, COLUMNS).double()


def cost(x: Tensor, w: Tensor, removed: list[int]) -> float:
    """The least ‖X w' − X w‖² + λ ‖w' − w‖² over all w' that are zero in `removed`."""
    ridge = (DAMPING * x.square().sum(0).mean()).sqrt() * torch.eye(COLUMNS, dtype=x.dtype)
    tall, stays = torch.cat([x, ridge]), [q for q in range(COLUMNS) if q not in removed]
    solution = torch.linalg.lstsq(tall[:, stays], tall @ w).solution
    return float((tall[:, stays] @ solution - tall @ w).square().sum())


def cheapest_first(x: Tensor, w: Tensor, units: list[list[int]]) -> list[float]:
    """Losses of the units in the order of a greedy elimination, none less than the one before, by unit."""
    found, gone, before, largest = [0.0] * len(units), [], 0.0, 0.0
    while len(gone) < len(units):
        costs = {}
        for u in set(range(len(units))) - set(gone):
            removed = [q for g in (*gone, u) for q in units[g]]
            costs[u] = sum(cost(x, row, removed) for row in w)
        u = min(costs, key=lambda u: costs[u])
        largest = max(largest, costs[u] - before)
        found[u], before = largest, costs[u]
        gone.append(u)
    return found


def test_elements_are_scored_by_what_their_elimination_costs():
    x, w = inputs(), torch.randn(3, COLUMNS).double()
    found = element_losses(w, inverse(x.T @ x))
    for row, losses in zip(w, found, strict=True):
        expected = cheapest_first(x, row[None], [[q] for q in range(COLUMNS)])
        assert losses.tolist() == pytest.approx(expected, rel=1e-3)


def test_the_least_of_a_row_costs_exactly_its_score():
    x, w = inputs(), torch.randn(4, COLUMNS).double()
    inverted = inverse(x.T @ x)
    for row, losses in zip(w, element_losses(w, inverted), strict=True):
        alone = [cost(x, row, [q]) for q in range(COLUMNS)]
        assert float(losses.min()) == pytest.approx(min(alone), rel=1e-4)
        assert int(losses.argmin()) == alone.index(min(alone))
        assert alone == pytest.approx((row.square() / inverted.diagonal()).tolist(), rel=1e-6)


def test_blocks_of_columns_are_scored_apart_and_rows_in_pieces(monkeypatch):
    from vit_rsst.pruning import second_order

    x, w = inputs(), torch.randn(7, COLUMNS).double()
    inverted = inverse(x.T @ x)
    found = element_losses(w, inverted, block=4)
    for start in range(0, COLUMNS, 4):
        own = slice(start, start + 4)
        assert torch.allclose(found[:, own], element_losses(w[:, own], inverted[own, own]), rtol=1e-4)
    monkeypatch.setattr(second_order, "CHUNK", 2 * 4 * 4)
    assert torch.equal(element_losses(w, inverted, block=4), found)


def test_units_are_scored_by_what_their_elimination_costs_the_consumer():
    x, w = inputs(), torch.randn(5, COLUMNS).double()
    units = [[0, 1, 2], [3, 7, 8], [4, 5, 6], [9, 10, 11]]
    found = unit_losses(w, inverse(x.T @ x), torch.tensor(units))
    assert found.tolist() == pytest.approx(cheapest_first(x, w, units), rel=1e-4)


def test_of_two_equal_inputs_only_the_first_is_free():
    x = inputs()
    x[:, 5] = x[:, 4]
    losses = unit_losses(torch.randn(5, COLUMNS).double(), inverse(x.T @ x), torch.arange(COLUMNS)[:, None])
    twins = sorted(losses[4:6].tolist())
    assert twins[0] < 0.05 * twins[1]
    assert losses.argmin() in (4, 5)


@pytest.mark.parametrize("granularity", ["element", "head", "neuron"])
def test_the_criterion_sees_the_centred_inputs_of_layers_with_a_bias(granularity):
    torch.manual_seed(0)
    net = vit().eval()
    weights, groups = prunable_parts(net, granularity)
    images = torch.randn(9, 3, 8, 8)
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(4)]
    statistics = collect(net, batches, weights, groups, "moments")
    seen: dict[str, Tensor] = {}
    names = ["blocks.0.attn.proj", "blocks.1.mlp.fc2"]
    hooks = [net.get_submodule(n).register_forward_pre_hook(lambda _, x, n=n: seen.update({n: x[0]})) for n in names]
    net(images)
    [hook.remove() for hook in hooks]
    scores = {}
    evidence = Evidence(weights, MaskSet.full(weights), 0, statistics)
    for name in names:
        x = seen[name].detach().flatten(0, 1).double()
        varying = x - x.mean(0)
        w = net.get_parameter(f"{name}.weight").detach()
        inverted = inverse(varying.T @ varying)
        if granularity == "element":
            scores[name] = (CRITERIA["obs"].elements(evidence)[f"{name}.weight"], element_losses(w, inverted))
            continue
        for group in groups:
            if group.site.module == name:
                expected = unit_losses(w, inverted, group.site.index)
                scores[name] = (CRITERIA["obs"].units(evidence, group), expected)
    assert len(scores) == (2 if granularity == "element" else 1)
    for found, expected in scores.values():
        assert torch.allclose(found, expected, rtol=2e-3)


def test_channels_are_scored_by_all_taps_of_the_kernels_that_read_them():
    torch.manual_seed(0)
    net = CifarResNet(3, depth=8, width=4).eval()
    weights, groups = prunable_parts(net, "channel")
    group, images = groups[0], torch.randn(6, 3, 8, 8)
    consumer, seen = net.get_submodule(group.site.module), []
    hook = consumer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    net(images)
    hook.remove()
    evidence = Evidence(
        weights, MaskSet.full(weights), 0, collect(net, [(images, torch.zeros(6).long())], weights, groups, "moments")
    )
    x = F.unfold(seen[0].detach().double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
    damping = DAMPING * x.square().sum(0).mean()
    hessian, w, costs = x.T @ x + damping * torch.eye(x.shape[1]), consumer.weight.detach().double().flatten(1), []
    for unit in range(group.units):
        mine = torch.arange(9 * unit, 9 * unit + 9)
        stays = torch.tensor([q for q in range(x.shape[1]) if q not in mine])
        change = torch.zeros_like(w)
        change[:, mine] = -w[:, mine]
        change[:, stays] = torch.linalg.solve(hessian[stays][:, stays], hessian[stays][:, mine] @ w[:, mine].T).T
        costs.append(float((change @ hessian * change).sum()))
    found = CRITERIA["obs"].units(evidence, group)
    assert float(found.min()) == pytest.approx(min(costs), rel=1e-3)
    assert int(found.argmin()) == costs.index(min(costs))


def test_a_large_mean_of_the_inputs_does_not_blur_the_scores():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(COLUMNS, 5))
    weights, x = {"0.weight": net[0].weight}, (1000 + inputs(600) / 4).float()
    statistics = collect(net, [(part, torch.zeros(len(part)).long()) for part in x.split(256)], weights, [], "moments")
    varying = x.double() - x.double().mean(0)
    expected = element_losses(net[0].weight.detach(), inverse(varying.T @ varying))
    found = CRITERIA["obs"].elements(Evidence(weights, MaskSet.full(weights), 0, statistics))["0.weight"]
    assert torch.allclose(found, expected, rtol=2e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_in_one_sentence(value):
    net, x = nn.Sequential(nn.Linear(COLUMNS, 5)), inputs(20).float()
    x[3, 4] = value
    with pytest.raises(InputError, match=r"pruning\.criterion: inputs of 0\.weight are not finite .*; use magnitude"):
        collect(net, [(x, torch.zeros(20).long())], {"0.weight": net[0].weight}, [], "moments")


def test_a_layer_without_rows_is_refused_in_one_sentence():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    weights = {"0.weight": net[0].weight}
    with pytest.raises(InputError, match=r"obs scores linear layers and ungrouped .*0\.weight.*use activation_l2"):
        collect(net, [(torch.randn(2, 4, 8, 8), torch.zeros(2))], weights, [], "moments")


def test_the_best_pair_of_a_window_is_kept_where_inputs_depend_on_each_other():
    """2:4 by obs costs no more than by magnitude, and near the best of the six choices in each window."""
    x, w = inputs(), torch.randn(40, COLUMNS).double()
    losses = element_losses(w, inverse(x.T @ x), block=4)
    costs = {"obs": 0.0, "magnitude": 0.0, "best": 0.0}
    for row, scores in zip(w, losses, strict=True):
        window = list(range(4))
        choices = {pair: cost(x, row, list(pair)) for pair in combinations(window, 2)}
        costs["best"] += min(choices.values())
        costs["obs"] += choices[tuple(sorted(scores[:4].argsort()[:2].tolist()))]
        costs["magnitude"] += choices[tuple(sorted(row[:4].abs().argsort()[:2].tolist()))]
    assert costs["obs"] <= 1.1 * costs["best"] < costs["magnitude"]
