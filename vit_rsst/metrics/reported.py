"""`evaluate.Metric` classes for reported results; scikit-learn does the arithmetic, nothing is downloaded.

Instantiated directly with `keep_in_memory=True`: `evaluate.load` would look for a script on the Hub.
"""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

_DESCRIPTION = "Classification report: accuracy, precision, recall and F1 per class, and the confusion matrix."


class ClassificationReport(evaluate.Metric):
    """accuracy, macro F1 (fractions); precision, recall, f1, support per class; confusion[true][predicted]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 2011",
            inputs_description="predictions and references: class numbers; num_classes: how many there are.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int], num_classes: int) -> dict:
        labels = np.arange(num_classes)
        precision, recall, f1, support = precision_recall_fscore_support(
            references, predictions, labels=labels, zero_division=0.0
        )
        return {
            "accuracy": float(np.mean(np.asarray(references) == np.asarray(predictions))),
            "macro_f1": float(f1.mean()),
            "precision": precision.tolist(),
            "recall": recall.tolist(),
            "f1": f1.tolist(),
            "support": support.tolist(),
            "confusion": confusion_matrix(references, predictions, labels=labels).tolist(),
        }
