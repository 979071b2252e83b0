"""MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a micro-batch, as timm does them."""

import numpy as np
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn.functional import one_hot


class Mixing:
    """Each image is mixed with the one that mirrors its place in the micro-batch; one share for all of them.

    Args:
        mixup, cutmix: α of the Beta distribution that the share is drawn from; 0: not used.
        prob: that a micro-batch is mixed at all.
        switch_prob: that it is by CutMix where both are used.
    """

    def __init__(self, num_classes: int, mixup: float, cutmix: float, prob: float, switch_prob: float):
        self.num_classes = num_classes
        # The labels are smoothed by the loss.
        self._of_timm = Mixup(
            mixup, cutmix, prob=prob, switch_prob=switch_prob, label_smoothing=0.0, num_classes=num_classes
        )

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mixes images (batch, channels, height, width) in place; seeds numpy's generator.

        Where corrupt images leave an odd number, the last has no partner and stays as it is.

        Returns:
            The images, and the shares of the classes in each, float (batch, classes).
        """
        np.random.seed(seed % 2**32)
        even = len(labels) // 2 * 2
        shares = one_hot(labels, self.num_classes).to(images.dtype)
        if even:
            images[:even], shares[:even] = self._of_timm(images[:even], labels[:even])
        return images, shares
