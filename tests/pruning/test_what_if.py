"""The what-if gap: the cost of a removal, measured on trained weights just before and after it, once per round."""

import copy
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import CPU, MEAN, STD, Toy, copied, images, train_rounds, vit

from vit_rsst.data.loaders import evaluation_batches
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Penalty
from vit_rsst.run.state import Run


class Evaluations:
    """Replaces `evaluate`: records when it is called and on which weights, and returns sums over them."""

    def __init__(self, run: Run):
        self.run, self.calls = run, []
        run.controller.evaluate = self

    def __call__(self) -> Mapping[str, float]:
        weights = copied(self.run.controller.weights)
        p = self.run.progress
        self.calls.append(((p.round, p.round_step), weights))
        return {"top1": size(weights), "loss": 1000 - 3 * size(weights)}


def size(weights: Mapping[str, Tensor]) -> float:
    return sum(float(w.double().abs().sum()) for w in weights.values())


def size_where(weights: Mapping[str, Tensor], mask: MaskSet) -> float:
    return size({name: w * mask[name] for name, w in weights.items()})


@pytest.mark.parametrize("rewind_epoch", [None, 0, 1])
def test_imp_is_measured_twice_a_round_on_the_trained_weights_before_they_are_rewound(tmp_path, rewind_epoch):
    run = Toy(Imp(), rewind_epoch=rewind_epoch, round_epochs=(2, 1, 1)).make(tmp_path)
    evaluations = Evaluations(run)
    reports = []
    end_round = run.controller.end_round
    run.controller.end_round = lambda: reports.append((end_round(), copied(run.controller.weights))) or reports[-1][0]
    train_rounds(run)
    assert [where for where, _ in evaluations.calls] == [(1, 0), (1, 0), (2, 0), (2, 0)]
    assert reports[0][0].what_if_gap is None
    for round in (1, 2):
        report, trained = reports[round][0], reports[round - 1][1]
        (_, before), (_, after) = evaluations.calls[2 * round - 2 : 2 * round]
        assert size(before) == size(trained), "the weights at the end of the previous round"
        assert report.what_if_gap == size(before) - size(after) > 0
        assert report.what_if_loss_gap == pytest.approx(3 * (size(before) - size(after)))
        assert all((after[name] == before[name])[after[name] != 0].all() for name in after)


def test_rsst_is_measured_twice_a_round_at_its_removal(tmp_path):
    method = Rsst(Penalty(residual=0.1, window=(0.0, 0.5)), remove_at=0.75)
    run = Toy(method, round_epochs=(1, 2, 2), final_sparsity=0.75).make(tmp_path)
    evaluations = Evaluations(run)
    condemned, reports = [], []
    begin_round, end_round = run.controller.begin_round, run.controller.end_round

    def begin(round: int) -> bool:
        began = begin_round(round)
        condemned.append(run.controller.condemned)
        return began

    run.controller.begin_round = begin
    run.controller.end_round = lambda: reports.append(end_round()) or reports[-1]
    train_rounds(run)
    assert [where for where, _ in evaluations.calls] == [(1, 5), (1, 5), (2, 5), (2, 5)]  # within the sixth step of 8
    for round in (1, 2):
        (_, before), (_, after) = evaluations.calls[2 * round - 2 : 2 * round]
        gap = size_where(before, condemned[round])
        assert gap > 0
        assert reports[round].what_if_gap == pytest.approx(gap, rel=1e-9)
        assert reports[round].what_if_loss_gap == pytest.approx(3 * gap, rel=1e-9)
        assert size_where(after, condemned[round]) == 0
        alive = MaskSet({name: w != 0 for name, w in after.items()})
        ratio = (gap / condemned[round].num_alive) / (size_where(before, alive) / alive.num_alive)
        assert reports[round].condemned_ratio == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("scheduled", [Gmp(interval=2), Rsst(remove_at=0.0)])
def test_nothing_is_measured_if_nothing_is_removed_between_rounds(tmp_path, scheduled):
    run = Toy(scheduled, round_epochs=(3,)).make(tmp_path)
    evaluations = Evaluations(run)
    train_rounds(run)
    assert evaluations.calls == []
    assert run.controller.end_round().what_if_gap is None


def by_hand(net: nn.Module) -> tuple[float, float]:
    """top-1 and loss on the validation images, in one batch and in float64."""
    val = images(100, seed=2)
    net = copy.deepcopy(net).double().eval()
    [(x, y)] = evaluation_batches(val, len(val), rank=0, num_processes=1, device=CPU, mean=MEAN, std=STD)
    with torch.no_grad():
        logits = net(x.double())
    return 100 * float((logits.argmax(1) == y).double().mean()), float(F.cross_entropy(logits, y))


@pytest.mark.parametrize("method", [Imp(), Rsst(Penalty(residual=0.5, window=(0.0, 0.5)), remove_at=0.5)])
def test_the_gap_equals_the_difference_of_two_manual_evaluations(tmp_path, method):
    run = Toy(method, network=vit, lr=5e-3, steps_per_epoch=8, round_epochs=(10, 1), final_sparsity=0.97).make(tmp_path)
    nets = []
    evaluate = run.controller.evaluate
    run.controller.evaluate = lambda: nets.append(copy.deepcopy(run.net)) or evaluate()
    train_rounds(run)
    dense, sparse = nets
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            expected = weight * run.controller.mask[name] if name in run.controller.weights else weight
            assert torch.equal(sparse.get_parameter(name), expected), "the two differ by the removal only"
    (top1_before, loss_before), (top1_after, loss_after) = by_hand(dense), by_hand(sparse)
    report = run.controller.end_round()
    assert report.what_if_gap == pytest.approx(top1_before - top1_after, abs=1e-9)
    assert report.what_if_loss_gap == pytest.approx(loss_after - loss_before, abs=1e-5)
    assert abs(report.what_if_loss_gap) > 1e-3
    if isinstance(method, Imp):
        assert report.what_if_gap > 0


def test_the_removal_costs_rsst_less_than_imp(tmp_path):
    """The purpose of rsst: same task, budget and densities; sums over three rounds."""
    gaps = {}
    for name, method in (("imp", Imp()), ("rsst", Rsst(Penalty(window=(0.0, 0.3)), remove_at=0.3))):
        toy = Toy(method, lr=5e-3, steps_per_epoch=8, round_epochs=(10, 10, 10, 10), final_sparsity=0.97, seed=1)
        run = toy.make(tmp_path / name)
        reports = []
        end_round = run.controller.end_round
        run.controller.end_round = lambda e=end_round, r=reports: r.append(e()) or r[-1]
        train_rounds(run)
        gaps[name] = [(r.what_if_gap, r.what_if_loss_gap) for r in reports[1:]]
    imp, rsst = ([sum(column) for column in zip(*gaps[name], strict=True)] for name in ("imp", "rsst"))
    assert imp[0] > 5 > 1 >= abs(rsst[0])
    assert imp[1] > 0.5 > 0.01 > abs(rsst[1])
