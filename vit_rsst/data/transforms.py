"""Transforms of whole batches on the device: random crop with padding, horizontal flip, normalisation.

The random numbers come from outside (one seed a step), so that the same global batch is made on any number of ranks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding by `padding` px; horizontal flip with probability `hflip`."""

    padding: int = 0
    hflip: float = 0.0

    def draw(self, batch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Offsets in px, shape (batch, 2), and flips, bool (batch,), on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.randint(0, 2 * self.padding + 1, (batch, 2), generator=generator)
        return offsets, torch.rand(batch, generator=generator) < self.hflip

    def apply(self, images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """Crops and flips uint8 images (batch, channels, height, width) in one gather."""
        if self.padding == 0 and self.hflip == 0.0:
            return images
        batch, channels, height, width = images.shape
        offsets, flips = offsets.to(images.device), flips.to(images.device)
        rows = offsets[:, :1] + torch.arange(height, device=images.device)  # (batch, height)
        columns = torch.arange(width, device=images.device).expand(batch, width)
        columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - columns, columns)  # (batch, width)
        padded = F.pad(images, [self.padding] * 4)
        b = torch.arange(batch, device=images.device)[:, None, None, None]
        c = torch.arange(channels, device=images.device)[:, None, None]
        return padded[b, c, rows[:, None, :, None], columns[:, None, None, :]]


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images to float32 of mean 0 and deviation 1 per channel, as torchvision's ToTensor and Normalize do."""
    shape = (1, -1, 1, 1)
    shift = torch.tensor(mean, device=images.device).view(shape)
    scale = torch.tensor(std, device=images.device).view(shape)
    return images.float().div_(255.0).sub_(shift).div_(scale)
