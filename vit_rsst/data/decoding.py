"""From the bytes of an image file to pixels: any mode, upright, within a size limit read from the header.

Whatever is wrong with an image becomes one sentence that names it (`Corrupt`). Broken EXIF is no damage: the pixels are
read, unrotated. Greys of more than 8 bits are divided by the smallest of 1 (floats), 255, 4,095, 65,535 and 2³² − 1
that holds the largest value of the image, so that 8-bit values in a 16-bit file stay what they are and a 16-bit
photograph is scaled as torchvision scales it.
"""

import io
import math
import random
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vit_rsst.data.options import MAX_PIXELS
from vit_rsst.errors import InputError, first_line

# Of an image that is read anyway, Pillow's remarks on its metadata and size tell nobody which image it is.
warnings.filterwarnings("ignore", module=r"PIL\.")

Encoded = dict | bytes | np.ndarray | None
"""An image as `datasets` gives it undecoded, `{"bytes": …, "path": …}`, its bytes, or pixels (3, height, width)."""


MODES = ("center", "squash")
"""How the middle is cut out: with the image's proportions, or from the whole image squeezed into a square."""

FULL_SCALES = (255, 4_095, 65_535, 2**32 - 1)
"""Largest greys of 8, 12, 16 and 32 bits."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation → what turns the image upright."""

THIN = 8
"""An image longer than so many times its shorter side loses its ends before it is enlarged."""

NOT_IMAGES = {
    b"version https://git-lfs": "it is a Git LFS pointer; run `git lfs pull`",
    b"<!doctype html": "it is an HTML page",
    b"<html": "it is an HTML page",
}
"""How a file begins that a download left in place of the image → what to say."""


@cache
def formats() -> tuple[str, ...]:
    """Pillow's formats that it can decode here; not what starts another program or is only recognised."""
    Image.init()
    decodable = (
        name for name, (factory, _) in Image.OPEN.items()
        if not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))
    )  # fmt: skip
    return tuple(name for name in decodable if name not in ("EPS", "MPEG"))


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of image files, in lower case with their dot."""
    known = formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


class Corrupt(InputError):
    """An image that cannot be decoded; the message says which and why."""


class Sample(NamedTuple):
    """One undecoded image.

    Attributes:
        place: its id: path of the image, or file and row.
        image: encoded, or its row in the decoder's table.
        label: number of its class.
        seed: of its random crop and augmentation; 0 if there is none.
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
        kept: positions in the batch of the decoded images.
        problems: a sentence for each other image.
    """

    images: torch.Tensor
    labels: torch.Tensor
    kept: torch.Tensor
    problems: list[str]


@dataclass(frozen=True)
class RandomCrop:
    """A random resized crop (Inception style, as in timm).

    Attributes:
        scale: range of the area, as a share of the image.
        ratio: range of width divided by height.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Decoder:
    """Decodes batches of samples; serves torch's DataLoader as a `Dataset`, copied to each worker.

    Attributes:
        size: side of the square in px.
        images: the table that samples index.
        max_pixels: larger images are corrupt.
        interpolation: `bicubic` or `bilinear`.
        crop_pct: center crop as a share of the shorter side.
        crop_mode: `center`, or `squash`: squeeze the whole image into a square first.
        random_crop: of training images; None: center crop.
        auto_augment: timm's configuration of RandAugment, AutoAugment or AugMix, such as `rand-m9-mstd0.5-inc1`.
        color_jitter: strength of brightness, contrast and saturation.
        mean: of the channels, 0 … 1: fills the corners after a rotation.
    """

    size: int
    images: Sequence[Encoded] | None = None
    max_pixels: int = MAX_PIXELS
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    random_crop: RandomCrop | None = None
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
        """The samples with images in place of row numbers, fetched in one call: row by row is slow."""
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
            sample.image, self.size, sample.place, self.max_pixels, self.random_crop, self.interpolation, self.crop_pct,
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
        """Whether decoding is random, so that decoded images cannot be kept."""
        return self.random_crop is not None or self.auto_augment is not None or bool(self.color_jitter)

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
    random_crop: RandomCrop | None = None,
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
    crop_mode: str = "center",
) -> np.ndarray:
    """One image as uint8 (3, size, size), red, green and blue.

    Args:
        place: names the image in an error.
        max_pixels: larger images are corrupt; checked before decoding.
        random_crop: drawn from torch's generator; None: resize and center crop.
        interpolation: `bicubic` or `bilinear`.
        crop_pct: center crop as a share of the shorter side.
        crop_mode: `center` or `squash`.

    Raises:
        Corrupt: no image, truncated, or too large.
    """

    if isinstance(image, np.ndarray):
        return _cut(Image.fromarray(image.transpose(1, 2, 0)), size, random_crop, interpolation, crop_pct, crop_mode)
    if isinstance(image, bytes):
        image = {"bytes": image, "path": None}
    try:
        # Images within images (icons, frames) are held to Pillow's limit, which is twice this one; so is what we cut.
        Image.MAX_IMAGE_PIXELS = max(max_pixels, MAX_PIXELS)
        with Image.open(_file(image), formats=formats()) as opened:
            if opened.width * opened.height > max_pixels:
                raise _TooLarge(f"{opened.width:,} × {opened.height:,} px")
            return _cut(opened, size, random_crop, interpolation, crop_pct, crop_mode)
    except (_TooLarge, Image.DecompressionBombError) as error:
        found = re.search(r"\d+ pixels", str(error))  # Pillow's own sentence says its own limit
        raise Corrupt(
            f"data: {place} cannot be decoded: {found[0] if found else error} are more than "
            f"data.max_pixels={max_pixels:,}; raise that if the image is meant to be so large."
        ) from error
    except Exception as error:  # Pillow's plugins raise anything at all on damaged bytes
        raise Corrupt(f"data: {place} cannot be decoded ({_reason(image, error)}).") from error


