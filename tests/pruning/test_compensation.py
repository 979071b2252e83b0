"""Compensation: the answer is that of `torch.linalg.lstsq` in float64, on every kind of layer."""

import threading

import pytest
import torch
from torch import Tensor, nn
from toys import vit

from vit_rsst.errors import InputError
from vit_rsst.pruning import compensation
from vit_rsst.pruning.compensation import DAMPING, compensate_, least_squares
from vit_rsst.pruning.masks import MaskSet


def inputs(tokens: int = 400, columns: int = 24) -> Tensor:
    """Inputs that depend on each other, with a mean other than zero."""
    torch.manual_seed(0)
    return torch.randn(tokens, columns) @ torch.randn(columns, columns) + torch.randn(columns)


def reference(x: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """Row by row by QR in float64: the damping as rows √λ I below X, with the targets √λ w."""
    return with_bias(x, weight, None, keep)[0]


def with_bias(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a bias too: a column of ones beside X, which is not damped."""
    x, weight = x.double(), weight.double()
    varying = x if bias is None else x - x.mean(0)
    ridge = (DAMPING * varying.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    tall, ones = torch.cat([x, ridge]), torch.cat([torch.ones(len(x), 1), torch.zeros(x.shape[1], 1)]).double()
    found, shift = torch.zeros_like(weight), torch.zeros(len(weight), dtype=torch.float64)
    for row, stays in enumerate(keep):
        unknown = tall[:, stays] if bias is None else torch.cat([tall[:, stays], ones], 1)
        solution = torch.linalg.lstsq(unknown, tall @ weight[row]).solution
        found[row, stays] = solution[: int(stays.sum())]
        shift[row] = 0.0 if bias is None else solution[-1]
    return found, shift if bias is None else shift + bias.double()


def masks(rows: int = 16, columns: int = 24) -> dict[str, Tensor]:
    torch.manual_seed(1)
    scores = torch.rand(rows, columns // 4, 4)
    ragged = torch.rand(rows, columns) > 0.7
    ragged[0], ragged[1] = False, True  # a dead row, and one that loses nothing
    return {
        "elements": ragged,
        "2:4": (scores >= scores.sort(-1).values[..., 2:3]).view(rows, columns),
        "columns": (torch.rand(columns) > 0.5).repeat(rows, 1),
        "columns and rows": (torch.rand(columns) > 0.5) & (torch.rand(rows, 1) > 0.5),
        "nothing": torch.zeros(rows, columns, dtype=torch.bool),
    }


@pytest.mark.parametrize("kind", masks())
def test_the_weights_that_stay_are_those_of_lstsq_and_the_others_zero(kind):
    x, keep, weight = inputs(), masks()[kind], torch.randn(16, 24)
    found, expected = least_squares(weight, keep, x.T @ x), reference(x, weight, keep)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert not found[~keep].any()


@pytest.mark.parametrize("iterations", [1, 500])
def test_on_a_gpu_rows_that_do_not_converge_together_are_solved_one_by_one(monkeypatch, iterations):
    monkeypatch.setattr(compensation, "MAX_ITERATIONS", iterations)
    monkeypatch.setattr(compensation, "_change_by_row", compensation._change)  # what a GPU does
    x, keep, weight = inputs(), masks()["elements"], torch.randn(16, 24)
    found, expected = least_squares(weight, keep, x.T @ x), reference(x, weight, keep)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert not found[~keep].any()


def test_the_upper_half_of_the_gram_matrix_is_whole_when_it_is_computed_in_blocks(monkeypatch):
    x = inputs()
    monkeypatch.setattr(compensation, "BLOCK", 10)  # 24 columns: two blocks and a part
    gram = torch.zeros(24, 24)
    for part in x.split(150):
        compensation._add_gram_(gram, part)
    torch.testing.assert_close(gram.triu(), (x.double().T @ x.double()).triu().float(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kind", ["elements", "columns"])
@pytest.mark.parametrize("case", ["fewer tokens than columns", "inputs that are always zero", "a copied input"])
def test_a_singular_gram_matrix_has_a_damped_answer(case, kind):
    x = inputs(tokens=7 if case == "fewer tokens than columns" else 400)
    if case == "inputs that are always zero":
        x[:, 3:9] = 0
    elif case == "a copied input":
        x[:, 5] = x[:, 4]
    keep, weight = masks()[kind], torch.randn(16, 24)
    found, expected = least_squares(weight, keep, x.T @ x), reference(x, weight, keep)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_a_layer_that_sees_only_zeros_keeps_its_values():
    keep, weight = masks()["elements"], torch.randn(16, 24)
    assert torch.equal(least_squares(weight, keep, torch.zeros(24, 24)), weight * keep)


LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (5, 7, 12)),
    "1 × 1": (lambda: nn.Conv2d(12, 8, 1), (5, 12, 4, 3)),
    "patches": (lambda: nn.Conv2d(3, 8, 4, stride=4), (5, 3, 16, 16)),
    "3 × 3": (lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2), (5, 4, 8, 8)),
    "reflecting": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (5, 4, 8, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_error_of_a_layer_is_that_of_its_outputs_over_all_batches(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    net, x = nn.Sequential(make()), torch.randn(shape).cumsum(-1)
    weight = net[0].weight
    mask = MaskSet({"0.weight": torch.rand_like(weight) > 0.6})
    with torch.no_grad():
        dense = net(x)
        size = dense - net[0].bias.view(-1, *[1] * (x.dim() - 2 if kind != "linear" else 0))
        fit = compensate_(net, {"0.weight": weight}, mask, [(x[:2], None), (x[2:], None)]).fits["0.weight"]
        error = (net(x) - dense).square().sum() / size.square().sum()
    assert fit.error == pytest.approx(float(error), rel=1e-3)
    assert fit.error < 0.9 * fit.error_masked
    assert not weight[~mask["0.weight"]].any()


def test_layers_that_cannot_be_fitted_are_masked_and_named():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    net = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Linear(8, 8), shared, nn.GELU(), shared, nn.Linear(8, 2))
    weights = {f"{i}.weight": net[i].weight for i in (0, 1, 2, 5)}
    mask = MaskSet({name: torch.rand_like(weight) > 0.5 for name, weight in weights.items()})
    mask["5.weight"].fill_(True)
    left = weights["0.weight"].detach() * mask["0.weight"]
    found = compensate_(net, weights, mask, [(torch.randn(3, 4, 8), None)])
    assert (list(found.fits), found.left) == (["1.weight"], ("0.weight", "2.weight"))
    assert torch.equal(weights["0.weight"], left)
    assert all(not weight[~mask[name]].any() for name, weight in weights.items())
    assert str(found) == "1 weights fitted by least squares; masked without a fit: 0.weight, 2.weight"


def test_what_was_damped_is_said():
    net = nn.Sequential(nn.Linear(8, 4))
    mask = MaskSet({"0.weight": torch.rand(4, 8) > 0.5})
    found = compensate_(net, {"0.weight": net[0].weight}, mask, [(torch.randn(5, 8), None)])
    assert found.fits["0.weight"].is_singular
    assert "damping alone determines a part of 0.weight" in str(found)


def test_each_layer_is_fitted_behind_the_pruned_and_fitted_layers_before_it():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6)), torch.randn(90, 8)
    weights = {name: net.get_parameter(name) for name in ("0.weight", "2.weight")}
    dense = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    mask = MaskSet({name: torch.rand_like(weight) > 0.5 for name, weight in weights.items()})
    mask["2.weight"][0] = False  # its bias alone is left
    compensate_(net, weights, mask, [(x[:50], None), (x[50:], None)])
    for layer, seen in (("0", x), ("2", net[1](net[0](x)).detach())):
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        expected = with_bias(seen, dense[weight], dense[bias], mask[weight])
        for name, value in zip((weight, bias), expected, strict=True):
            assert (net.get_parameter(name) - value).norm() <= 1e-4 * value.norm()


def test_inputs_far_from_zero_are_centred_before_they_are_multiplied():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(90, 8) + 300.0
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    mask = MaskSet({"0.weight": torch.rand(6, 8) > 0.5})
    compensate_(net, {"0.weight": net[0].weight}, mask, [(x[:50], None), (x[50:], None)])
    expected = with_bias(x, weight, bias, mask["0.weight"])
    for found, value in zip((net[0].weight, net[0].bias), expected, strict=True):
        assert (found - value).norm() <= 1e-4 * value.norm()


@pytest.mark.parametrize("case", ["frozen", "shared", "none"])
def test_a_bias_that_is_not_the_layers_own_stays_and_the_weights_are_fitted_to_it(case):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8, bias=case != "none"), nn.Linear(8, 8)), torch.randn(90, 8) + 1.0
    if case == "frozen":
        net[0].bias.requires_grad_(False)
    elif case == "shared":
        net[1].bias = net[0].bias
    dense = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    mask = MaskSet({"0.weight": torch.rand(8, 8) > 0.5})
    compensate_(net, {"0.weight": net[0].weight}, mask, [(x, None)])
    expected = reference(x, dense["0.weight"], mask["0.weight"])
    assert (net[0].weight - expected).norm() <= 1e-4 * expected.norm()
    assert all(torch.equal(net.get_parameter(name), dense[name]) for name in dense if name != "0.weight")


def test_the_consumer_of_removed_units_makes_up_for_what_they_computed():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6)), torch.randn(90, 8)
    hidden, dense = net[1](net[0](x)).detach(), {n: p.detach().clone() for n, p in net.named_parameters()}
    alive = torch.arange(12) % 2 == 0
    weights = {name: net.get_parameter(name) for name in ("0.weight", "2.weight")}
    mask = MaskSet({"0.weight": alive[:, None].repeat(1, 8), "2.weight": alive.repeat(6, 1)})
    compensate_(net, weights, mask, [(x, None)], of_units=True)
    expected = with_bias(hidden, dense["2.weight"], dense["2.bias"], mask["2.weight"])
    for found, value in zip((net[2].weight, net[2].bias), expected, strict=True):
        assert (found - value).norm() <= 1e-4 * value.norm()
    assert torch.equal(weights["0.weight"], dense["0.weight"] * alive[:, None])
    assert torch.equal(net[0].bias, dense["0.bias"])


class Failing(nn.Module):
    """Fails, or applies its layers the other way round, if the input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise RuntimeError("expected a matrix")
        return self.b(self.a(x)) if float(x.sum()) >= 0 else self.a(self.b(x))


@pytest.mark.parametrize(
    "second, error, sentence",
    [
        (-torch.ones(2, 4), InputError, "the order in which layers are applied differs"),
        (torch.full((2, 4), float("inf")), InputError, "inputs of a.weight are not finite"),
        (torch.ones(1, 2, 4), RuntimeError, "expected a matrix"),
    ],
)
def test_after_an_error_all_parameters_are_as_they_were_and_no_pass_is_left_waiting(second, error, sentence):
    net, threads = Failing(), threading.active_count()
    weights = {name: net.get_parameter(name) for name in ("a.weight", "b.weight")}
    before = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    mask = MaskSet({name: torch.rand_like(weight) > 0.5 for name, weight in weights.items()})
    with pytest.raises(error, match=sentence):
        compensate_(net, weights, mask, [(torch.ones(2, 4), None), (second, None)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.named_parameters())
    assert threading.active_count() == threads


def test_without_images_nothing_is_fitted():
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InputError, match="compensation needs calibration images, but there are none"):
        compensate_(net, {"0.weight": net[0].weight}, MaskSet.full({"0.weight": net[0].weight}), [])


@torch.no_grad()
def test_a_vit_is_fitted_in_every_block_whatever_the_size_of_batches():
    torch.manual_seed(0)
    x, found = torch.randn(24, 3, 8, 8), []
    for cuts in ([24], [10, 10, 4]):
        torch.manual_seed(0)
        net = vit().eval()
        weights = {name: p for name, p in net.named_parameters() if name.startswith("blocks") and p.dim() == 2}
        torch.manual_seed(1)
        mask = MaskSet({name: torch.rand_like(weight) > 0.5 for name, weight in weights.items()})
        compensation = compensate_(net, weights, mask, [(part, None) for part in x.split(cuts)])
        assert (len(compensation.fits), compensation.left) == (8, ())
        found.append(net(x))
    assert torch.allclose(*found, atol=1e-4)
