"""Movement scores: −Σ w · g over the training steps of a round (Sanh et al. 2020), of all weights at once.

A step costs two kernels, whatever the number of weights, and never waits for the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from vit_rsst import shards


@dataclass
class Movement:
    """The scores of a round.

    Attributes:
        scores: weight name → shaped, typed and sharded like the weight; higher means keep.
    """

    scores: dict[str, Tensor]
    _moved: dict[str, Tensor] = field(default_factory=dict, repr=False)  # w · g of the step under way

    @classmethod
    def zeros(cls, weights: Mapping[str, Tensor]) -> "Movement":
        return cls({name: torch.zeros_like(weight) for name, weight in weights.items()})

    @torch.no_grad()
    def note(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Takes w · g before the step, while gradients are neither masked nor clipped.

        Args:
            weights: with gradients averaged over ranks and micro-batches; those without one do not move.
        """
        learnt = {name: weight for name, weight in weights.items() if weight.grad is not None}
        own = [shards.locals_of(tensors) for tensors in (learnt.values(), (w.grad for w in learnt.values()))]
        self._moved = dict(zip(learnt, torch._foreach_mul(*own), strict=True)) if learnt else {}

    @torch.no_grad()
    def add_(self, skipped: Tensor | None) -> None:
        """Subtracts what was noted from the scores.

        Args:
            skipped: 1.0 on the weights' device if the optimizer skipped the step, which then adds nothing, else 0.0;
                None: not skipped.
        """
        noted, self._moved = self._moved, {}
        scores = shards.locals_of(self.scores[name] for name in noted)
        moved = [_laid_out_like(score, one) for score, one in zip(scores, noted.values(), strict=True)]
        # SGD at learning rate 1 is a subtraction, and the one that can be skipped on the device: a product by 0 would
        # not do, as gradients of a skipped step are NaN or infinite.
        for (ours, theirs), _ in _group_tensors_by_device_and_dtype([scores, moved]).values():
            torch._fused_sgd_(
                ours, theirs, [], weight_decay=0.0, momentum=0.0, lr=1.0, dampening=0.0, nesterov=False, maximize=False,
                is_first_step=False, grad_scale=None, found_inf=skipped,
            )  # fmt: skip

    def load_(self, scores: Mapping[str, Tensor]) -> None:
        """Copies scores of whole weights; each rank the rows that it holds."""
        for name, score in self.scores.items():
            shards.load_(score, scores[name])


def _laid_out_like(score: Tensor, moved: Tensor) -> Tensor:
    """A fused step reads memory in order, whatever the strides are."""
    return moved if moved.stride() == score.stride() else torch.empty_like(score).copy_(moved)
