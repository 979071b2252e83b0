"""Knowledge distillation: a teacher's predictions as a second target (Hinton, Vinyals, Dean 2015)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_rsst import shards


@dataclass(frozen=True)
class Distillation:
    """Adds a teacher's loss to that of the labels.

    Attributes:
        teacher: returns the teacher, in evaluation mode on the device, maybe sharded; None: none in this round.
        weight: α, the weight of the teacher's loss.
        temperature: T.
        autocast: the teacher's precision.
        source: sha256 of the teacher's file if it comes from another run; None: this run's own dense model.
    """

    teacher: Callable[[], nn.Module | None]
    weight: float
    temperature: float
    autocast: Callable[[], AbstractContextManager]
    source: str | None = None

    def __call__(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """(1 − α) · loss + α · T² · KL(teacher ‖ student), both softened by T; `loss` unchanged without a teacher."""
        net = self.teacher()
        if net is None:
            return loss
        with torch.no_grad(), self.autocast():
            teacher_logits = net(images).float()
        shards.reshard_(net)
        return (1.0 - self.weight) * loss + self.weight * divergence(logits, teacher_logits, self.temperature)


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(logits / T)), batch mean; T² keeps the gradient scale independent of T."""
    ours, theirs = (F.log_softmax(x / temperature, dim=1) for x in (logits, teacher_logits))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
