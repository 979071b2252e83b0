"""Outcomes of an evaluation, one entry per image in dataset order, whatever the number of ranks.

Nothing is summed before all ranks are gathered, so any number of ranks computes the same to the last bit.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from vit_rsst.training.counters import ranks


@dataclass(frozen=True)
class Outcomes:
    """One entry per image; all of shape (images,).

    Attributes:
        labels: the true class.
        predictions: the class with the largest logit, the first of equals.
        ranks: number of classes ahead of the true one; 0 is a hit.
        losses: cross-entropy in nats.
        confidences: probability of the predicted class, float64.
    """

    labels: np.ndarray
    predictions: np.ndarray
    ranks: np.ndarray
    losses: np.ndarray
    confidences: np.ndarray

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Outcomes":
        """Of one batch: logits (batch, classes), labels (batch,)."""
        logits = logits.float()
        probabilities = logits.double().softmax(1)
        found = (
            labels,
            logits.argmax(1),
            ranks(logits, labels),
            F.cross_entropy(logits, labels, reduction="none"),
            probabilities.amax(1),
        )
        return cls(*(tensor.cpu().numpy() for tensor in found))

    @classmethod
    def joined(cls, parts: Iterable["Outcomes"]) -> "Outcomes":
        parts = list(parts)
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def __len__(self) -> int:
        return len(self.labels)

    def top(self, number: int) -> float:
        """Images whose true class is among the first `number`, in percent."""
        return float(100.0 * np.count_nonzero(self.ranks < number) / len(self))

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(np.mean(self.losses, dtype=np.float64))


@torch.no_grad()
def outcomes(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], rank: int = 0, num_processes: int = 1
) -> tuple[Outcomes, float]:
    """Outcomes of all images on all ranks, and images per second; collective, the same on every rank.

    Args:
        net: returns logits (batch, classes); in evaluation mode.
        batches: this rank's part of the split, which follows those of the ranks before it.

    Raises:
        ValueError: no rank has an image.
    """
    found, began, warm = [], time.perf_counter(), 0
    for turn, (images, labels) in enumerate(batches):
        if not len(labels):  # none of its images can be decoded
            continue
        found.append(((rank, turn), Outcomes.of(net(images), labels)))
        if not warm:  # the first pass allocates: it counts only if it is the only one
            first, warm = time.perf_counter(), len(labels)
    now, done = time.perf_counter(), sum(len(part) for _, part in found)
    rate = (done - warm) / (now - first) if done > warm else done / max(now - began, 1e-9)
    if num_processes > 1:
        found, rates = gather_object(found), gather_object([rate])
        rate = sum(rates)
    if not found:
        raise ValueError("the split is empty")
    return Outcomes.joined(part for _, part in sorted(found, key=lambda item: item[0])), rate


def most_confused(confusion: Sequence[Sequence[int]], most: int = 5) -> list[tuple[int, int, int]]:
    """The most frequent confusions, (images, true label, predicted label), of a matrix `confusion[true][predicted]`."""
    pairs = [
        (count, true, predicted)
        for true, row in enumerate(confusion)
        for predicted, count in enumerate(row)
        if true != predicted and count
    ]
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:most]
