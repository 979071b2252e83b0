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
        """Crops and flips uint8 images (batch, channels, height, width), in one gather where there is a crop."""
        if self.padding == 0:
            flips = flips.to(images.device)[:, None, None, None]
            return torch.where(flips, images.flip(3), images) if self.hflip else images
        batch, channels, height, width = images.shape
        offsets, flips = offsets.to(images.device), flips.to(images.device)
        rows = offsets[:, :1] + torch.arange(height, device=images.device)  # (batch, height)
        columns = torch.arange(width, device=images.device).expand(batch, width)
        columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - columns, columns)  # (batch, width)
        places = rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]
        padded = F.pad(images, [self.padding] * 4).flatten(2)
        return padded.gather(2, places.view(batch, 1, -1).expand(-1, channels, -1)).view(images.shape)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
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
