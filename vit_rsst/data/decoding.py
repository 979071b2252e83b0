"""From the bytes of an image file to pixels: any mode, upright, within a size limit read from the header."""

import io
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_rsst.data.options import MAX_PIXELS
from vit_rsst.errors import InputError, first_line

# The limit is ours, read from the header before anything is decoded; Pillow would only warn at its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Encoded = dict | np.ndarray | None
"""An image as `datasets` gives it undecoded, `{"bytes": …, "path": …}`, or pixels (3, height, width)."""


MODES = ("center", "squash")
"""Of cutting the middle out: with the image's proportions, or of a square that the whole image has become."""


class Corrupt(InputError):
    """An image that cannot be decoded; says where it lies and why."""


class Sample(NamedTuple):
    """One undecoded image.

    Attributes:
        place: its id: `file:row` in a stream, split and row in a table.
        image: encoded, or its row in the table that the decoder holds.
        label: number of its class.
        seed: of its random crop and augmentation; 0 where there is none.
    """

    place: str
    image: Encoded | int
    label: int
    seed: int = 0


class Decoded(NamedTuple):
    """A batch of pixels.

    Attributes:
        images: uint8, (kept, 3, size, size).
        labels: int64, (kept,).
        kept: positions in the batch of those that could be decoded.
        problems: a sentence for each of the others.
    """

    images: torch.Tensor
    labels: torch.Tensor
    kept: torch.Tensor
    problems: list[str]


@dataclass(frozen=True)
class Window:
    """A random part of the image, resized to the square that the model takes (Inception's crop, as timm has it).

    Attributes:
        scale: smallest and largest share of the area.
        ratio: smallest and largest width divided by height.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Decoder:
    """Decodes batches of samples; a `Dataset` to torch's DataLoader, whose workers hold a copy of it.

    Attributes:
        size: side of the square in px.
        images: the table that samples name rows of.
        max_pixels: an image of more is corrupt.
        interpolation: `bicubic` or `bilinear`.
        crop_pct: share of the shorter side that the middle has.
        crop_mode: `center`, or `squash`: a square is made of the whole image before its middle is cut.
        window: a random part of each image; None: its middle.
        auto_augment: timm's configuration of RandAugment, AutoAugment or AugMix, such as `rand-m9-mstd0.5-inc1`.
        color_jitter: strength of brightness, contrast and saturation.
        mean: of the channels, 0 … 1: fills what a rotation leaves empty.
    """

    size: int
    images: Sequence[Encoded] | None = None
    max_pixels: int = MAX_PIXELS
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    window: Window | None = None
    auto_augment: str | None = None
    color_jitter: float | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __getitems__(self, samples: Sequence[Sample]) -> Decoded:
        pictures, labels, kept, problems = [], [], [], []
        for position, sample in enumerate(self.fetched(samples)):
            try:
                pictures.append(self.picture(sample))
            except Corrupt as problem:  # an exception of a worker would arrive with its traceback as its text
                problems.append(str(problem))
                continue
            labels.append(sample.label)
            kept.append(position)
        images = torch.from_numpy(np.stack(pictures)) if pictures else torch.empty(0, 3, self.size, self.size).byte()
        return Decoded(images, torch.tensor(labels, dtype=torch.int64), torch.tensor(kept, dtype=torch.int64), problems)

    def fetched(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """The samples with their images instead of row numbers; together, since a table is slow to ask one by one."""
        if self.images is None:
            return samples
        images = self.images[[sample.image for sample in samples]]
        return [sample._replace(image=image) for sample, image in zip(samples, images, strict=True)]

    def picture(self, sample: Sample) -> np.ndarray:
        """One fetched sample as uint8 (3, size, size).

        Raises:
            Corrupt: no image, truncated, or too large.
        """
        if self.is_random:
            _seed(sample.seed)
        pixels = decode(
            sample.image, self.size, sample.place, self.max_pixels, self.window, self.interpolation, self.crop_pct,
            self.crop_mode,
        )  # fmt: skip
        if not self._transforms:
            return pixels
        picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        for transform in self._transforms:
            picture = transform(picture)
        return _pixels(picture)

    @property
    def is_random(self) -> bool:
        """Whether two looks at an image differ, so that decoded images cannot be kept."""
        return self.window is not None or self.auto_augment is not None or bool(self.color_jitter)

    @cached_property
    def _transforms(self) -> list[Callable[[Image.Image], Image.Image]]:
        transforms = []
        if self.auto_augment is not None:
            transforms.append(auto_augment(self.auto_augment, self.size, self.mean))
        if self.color_jitter:
            from torchvision.transforms import ColorJitter

            transforms.append(ColorJitter(*[self.color_jitter] * 3))
        return transforms


def _seed(seed: int) -> None:
    """Seeds what timm and torchvision draw from; torch.manual_seed would note it for every GPU too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def auto_augment(config: str, size: int, mean: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    """timm's transform of that name.

    Raises:
        InputError: timm knows no such configuration.
    """
    from timm.data import auto_augment as of_timm

    # At its largest magnitude timm keeps no bit at all, which Pillow refuses from version 13 on.
    of_timm.NAME_TO_OP |= {name: _posterize for name in of_timm.NAME_TO_OP if name.startswith("Posterize")}
    fill = tuple(round(255 * value) for value in mean)
    makers = {"rand": of_timm.rand_augment_transform, "augmix": of_timm.augment_and_mix_transform}
    make = makers.get(config.split("-")[0], of_timm.auto_augment_transform)
    try:
        return make(config, {"translate_const": int(size * 0.45), "img_mean": fill})
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"data.augment.auto_augment: timm has no {config!r}; expected such as rand-m9-mstd0.5-inc1, original, v0, "
            "3a or augmix-m3-w3."
        ) from error


