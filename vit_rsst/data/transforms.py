"""Transforms of whole batches on the device: random crop with padding, horizontal flip, normalisation, random erasing.

The random numbers are drawn on the CPU for a global batch (one seed a step), so that it is the same on any number of
ranks, and travel to the device together, without anybody waiting for them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_NORMALS = 2**20
"""Normal numbers on the device that erased pixels are taken from, each image from a place of its own."""


def travel(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device; by pinned memory to a GPU, so that the host goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers of the channels, (channels, 1, 1), sent to a device once."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


@functools.lru_cache(maxsize=2)
def normals(device: torch.device) -> Tensor:
    return torch.randn(NUM_NORMALS, generator=torch.Generator().manual_seed(0)).to(device)


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (batch, 4) of top, bottom, left, right → bool (batch, 1, height, width)."""
    edges = boxes[:, :, None]
    rows, columns = (torch.arange(size, device=boxes.device) for size in (height, width))
    in_rows = (rows >= edges[:, 0]) & (rows < edges[:, 1])  # (batch, height)
    in_columns = (columns >= edges[:, 2]) & (columns < edges[:, 3])
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


@dataclass(frozen=True)
class Erasing:
    """Random erasing (Zhong et al. 2020) of one rectangle an image, drawn as timm draws it.

    `area` 0.25 and `aspect` 1 make Cutout's.

    Attributes:
        prob: of erasing anything.
        mode: what fills the rectangle: `const` zeros, one normal color (`rand`) or normal noise (`pixel`).
        area: smallest and largest share of the image.
        aspect: smallest width divided by height; the largest is its inverse.
    """

    prob: float
    mode: str = "pixel"
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: float = 0.3

    ATTEMPTS: ClassVar[int] = 10

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Uniform numbers, float64 (batch, 4 + 2 · attempts)."""
        return torch.rand(batch, 4 + 2 * self.ATTEMPTS, generator=generator, dtype=torch.float64)

    def boxes(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """int64 (batch, 5): top, bottom, left, right (empty where nothing is erased), and a place among `normals`.

        The first of ten rectangles that is smaller than the image is taken.
        """
        chance, row, column, place = drawn[:, :4].unbind(1)
        areas, aspects = drawn[:, 4:].view(-1, 2, self.ATTEMPTS).unbind(1)
        least, most = self.area
        areas = (least + (most - least) * areas) * height * width
        ratios = torch.exp((2.0 * aspects - 1.0) * -math.log(self.aspect))
        tall, wide = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
        attempts = torch.arange(self.ATTEMPTS).expand_as(tall)
        first = torch.where((tall < height) & (wide < width), attempts, self.ATTEMPTS).amin(1)
        is_erased = (first < self.ATTEMPTS) & (chance < self.prob)
        pick = first.clamp(max=self.ATTEMPTS - 1)[:, None]
        tall, wide = (torch.where(is_erased, size.gather(1, pick)[:, 0], 0.0) for size in (tall, wide))
        top, left = (row * (height - tall + 1)).floor(), (column * (width - wide + 1)).floor()
        return torch.stack([top, top + tall, left, left + wide, (place * NUM_NORMALS).floor()], 1).long()

    def fill(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Normalised images (batch, channels, height, width) with their boxes erased; all on one device."""
        _, channels, height, width = images.shape
        if self.mode == "const":
            filling = torch.zeros((), device=images.device)
        else:
            shape = (channels, height, width) if self.mode == "pixel" else (channels, 1, 1)
            places = boxes[:, 4:, None, None] + torch.arange(math.prod(shape), device=images.device).view(shape)
            filling = normals(images.device)[places % NUM_NORMALS]
        return torch.where(inside(boxes[:, :4], height, width), filling, images)


class Drawn(NamedTuple):
    """Random numbers of a batch, on the CPU: offsets in px (batch, 2), flips (batch,), of erasing (batch, n)."""

    offsets: Tensor
    flips: Tensor
    erasing: Tensor

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
        return Drawn(offsets, flips, self.erasing.draw(batch, generator) if self.erasing else torch.empty(batch, 0))

    def apply(self, images: Tensor, drawn: Drawn, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """uint8 images (batch, channels, height, width) cropped and flipped, normalised, erased."""
        numbers = torch.cat([drawn.offsets, drawn.flips[:, None]], 1)
        if self.erasing is not None:
            numbers = torch.cat([numbers, self.erasing.boxes(drawn.erasing, *images.shape[2:])], 1)
        numbers = travel(numbers, images.device)
        images = normalize(self._moved(images, numbers[:, :2], numbers[:, 2].bool()), mean, std)
        return images if self.erasing is None else self.erasing.fill(images, numbers[:, 3:])

    def moved(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Crops and flips uint8 images."""
        return self._moved(images, travel(drawn.offsets, images.device), travel(drawn.flips, images.device))

    def _moved(self, images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """In one gather where there is a crop."""
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
    shift, scale = constant(tuple(mean), images.device), constant(tuple(std), images.device)
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    # On the CPU image by image: each stays in the cache through all three passes.
    parts = (
        zip(out, images, strict=True) if images.device.type == "cpu" and images[:1].numel() > 2**16 else [(out, images)]
    )
    for part, source in parts:
        part.copy_(source).div_(255.0).sub_(shift).div_(scale)
    return out
