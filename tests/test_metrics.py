"""Reported scores against hand-calculated answers and torchmetrics."""

import itertools

import evaluate
import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as reference
from torch import Tensor, nn

from vit_rsst.evaluation.outcomes import Outcomes, outcomes
from vit_rsst.evaluation.reported import ClassificationReport, calibration, scores
from vit_rsst.evaluation.reported import __file__ as reported_file
from vit_rsst.training import counters


def reported(logits: list[list[float]] | Tensor, labels: list[int] | Tensor) -> dict:
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    return scores(Outcomes.of(logits, labels), logits.shape[1])


def drawn(case: str) -> tuple[Tensor, Tensor]:
    """Logits (images, 7) and labels."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 7, generator=generator) * 2
    labels = torch.randint(0, 7, (200,), generator=generator)
    if case == "a class without images":
        labels[labels == 4] = 2
    if case == "a class that is never predicted":
        logits[:, 1] = -20.0
    if case == "one class alone":
        labels[:] = 5
    if case == "all right":
        labels = logits.argmax(1)
    if case == "all wrong":
        labels = (logits.argmax(1) + 1) % 7
    if case == "one image":
        return logits[:1], labels[:1]
    return logits, labels


CASES = [
    "random",
    "a class without images",
    "a class that is never predicted",
    "one class alone",
    "all right",
    "all wrong",
    "one image",
]


@pytest.mark.parametrize("case", CASES)
def test_scores_match_torchmetrics(case):
    logits, labels = drawn(case)
    found, options = reported(logits, labels), {"num_classes": 7}
    for name in ("precision", "recall", "f1"):
        theirs = getattr(reference, f"multiclass_{name if name != 'f1' else 'f1_score'}")
        expected = theirs(logits, labels, average="none", zero_division=0, **options)
        assert found[name] == pytest.approx(expected.tolist(), abs=1e-6), name
        # torchmetrics leaves classes without images and predictions out of its macro mean; here all count.
        assert found[f"macro_{name}"] == pytest.approx(float(expected.mean()), abs=1e-6)
        expected = theirs(logits, labels, average="weighted", zero_division=0, **options)
        assert found[f"weighted_{name}"] == pytest.approx(float(expected), abs=1e-6)
    for k in (1, 5):
        expected = reference.multiclass_accuracy(logits, labels, average="micro", top_k=k, **options)
        assert found[f"top{k}"] == pytest.approx(100 * float(expected), abs=1e-4)
    assert found["confusion"] == reference.multiclass_confusion_matrix(logits, labels, **options).tolist()
    expected = reference.multiclass_calibration_error(logits.softmax(1), labels, n_bins=15, **options)
    assert found["ece"] == pytest.approx(float(expected), abs=1e-6)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits.double(), labels)), rel=1e-6)
    assert found["accuracy"] == pytest.approx(found["top1"] / 100)


def test_a_report_calculated_by_hand():
    # True 0 0 0 1 1 2, predicted 0 0 1 1 2 2: one image of three classes is not there.
    found = ClassificationReport(keep_in_memory=True).compute(
        predictions=[0, 0, 1, 1, 2, 2], references=[0, 0, 0, 1, 1, 2], num_classes=4
    )
    assert found["confusion"] == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert found["precision"] == pytest.approx([1, 1 / 2, 1 / 2, 0])
    assert found["recall"] == pytest.approx([2 / 3, 1 / 2, 1, 0])
    assert found["f1"] == pytest.approx([4 / 5, 1 / 2, 2 / 3, 0])
    assert found["support"] == [3, 2, 1, 0]
    assert found["macro_f1"] == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 4)
    assert found["weighted_recall"] == pytest.approx(found["accuracy"]) == pytest.approx(4 / 6)


def test_the_report_is_a_metric_that_evaluate_loads(tmp_path, monkeypatch):
    for name in ("HF_MODULES_CACHE", "HF_EVALUATE_CACHE"):
        monkeypatch.setattr(evaluate.config, name, tmp_path)
    given = {"predictions": [0, 1, 1], "references": [0, 0, 1], "num_classes": 3}
    loaded = evaluate.load(reported_file, cache_dir=str(tmp_path))
    assert loaded.compute(**given) == ClassificationReport(keep_in_memory=True).compute(**given)


def test_calibration_error_calculated_by_hand():
    # Two bins, [0, 0.5] and (0.5, 1]: a bound belongs to the bin below it, and 1.0 to the last.
    found = calibration(np.array([0.5, 0.4, 0.8, 1.0]), np.array([True, False, True, False]), bins=2)
    assert found["calibration"]["images"] == [2, 2]
    assert found["calibration"]["accuracy"] == [0.5, 0.5]
    assert found["calibration"]["confidence"] == pytest.approx([0.45, 0.9])
    assert found["ece"] == pytest.approx(0.5 * 0.05 + 0.5 * 0.4)


def test_tied_logits_rank_the_lower_class_first():
    logits = torch.zeros(3, 7)
    labels = torch.tensor([0, 4, 5])
    assert counters.ranks(logits, labels).tolist() == [0, 4, 5]
    found = reported(logits, labels)
    assert found["top1"] == pytest.approx(100 / 3)  # class 0 alone
    assert found["top5"] == pytest.approx(200 / 3)  # classes 0 to 4
    assert found["confusion"][5][0] == 1
    counted = counters.score(nn.Identity(), [(logits, labels)], torch.device("cpu"))
    assert (counted["top1"], counted["top5"]) == pytest.approx((found["top1"], found["top5"]))


def test_fewer_than_five_classes_are_all_in_the_top_five():
    assert reported([[0.0, 1.0, 2.0]], [0])["top5"] == 100.0


def test_a_nan_logit_is_not_a_hit():
    logits = torch.tensor([[float("nan"), 1.0, 2.0], [float("nan"), 1.0, 2.0]])
    assert counters.ranks(logits, torch.tensor([0, 2])).tolist() == [3, 1]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_outcomes_are_in_image_order(num_processes, monkeypatch):
    images = torch.randn(23, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(23) % 7
    batches = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 23, 4)]
    starts = [rank * len(batches) // num_processes for rank in range(num_processes + 1)]
    shares = [batches[begin:end] for begin, end in itertools.pairwise(starts)]
    expected, _ = outcomes(nn.Identity(), batches)

    def parts(rank: int) -> list:
        return [((rank, i), Outcomes.of(x, y)) for i, (x, y) in enumerate(shares[rank])]

    def gathered(own: list) -> list:
        if isinstance(own[0], float):
            return own * num_processes
        return [part for rank in reversed(range(num_processes)) for part in parts(rank)]

    monkeypatch.setattr("vit_rsst.evaluation.outcomes.gather_object", gathered)
    found, rate = outcomes(nn.Identity(), shares[0], 0, num_processes)
    assert rate > 0
    for name in vars(expected):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert found.labels.tolist() == labels.tolist()


def test_an_empty_split_has_no_result():
    with pytest.raises(ValueError, match="the split is empty"):
        outcomes(nn.Identity(), [])
