"""Movement scores: −Σ w · g over the training steps of a round (Sanh et al. 2020), of all weights at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vit_rsst import shards
from vit_rsst.pruning.foreach import products, subtract_


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
    def note(
        self, weights: Mapping[str, nn.Parameter], *others: tuple[Sequence[Tensor], Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """Takes w · g before the step, while gradients are neither masked nor clipped.

        Args:
            weights: with gradients averaged over ranks and micro-batches; those without one do not move.
            others: pairs of lists whose products are returned; the same kernel makes them.
        """
        learnt = {name: weight for name, weight in weights.items() if weight.grad is not None}
        own = tuple(shards.locals_of(tensors) for tensors in (learnt.values(), (w.grad for w in learnt.values())))
        moved, *found = products(own, *others)
        self._moved = dict(zip(learnt, moved, strict=True))
        return found

    @torch.no_grad()
    def add_(self, skipped: Tensor | None) -> None:
        """Subtracts what was noted from the scores.

        Args:
            skipped: 1.0 on the weights' device if the optimizer skipped the step, which then adds nothing, else 0.0;
                None: not skipped.
        """
        noted, self._moved = self._moved, {}
        subtract_(shards.locals_of(self.scores[name] for name in noted), list(noted.values()), skipped=skipped)

    def load_(self, scores: Mapping[str, Tensor]) -> None:
        """Copies scores of whole weights; each rank the rows that it holds."""
        for name, score in self.scores.items():
            shards.load_(score, scores[name])