class _TooLarge(Exception):
    """An image of more pixels than are allowed."""


def _file(image: dict | None) -> io.BytesIO | str:
    if image is None or (image.get("bytes") is None and image.get("path") is None):
        raise ValueError("the image is missing")
    return io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]


def _reason(image: dict | None, error: Exception) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return first_line(error)
    if (head := image.get("bytes")) is None:
        with open(image["path"], "rb") as file:
            head = file.read(64)
    if not head:
        return "it is empty"
    start = bytes(head[:64]).lower().lstrip()
    return next(
        (what for begin, what in NOT_IMAGES.items() if start.startswith(begin)), "not an image that Pillow reads"
    )


def _cut(
    picture: Image.Image, size: int, random_crop: RandomCrop | None, interpolation: str, crop_pct: float, crop_mode: str
) -> np.ndarray:
    """The random part, or the middle, as uint8 (3, size, size)."""
    if random_crop is None:
        return _middle(picture, size, interpolation, crop_pct, crop_mode)
    return _random_part(picture, size, interpolation, random_crop)


def _pixels(picture: Image.Image) -> np.ndarray:
    """uint8 (3, height, width)."""
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def resized_side(size: int, crop_pct: float) -> int:
    """px of the shorter side before the center crop; rounded down as in timm, with 247.9999999 taken as 248."""
    return math.floor(round(size / crop_pct, 6))


def _middle(opened: Image.Image, size: int, interpolation: str, crop_pct: float, crop_mode: str) -> np.ndarray:
    """Shorter side (or both) resized to `size / crop_pct`, then center crop; rounded as in torchvision."""
    picture = _upright(opened, _rgb(opened))
    shorter = resized_side(size, crop_pct)
    if picture.size == (size, size) == (shorter, shorter):
        return _pixels(picture)
    squashed = crop_mode == "squash"
    if not squashed:
        picture = _without_ends(picture)
    width, height = (shorter if squashed else shorter * side // min(picture.size) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = picture.resize((width, height), Image.Resampling[interpolation.upper()])
    return _pixels(resized.crop((left, top, left + size, top + size)))


def _random_part(opened: Image.Image, size: int, interpolation: str, random_crop: RandomCrop) -> np.ndarray:
    from torchvision.transforms import RandomResizedCrop

    file, opened = opened, _eight_bits(opened)  # by the largest value of the whole image, not of the part
    full = opened.size
    top, left, height, width = RandomResizedCrop.get_params(opened, random_crop.scale, random_crop.ratio)
    reduction = min(width, height) // size
    if reduction > 1:  # a JPEG can be decoded at a half, a quarter or an eighth: as long as enough pixels are left
        opened.draft("RGB", (full[0] // reduction, full[1] // reduction))
    x, y = opened.width / full[0], opened.height / full[1]
    box = (round(left * x), round(top * y), round((left + width) * x), round((top + height) * y))
    part = _pixels(_upright(file, _rgb(opened.crop(box))))
    # As Pillow resizes, in a third of the time.
    part = torch.from_numpy(part)[None]
    return F.interpolate(part, size=(size, size), mode=interpolation, antialias=True)[0].numpy()


def _without_ends(picture: Image.Image) -> Image.Image:
    """The middle of a very thin image: what the crop keeps and more, so that its length costs no memory."""
    most = THIN * min(picture.size)
    kept = [side if side <= most else most + (side - most) % 2 for side in picture.size]  # the middle stays the middle
    if kept == list(picture.size):
        return picture
    left, top = ((side - part) // 2 for side, part in zip(picture.size, kept, strict=True))
    return picture.crop((left, top, left + kept[0], top + kept[1]))


def _rgb(opened: Image.Image) -> Image.Image:
    return _eight_bits(opened).convert("RGB")


def _eight_bits(opened: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits, or floats, in 8 bits (Pillow would clip them at 255); any other image as it is.

    Raises:
        ValueError: negative values or none that are finite: their scale is anyone's guess.
    """
    if opened.mode[0] not in "IF":
        return opened
    greys = np.asarray(opened)
    lowest, highest = greys.min(), greys.max()
    if not (np.isfinite(lowest) and np.isfinite(highest) and lowest >= 0 and highest <= FULL_SCALES[-1]):
        raise ValueError(f"its greys lie between {lowest} and {highest}; write them as 8 or 16 bits")
    scales = (1, *FULL_SCALES) if greys.dtype.kind == "f" else FULL_SCALES
    full = next(scale for scale in scales if highest <= scale)
    if full == 65_535:
        greys = greys.astype(np.uint16) >> 8
    elif full != 255:
        greys = np.rint(greys * (255.0 / full))
    return Image.fromarray(greys.astype(np.uint8))


_said: set[str] = set()


def _say_once(text: str) -> None:
    """Once per process, whatever image it is: a dataset may hold thousands of the kind."""
    if not _said:
        _said.add(text)
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _upright(opened: Image.Image, picture: Image.Image) -> Image.Image:
    """Turned as the camera marked the file, which is also how `datasets` decodes it."""
    try:
        orientation = opened.getexif().get(0x0112, 1)
    except Exception as error:  # whatever is wrong with the metadata, the pixels are sound
        _say_once(f"an image has broken EXIF ({first_line(error)}): such images are read as they are, not rotated")
        return picture
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)
