"""Scores that `vit-rsst evaluate` reports, by scikit-learn and numpy; nothing is downloaded.

The classification report is a metric of `evaluate`: `evaluate.load` takes the path of this file.
"""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from vit_rsst.evaluation.outcomes import Outcomes

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""


class ClassificationReport(evaluate.Metric):
    """accuracy (fraction); precision, recall and f1 by class, macro and weighted; support; confusion[true][predicted].

    A score without a denominator, such as the recall of a class without images, is 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Classification report: accuracy, precision, recall and F1, and the confusion matrix.",
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 2011",
            inputs_description="predictions and references: class numbers; num_classes: how many there are.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int], num_classes: int) -> dict:
        labels = np.arange(num_classes)
        found = precision_recall_fscore_support(references, predictions, labels=labels, zero_division=0.0)
        by_class, support = dict(zip(("precision", "recall", "f1"), found, strict=False)), found[3]
        means = {f"macro_{name}": float(values.mean()) for name, values in by_class.items()}
        means |= {f"weighted_{name}": float(np.average(v, weights=support)) for name, v in by_class.items()}
        return {
            "accuracy": float(np.mean(np.asarray(references) == np.asarray(predictions))),
            **means,
            **{name: values.tolist() for name, values in by_class.items()},
            "support": support.tolist(),
            "confusion": confusion_matrix(references, predictions, labels=labels).tolist(),
        }


def calibration(confidences: np.ndarray, hits: np.ndarray, bins: int = BINS) -> dict:
    """Expected calibration error (Guo et al. 2017, eq. 3): the mean over images of
    |accuracy − confidence| in the bin of each.

    Args:
        confidences: probability of each predicted class, (images,).
        hits: whether it is the true class, (images,).
        bins: of equal width over [0, 1], each without its lower bound.

    Returns:
        `ece`, a fraction, and the bins as `calibration`.
    """
    bounds = np.linspace(0.0, 1.0, bins + 1)
    bin_of = np.clip(np.searchsorted(bounds, confidences, side="left") - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    sums = [np.bincount(bin_of, weights=values, minlength=bins) for values in (hits, confidences)]
    accuracy, confidence = (total / np.maximum(count, 1) for total in sums)
    return {
        "ece": float((count * np.abs(accuracy - confidence)).sum() / count.sum()),
        "calibration": {"images": count.tolist(), "accuracy": accuracy.tolist(), "confidence": confidence.tolist()},
    }


def scores(found: Outcomes, num_classes: int) -> dict:
    """Every reported score as plain data: top1 and top5 in percent, loss in nats, calibration, report by class."""
    report = ClassificationReport(keep_in_memory=True)  # `evaluate.load` would copy this file into a cache
    return {
        "top1": found.top(1),
        "top5": found.top(5),
        "loss": found.loss,
        **calibration(found.confidences, found.predictions == found.labels),
        **report.compute(predictions=found.predictions, references=found.labels, num_classes=num_classes),
    }
