"""Losses against hard or mixed labels, optionally corrected for class imbalance."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (batch, classes), labels (batch,) or their mixture (batch, classes)) → mean loss."""


def make_loss(kind: str, label_smoothing: float, class_counts: Tensor | None = None) -> Loss:
    """The loss named in a recipe.

    Args:
        kind: `cross_entropy`; `class_weighted`: images of class c have weight N / (C · n_c), with C non-empty classes;
            `balanced_softmax`: adds log n_c to the logit of class c (Ren et al. 2020, eq. 4), so that the raw logits
            fit balanced data.
        class_counts: training images per class, (classes,), on the device; unused by `cross_entropy`.
    """
    if kind == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    counts = class_counts.clamp(min=1).float()
    if kind == "balanced_softmax":
        prior = counts.log()
        return lambda logits, labels: F.cross_entropy(logits + prior, labels, label_smoothing=label_smoothing)
    present = class_counts > 0  # empty classes get weight 0, also under label smoothing
    weights = torch.where(present, class_counts.sum() / (present.sum() * counts), 0.0)

    def class_weighted(logits: Tensor, labels: Tensor) -> Tensor:
        # Divided by the number of images, not the sum of weights, so that micro-batches add up to the full batch.
        total = F.cross_entropy(logits, labels, weights, label_smoothing=label_smoothing, reduction="sum")
        return total / len(logits)

    return class_weighted
