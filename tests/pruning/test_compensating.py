"""Compensation in a run: at every removal, in the average too, before the what-if gap is read."""

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn
from toys import Toy, images, train_rounds, vit

from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.methods.refill import Refill
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Penalty
from vit_rsst.run.state import Run

RSST = Rsst(Penalty("linear", residual=0.5, window=(0.25, 0.5)), remove_at=0.5)
TOYS = {
    "imp": Toy(Imp(), network=vit, round_epochs=(2, 2, 2)),
    "imp by unit": Toy(Imp(), network=vit, granularity="head+neuron", final_sparsity=0.5, round_epochs=(2, 2, 2)),
    "refill": Toy(
        Refill(), network=vit, granularity="neuron", criterion="survivors", final_sparsity=0.5, round_epochs=(2, 2, 2)
    ),
    "rsst": Toy(RSST, network=vit, final_sparsity=0.7, round_epochs=(2, 2, 2)),
    "gmp": Toy(Gmp((0.1, 0.9), 5), network=vit, final_sparsity=0.7, curve="cubic", round_epochs=(6,)),
}
REMOVALS = {"imp": 2, "imp by unit": 2, "refill": 2, "rsst": 2, "gmp": 4}


@dataclass
class Fits:
    """Stands before the fit of a run, and keeps the network as it was before each, as it is after it, and the mask."""

    run: Run
    calls: list[tuple[nn.Module, nn.Module, MaskSet]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._fit, self.run.controller.compensate = self.run.controller.compensate, self

    def __call__(self, mask: MaskSet) -> None:
        before = copy.deepcopy(self.run.net)
        self._fit(mask)
        self.calls.append((before, copy.deepcopy(self.run.net), mask))


@torch.no_grad()
def error(found: nn.Module, target: nn.Module) -> float:
    """Of the logits on the calibration images."""
    x = (images(40, seed=3).images.float() / 255 - 0.5) / 0.25
    return float((found.eval()(x) - target.eval()(x)).square().sum())


def masked(net: nn.Module, mask: MaskSet) -> nn.Module:
    net = copy.deepcopy(net)
    for name, alive in mask.masks.items():
        net.get_parameter(name).data.masked_fill_(~alive, 0.0)
    return net


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("kind", TOYS)
def test_every_removal_is_made_up_for_in_weights_and_average(tmp_path, kind, decay):
    run = replace(TOYS[kind], compensates=True, ema_decay=decay).make(tmp_path)
    fits = Fits(run)
    train_rounds(run)
    each = 1 if decay is None else 2  # the weights, then their average
    assert len(fits.calls) == each * REMOVALS[kind]
    errors = [(error(after, before), error(masked(before, mask), before)) for before, after, mask in fits.calls]
    of_fits, of_masks = (sum(one[i] for one in errors) for i in range(2))
    assert of_fits < 0.7 * of_masks
    for _, after, mask in fits.calls:
        assert not any((after.get_parameter(name) * ~alive).any() for name, alive in mask.masks.items())
    assert fits.calls[-1][2] == run.controller.mask
    assert run.controller.has_zeros


def test_the_gap_of_a_removal_is_read_after_the_fit(tmp_path):
    seen: list[dict[str, Tensor]] = []
    run = replace(TOYS["imp"], compensates=True, ema_decay=0.5).make(tmp_path)
    fits, score = Fits(run), run.controller.evaluate

    def evaluate() -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in run.net.state_dict().items()})
        return score()

    run.controller.evaluate = evaluate
    train_rounds(run)
    for number in range(2):
        before, after, _ = fits.calls[2 * number + 1]  # of the average, which is what is evaluated
        for place, net in ((2 * number, before), (2 * number + 1, after)):
            assert all(torch.equal(seen[place][name], tensor) for name, tensor in net.state_dict().items())
