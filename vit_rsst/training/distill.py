"""Distillation: the answers of a teacher as a second target (Hinton, Vinyals, Dean 2015)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Distillation:
    """Joins a teacher to the loss of the labels.

    Attributes:
        teacher: the network to ask, in evaluation mode on the device; None: there is none in this round.
        weight: α, the share of the teacher.
        temperature: T.
        autocast: the precision in which it is asked.
        source: sha256 of the file of a teacher that another run left; None: it is this run's own.
    """

    teacher: Callable[[], nn.Module | None]
    weight: float
    temperature: float
    autocast: Callable[[], AbstractContextManager]
    source: str | None = None

    def __call__(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """(1 − α) · loss + α · T² · KL(teacher ‖ student), both softened by T; the loss as it is without a teacher."""
        net = self.teacher()
        if net is None:
            return loss
        with torch.no_grad(), self.autocast():
            said = net(images).float()
        return (1.0 - self.weight) * loss + self.weight * divergence(logits, said, self.temperature)


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(logits / T)), mean over the batch; gradients keep their size over T."""
    ours, theirs = (F.log_softmax(x / temperature, dim=1) for x in (logits, teacher_logits))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
