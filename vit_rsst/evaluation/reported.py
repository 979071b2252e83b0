"""`evaluate.Metric` classes for reported results; scikit-learn and numpy do the arithmetic, nothing is downloaded.

Instantiated directly with `keep_in_memory=True`: `evaluate.load` would look for a script on the Hub.
"""

from collections.abc import Mapping

import datasets
import evaluate
import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from vit_rsst.evaluation.outcomes import Outcomes

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""


def _info(about: str, citation: str, inputs: str, features: Mapping[str, str]) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=about,
        citation=citation,
        inputs_description=inputs,
        features=datasets.Features({name: datasets.Value(kind) for name, kind in features.items()}),
    )


class ClassificationReport(evaluate.Metric):
    """accuracy (fraction); precision, recall and f1 by class, macro and weighted; support; confusion[true][predicted].

    What has no denominator, such as the recall of a class without images, is 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Classification report: accuracy, precision, recall and F1, and the confusion matrix.",
            "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 2011",
            "predictions and references: class numbers; num_classes: how many there are.",
            {"predictions": "int64", "references": "int64"},
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


class CalibrationError(evaluate.Metric):
    """Expected calibration error (fraction) over bins of equal width, each without its lower bound, and the bins.

    The mean over all images of |share of hits − mean confidence| in the bin of each (Guo et al. 2017, eq. 3).
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Expected calibration error.",
            "Guo et al., On Calibration of Modern Neural Networks, ICML 2017",
            "predictions: probability of the predicted class; references: whether it is the true one; bins: how many.",
            {"predictions": "float64", "references": "bool"},
        )

    def _compute(self, predictions: list[float], references: list[bool], bins: int = BINS) -> dict:
        confidences, hits = np.asarray(predictions), np.asarray(references, dtype=float)
        bounds = np.linspace(0.0, 1.0, bins + 1)
        bin_of = np.clip(np.searchsorted(bounds, confidences, side="left") - 1, 0, bins - 1)
        count = np.bincount(bin_of, minlength=bins)
        sums = [np.bincount(bin_of, weights=values, minlength=bins) for values in (hits, confidences)]
        accuracy, confidence = (total / np.maximum(count, 1) for total in sums)
        return {
            "ece": float((count * np.abs(accuracy - confidence)).sum() / count.sum()),
            "calibration": {
                "images": count.tolist(),
                "accuracy": accuracy.tolist(),
                "confidence": confidence.tolist(),
            },
        }


class MeanScores(evaluate.Metric):
    """top1 and top5 in percent, loss in nats: means over images."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Top-1 and top-5 accuracy and mean cross-entropy.",
            "",
            "predictions: how many classes come before the true one; references: its cross-entropy.",
            {"predictions": "int64", "references": "float64"},
        )

    def _compute(self, predictions: list[int], references: list[float]) -> dict:
        rank = np.asarray(predictions)
        shares = {f"top{k}": float(100.0 * np.count_nonzero(rank < k) / len(rank)) for k in (1, 5)}
        return shares | {"loss": float(np.mean(references))}


def report(found: Outcomes, num_classes: int) -> dict:
    """Everything that is reported of an evaluation, as plain data."""
    hits = found.predictions == found.labels
    parts = (
        (MeanScores, found.ranks, found.losses.astype(np.float64), {}),
        (CalibrationError, found.confidences, hits, {}),
        (ClassificationReport, found.predictions, found.labels, {"num_classes": num_classes}),
    )
    result = {}
    for metric, predictions, references, options in parts:
        result |= metric(keep_in_memory=True).compute(predictions=predictions, references=references, **options)
    return result
