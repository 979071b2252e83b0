"""MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019) of pairs of images, drawn for a whole global batch.

A pair lies within one micro-batch whatever the number of processes and the accumulation, and its numbers are drawn for
its place in the global batch: a recipe means the same however its batch is divided.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vit_rsst.data.transforms import inside, travel


@dataclass(frozen=True)
class Mixing:
    """Each image is mixed with its partner by a share that the pair has for itself; timm's mode `pair`.

    Attributes:
        mixup, cutmix: α of the Beta distribution that the share is drawn from; 0: not used.
        prob: probability that a pair is mixed at all.
        switch_prob: that it is by CutMix where both are used.
        repeats: how often an image comes, one time after the other: the partner is so many places away.
    """

    num_classes: int
    mixup: float
    cutmix: float
    prob: float
    switch_prob: float
    repeats: int = 1

    @property
    def group(self) -> int:
        """Images that must stay together: a micro-batch is a multiple of it."""
        return 2 * self.repeats

    def draw(self, batch: int, seed: int) -> Tensor:
        """The random numbers of a global batch on the CPU, (batch, 4): share, is CutMix, row and column (0 … 1)."""
        rng, pairs = np.random.default_rng(seed), batch // self.group * self.repeats
        is_mixed, switch, rows, columns = rng.random((4, pairs))
        shares = [rng.beta(alpha, alpha, pairs) if alpha else np.ones(pairs) for alpha in (self.mixup, self.cutmix)]
        is_cut = (switch < self.switch_prob) if self.mixup and self.cutmix else np.full(pairs, self.cutmix > 0)
        share = np.where(is_mixed < self.prob, np.where(is_cut, shares[1], shares[0]), 1.0)
        numbers = torch.from_numpy(np.stack([share, is_cut, rows, columns], 1).astype(np.float32))
        both = numbers.view(-1, 1, self.repeats, 4).expand(-1, 2, -1, -1).reshape(-1, 4)
        alone = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(batch - len(both), 4)
        return torch.cat([both, alone])

    def __call__(self, images: Tensor, labels: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes images (batch, channels, height, width).

        Where corrupt images leave an incomplete group at the end, it stays as it is.

        Args:
            drawn: numbers of these images, from `draw`.

        Returns:
            The images, and the shares of the classes in each, float (batch, classes).
        """
        shares = one_hot(labels, self.num_classes).to(images.dtype)
        whole = len(labels) // self.group * self.group
        if not whole:
            return images, shares
        numbers = travel(self._boxes(drawn[:whole], *images.shape[2:]), images.device)
        pixels, of_label, boxes = numbers[:, 0].view(-1, 1, 1, 1), numbers[:, 1:2], numbers[:, 2:]
        ours, theirs = images[:whole], self._partners(images[:whole])
        mixed = torch.where(inside(boxes, *images.shape[2:]), theirs, ours * pixels + theirs * (1.0 - pixels))
        own = shares[:whole]
        own = own * of_label + self._partners(own) * (1.0 - of_label)
        return torch.cat([mixed, images[whole:]]), torch.cat([own, shares[whole:]])

    def _partners(self, values: Tensor) -> Tensor:
        return values.reshape(-1, 2, self.repeats, *values.shape[1:]).flip(1).view(values.shape)

    @staticmethod
    def _boxes(drawn: Tensor, height: int, width: int) -> Tensor:
        """(batch, 6): share of its own pixels outside of the box, share of its label, top, bottom, left, right."""
        share, is_cut, rows, columns = drawn.double().unbind(1)
        side = (1.0 - share).clamp(min=0.0).sqrt() * is_cut
        edges = []
        for place, size in ((rows, height), (columns, width)):
            half, centre = (side * size).floor() // 2, (place * size).floor()
            edges += [(centre - half).clamp(0, size), (centre + half).clamp(0, size)]
        top, bottom, left, right = edges
        of_label = torch.where(is_cut > 0, 1.0 - (bottom - top) * (right - left) / (height * width), share)
        return torch.stack([torch.where(is_cut > 0, 1.0, share), of_label, *edges], 1).float()
