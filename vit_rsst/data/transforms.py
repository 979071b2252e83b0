"""Transforms of whole batches on the device: random crop with padding, horizontal flip, normalisation, random erasing.

The random numbers come from outside (one seed a step), so that the same global batch is made on any number of ranks.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from timm.data.random_erasing import RandomErasing


@dataclass(frozen=True)
class Erasing:
    """timm's random erasing (Zhong et al. 2020) of one rectangle an image; `area` 0.25 and `aspect` 1 make Cutout's.

    Attributes:
        prob: of erasing anything.
        mode: what fills the rectangle: `const` zeros, one normal colour (`rand`) or normal noise (`pixel`).
        area: smallest and largest share of the image.
        aspect: smallest width divided by height; the largest is its inverse.
    """

    prob: float
    mode: str = "pixel"
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: float = 0.3

    def apply_(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Erases in normalised images (batch, channels, height, width), each by a seed of its own."""
        self._of_timm.device = images.device
        for image, seed in zip(images, seeds.tolist(), strict=True):
            random.seed(seed)
            torch.manual_seed(seed)
            self._of_timm(image)
        return images

    @cached_property
    def _of_timm(self) -> "RandomErasing":
        from timm.data.random_erasing import RandomErasing

        return RandomErasing(self.prob, *self.area, min_aspect=self.aspect, mode=self.mode)


class Drawn(NamedTuple):
    """Random numbers of a batch, on the CPU: offsets in px (batch, 2), flips (batch,), seeds of erasing (batch,)."""

    offsets: Tensor
    flips: Tensor
    seeds: Tensor

    def of(self, part: slice | Tensor) -> "Drawn":
        return Drawn(*(numbers[part] for numbers in self))


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding by `padding` px; horizontal flip with probability `hflip`; erasing where given."""

    padding: int = 0
    hflip: float = 0.0
    erasing: Erasing | None = None

    def draw(self, batch: int, seed: int) -> Drawn:
        """The random numbers of a batch."""
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.randint(0, 2 * self.padding + 1, (batch, 2), generator=generator)
        flips = torch.rand(batch, generator=generator) < self.hflip
        return Drawn(offsets, flips, torch.randint(0, 2**31, (batch,), generator=generator))

    def apply(self, images: Tensor, drawn: Drawn, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """uint8 images (batch, channels, height, width) cropped and flipped, normalised, erased."""
        images = normalize(self.moved(images, drawn), mean, std)
        return images if self.erasing is None else self.erasing.apply_(images, drawn.seeds)

    def moved(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Crops and flips uint8 images, in one gather where there is a crop."""
        offsets, flips = drawn.offsets.to(images.device), drawn.flips.to(images.device)
        if self.padding == 0:
            return torch.where(flips[:, None, None, None], images.flip(3), images) if self.hflip else images
        batch, channels, height, width = images.shape
        rows = offsets[:, :1] + torch.arange(height, device=images.device)  # (batch, height)
        columns = torch.arange(width, device=images.device).expand(batch, width)
        columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - columns, columns)  # (batch, width)
        places = rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]
        padded = F.pad(images, [self.padding] * 4).flatten(2)
        return padded.gather(2, places.view(batch, 1, -1).expand(-1, channels, -1)).view(images.shape)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images to float32 of mean 0 and deviation 1 per channel, as torchvision's ToTensor and Normalize do."""
    shift = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    scale = torch.tensor(std, device=images.device).view(-1, 1, 1)
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    # On the CPU image by image: each stays in the cache through all three passes.
    parts = (
        zip(out, images, strict=True) if images.device.type == "cpu" and images[:1].numel() > 2**16 else [(out, images)]
    )
    for part, source in parts:
        part.copy_(source).div_(255.0).sub_(shift).div_(scale)
    return out