def _posterize(picture: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """timm's, with one bit at least."""
    return picture if bits_to_keep >= 8 else ImageOps.posterize(picture, max(bits_to_keep, 1))


def decode(
    image: Encoded,
    size: int,
    place: str,
    max_pixels: int = MAX_PIXELS,
    window: Window | None = None,
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
    crop_mode: str = "center",
) -> np.ndarray:
    """One image as uint8 (3, size, size), red, green and blue.

    Args:
        place: names the image in an error.
        max_pixels: an image of more is corrupt; checked before decoding.
        window: a random part, drawn from torch's generator; None: the shorter side is resized and the middle kept.
        interpolation: `bicubic` or `bilinear`.
        crop_pct: share of the shorter side that the middle has.
        crop_mode: `center` or `squash`.

    Raises:
        Corrupt: no image, truncated, or too large.
    """

    def cut(picture: Image.Image) -> np.ndarray:
        if window is None:
            return _middle(picture, size, interpolation, crop_pct, crop_mode)
        return _random_part(picture, size, interpolation, window)

    if isinstance(image, np.ndarray):
        return cut(Image.fromarray(image.transpose(1, 2, 0)))
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as opened:
            if opened.width * opened.height > max_pixels:
                raise Corrupt(
                    f"data: the image in {place} cannot be decoded: it has {opened.width:,} × {opened.height:,} px, "
                    f"more than data.max_pixels={max_pixels:,}; raise that if the image is meant."
                )
            return cut(opened)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, TypeError, ValueError, SyntaxError) as error:
        raise Corrupt(f"data: the image in {place} cannot be decoded ({first_line(error)}).") from error


def _pixels(picture: Image.Image) -> np.ndarray:
    """uint8 (3, height, width)."""
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def resized_side(size: int, crop_pct: float) -> int:
    """px of the shorter side of which `size` are kept; timm rounds it down too, and 247.9999999 is 248."""
    return math.floor(round(size / crop_pct, 6))


def _middle(opened: Image.Image, size: int, interpolation: str, crop_pct: float, crop_mode: str) -> np.ndarray:
    """The shorter side, or both, resized to `size / crop_pct`, the middle kept; rounded as torchvision does."""
    picture = _upright(opened, _rgb(opened))
    shorter = resized_side(size, crop_pct)
    if picture.size == (size, size) == (shorter, shorter):
        return _pixels(picture)
    squashed = crop_mode == "squash"
    width, height = (shorter if squashed else shorter * side // min(picture.size) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = picture.resize((width, height), Image.Resampling[interpolation.upper()])
    return _pixels(resized.crop((left, top, left + size, top + size)))


def _random_part(opened: Image.Image, size: int, interpolation: str, window: Window) -> np.ndarray:
    from torchvision.transforms import RandomResizedCrop

    full = opened.size
    top, left, height, width = RandomResizedCrop.get_params(opened, window.scale, window.ratio)
    reduction = min(width, height) // size
    if reduction > 1:  # a JPEG can be decoded at a half, a quarter or an eighth: as long as enough pixels are left
        opened.draft("RGB", (full[0] // reduction, full[1] // reduction))
    x, y = opened.width / full[0], opened.height / full[1]
    box = (round(left * x), round(top * y), round((left + width) * x), round((top + height) * y))
    part = _pixels(_upright(opened, _rgb(opened.crop(box))))
    # As Pillow resizes, in a third of the time.
    part = torch.from_numpy(part)[None]
    return F.interpolate(part, size=(size, size), mode=interpolation, antialias=True)[0].numpy()


def _rgb(opened: Image.Image) -> Image.Image:
    # 16 bits a pixel: Pillow would clip them at 255
    grey = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)) if opened.mode[0] == "I" else opened
    return grey.convert("RGB")


def _upright(opened: Image.Image, picture: Image.Image) -> Image.Image:
    """Turned as the camera marked the file, which is also how `datasets` decodes it."""
    orientation = opened.getexif().get(0x0112, 1)
    if orientation == 1:
        return picture
    picture.getexif()[0x0112] = orientation
    return ImageOps.exif_transpose(picture)
