"""Counters: top-1, top-5 and losses against values calculated by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_rsst.training.counters import RunningLoss, score

CPU = torch.device("cpu")

# Six classes. The true class is ranked first, third and sixth.
LOGITS = torch.tensor(
    [
        [5.0, 4.0, 3.0, 2.0, 1.0, 0.0],
        [5.0, 4.0, 3.0, 2.0, 1.0, 0.0],
        [5.0, 4.0, 3.0, 2.0, 1.0, 0.0],
    ]
)
LABELS = torch.tensor([0, 2, 5])


def test_top1_top5_and_loss_by_hand():
    found = score(nn.Identity(), [(LOGITS, LABELS)], CPU)
    partition = math.log(sum(math.exp(i) for i in range(6)))
    assert found["top1"] == pytest.approx(100 / 3)
    assert found["top5"] == pytest.approx(200 / 3)
    assert found["loss"] == pytest.approx(((partition - 5) + (partition - 3) + partition) / 3, rel=1e-6)


def test_batches_of_unequal_size_are_weighted_by_samples():
    whole = score(nn.Identity(), [(LOGITS, LABELS)], CPU)
    parts = score(nn.Identity(), [(LOGITS[:1], LABELS[:1]), (LOGITS[1:], LABELS[1:])], CPU)
    assert parts == pytest.approx(whole, rel=1e-6)


def test_with_fewer_than_five_classes_top5_is_100_percent():
    found = score(nn.Identity(), [(LOGITS[:, :3], torch.tensor([0, 1, 2]))], CPU)
    assert (found["top1"], found["top5"]) == (pytest.approx(100 / 3), 100.0)


def test_bf16_losses_are_summed_in_higher_precision():
    logits = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(2000) % 4
    found = score(nn.Identity(), [(logits, labels)], CPU)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_runs_in_eval_mode_and_restores_the_mode(training):
    modes = []

    class Watched(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(self.training)
            return x

    model = nn.Sequential(Watched())
    model.train(training)
    score(model, [(LOGITS, LABELS)], CPU)
    assert modes == [False]
    assert model.training is training
    assert model[0].training is training


def test_scoring_leaves_no_gradient():
    model = nn.Linear(6, 6)
    score(model, [(LOGITS, LABELS)], CPU)
    assert model.weight.grad is None


def test_an_empty_split_is_rejected():
    with pytest.raises(ValueError, match="empty"):
        score(nn.Identity(), [], CPU)


def add(meter: RunningLoss, hits: int, size: int, loss: float) -> None:
    logits = torch.zeros(size, 2)
    logits[:, 0] = 1.0
    labels = (torch.arange(size) >= hits).long()
    meter.add(logits, labels, torch.tensor(loss, requires_grad=True))


def test_the_running_mean_weights_batches_by_samples():
    meter = RunningLoss(CPU)
    add(meter, hits=1, size=2, loss=0.5)
    add(meter, hits=1, size=1, loss=2.0)
    found = meter.compute_and_reset()
    assert found == {"loss": pytest.approx((2 * 0.5 + 2.0) / 3), "top1": pytest.approx(200 / 3)}


def test_a_reset_clears_the_sums_and_an_empty_mean_is_zero():
    meter = RunningLoss(CPU)
    add(meter, hits=2, size=2, loss=9.0)
    meter.compute_and_reset()
    assert meter.compute_and_reset() == {"loss": 0.0, "top1": 0.0}
    add(meter, hits=0, size=4, loss=1.0)
    assert meter.compute_and_reset() == {"loss": 1.0, "top1": 0.0}


def test_a_million_small_losses_are_not_lost_in_a_large_sum():
    meter = RunningLoss(CPU)
    meter.load([1e9, 0.0, 1e9], is_main=True)
    for _ in range(1000):
        add(meter, hits=0, size=1, loss=1.5)
    samples, _, total = meter.gather_(is_main=True)
    assert (samples, total) == (1e9 + 1000, 1e9 + 1500)


def test_gathered_sums_can_be_loaded_and_continued():
    undisturbed, first, second = RunningLoss(CPU), RunningLoss(CPU), RunningLoss(CPU)
    for meter in (undisturbed, first):
        add(meter, hits=1, size=3, loss=0.25)
    sums = first.gather_(is_main=True)
    assert sums == [3.0, 1.0, 0.75]
    second.load(sums, is_main=True)
    for meter in (undisturbed, first, second):
        add(meter, hits=2, size=2, loss=1.0)
    expected = undisturbed.compute_and_reset()
    assert first.compute_and_reset() == expected
    assert second.compute_and_reset() == expected


def test_only_the_main_rank_keeps_gathered_sums():
    meter = RunningLoss(CPU)
    add(meter, hits=1, size=3, loss=0.25)
    meter.gather_(is_main=False)
    assert meter.compute_and_reset()["loss"] == 0.0
    meter.load([3.0, 1.0, 0.75], is_main=False)
    assert meter.compute_and_reset()["loss"] == 0.0
