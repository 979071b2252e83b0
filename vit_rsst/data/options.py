"""What to read and how to split it."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt

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
class DataOptions:
    """The fields of a recipe's `data` section that select and prepare images; stored in tickets."""

    source: str
    path: str | None = None
    splits: dict[str, str] | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    crop_pct: float | None = None
    crop_mode: str = "center"
    interpolation: str | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None
    train_samples: int | None = None
    num_classes: int | None = None
    streaming: bool = False
    max_pixels: int = MAX_PIXELS
    max_corrupt: float = 0.0
    imbalance: Imbalance = Imbalance()

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
