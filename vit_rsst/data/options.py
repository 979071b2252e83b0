"""What to read and how to split it."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from vit_rsst.data.catalog import CATALOG, SourceInfo

MAX_PIXELS = 89_478_485
"""Above this Pillow suspects a decompression bomb, a small file that decodes to gigabytes."""


@dataclass(frozen=True)
class Imbalance:
    """A training split with fewer images of some classes; the other splits are unchanged.

    Attributes:
        kind: `long_tail`: fewer from class to class; `step`: the second half of the classes are minorities.
        ratio: images of the largest class to those of the smallest.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    kind: Literal["long_tail", "step"] | None = None
    ratio: Annotated[float, Gt(1)] = 50.0

    def counts(self, largest: int, num_classes: int) -> list[int]:
        """Images that each class keeps, by label.

        `long_tail`: largest · ratio^(−c / (C − 1)), Cui et al. 2019; `step`: the second half of the classes has
        largest / ratio, Buda et al. 2018. At least one each.
        """
        if self.kind == "step":
            shares = [1.0 if 2 * c < num_classes else 1.0 / self.ratio for c in range(num_classes)]
        else:
            shares = [self.ratio ** (-c / max(num_classes - 1, 1)) for c in range(num_classes)]
        return [max(1, round(largest * share)) for share in shares]


@dataclass(frozen=True)
class Images:
    """Which images are read, and how they are split and prepared: fields of a recipe's `data` that tickets store.

    Attributes:
        crop_pct: center crop for validation and test, as a share of the shorter side; default: that of the source.
        interpolation: for resizing; default: that of the source.
        num_classes: needed where labels are plain numbers, as in tars.
        streaming: read shards row by row, without a copy in the cache.
        max_pixels: larger images count as corrupt.
        max_corrupt: share of images that may be corrupt; they are skipped and counted.
    """

    source: str
    path: str | None = None
    splits: dict[Literal["train", "val", "test"], str] | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: Annotated[int, Ge(8)] | None = None
    crop_pct: Annotated[float, Ge(0.1), Le(1)] | None = None
    interpolation: str | None = None
    val_fraction: Annotated[float, Gt(0), Lt(1)] | None = None
    test_fraction: Annotated[float, Gt(0), Lt(1)] | None = None
    train_samples: Annotated[int, Ge(1)] | None = None
    num_classes: Annotated[int, Ge(2)] | None = None
    streaming: bool = False
    max_pixels: Annotated[int, Ge(64)] = MAX_PIXELS
    max_corrupt: Annotated[float, Ge(0), Lt(1)] = 0.0
    imbalance: Imbalance = field(default_factory=Imbalance)

    @property
    def info(self) -> SourceInfo:
        return CATALOG[self.source]

    @property
    def size(self) -> int:
        """Side of the images in px."""
        return self.image_size or self.info.image_size

    @property
    def crop_share(self) -> float:
        """Center crop as a share of the shorter side."""
        return self.crop_pct or self.info.crop_pct

    @property
    def resampling(self) -> str:
        """Pillow's word in lower case."""
        return self.interpolation or self.info.interpolation

    @property
    def val_share(self) -> float:
        """Share of train held out for validation."""
        return self.info.val_fraction if self.val_fraction is None else self.val_fraction

    @property
    def test_share(self) -> float | None:
        """Share of train held out for testing; None: the source has a test split."""
        return self.test_fraction or self.info.test_fraction

    @property
    def where(self) -> str:
        """How messages refer to the dataset."""
        return self.path or self.source


@dataclass(frozen=True)
class DataOptions(Images):
    """What the data package is asked for.

    Attributes:
        crop_mode: as in `Decoder`; no recipe sets it, but a published model may have been trained with another.
    """

    crop_mode: str = "center"
