"""The loss of a batch against its labels, plain or mixed, with or without a view of how rare each class is."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (batch, classes), labels (batch,) or their mixture (batch, classes)) → mean loss."""


def make_loss(kind: str, label_smoothing: float, class_counts: Tensor | None = None) -> Loss:
    """The loss that a recipe names.

    Args:
        kind: `cross_entropy`; `class_weighted`: an image counts N / (C · n_c), C classes having any;
            `balanced_softmax`: log n_c is added to the logit of class c (Ren et al. 2020, eq. 4), so that the logits
            themselves come out as for balanced data.
        class_counts: training images of each class, (classes,), on the device; not needed by `cross_entropy`.
    """
    if kind == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    counts = class_counts.clamp(min=1).float()
    if kind == "balanced_softmax":
        prior = counts.log()
        return lambda logits, labels: F.cross_entropy(logits + prior, labels, label_smoothing=label_smoothing)
    present = class_counts > 0  # a class without images has no say, also where labels are smoothed
    weights = torch.where(present, class_counts.sum() / (present.sum() * counts), 0.0)

    def class_weighted(logits: Tensor, labels: Tensor) -> Tensor:
        # Over the number of images and not the sum of their weights: equal parts of a batch stay equal parts.
        total = F.cross_entropy(logits, labels, weights, label_smoothing=label_smoothing, reduction="sum")
        return total / len(logits)

    return class_weighted
