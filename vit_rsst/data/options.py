"""What to read and how to split it."""

from dataclasses import dataclass

from vit_rsst.data.catalog import CATALOG, SourceInfo

MAX_PIXELS = 89_478_485
"""Above this Pillow suspects a decompression bomb: a small file that becomes gigabytes."""


@dataclass(frozen=True)
class DataOptions:
    """The fields of a recipe's `data` section that decide which images there are; tickets carry them."""

    source: str
    path: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None
    train_samples: int | None = None
    num_classes: int | None = None
    streaming: bool = False
    max_pixels: int = MAX_PIXELS
    max_corrupt: float = 0.0

    @property
    def info(self) -> SourceInfo:
        return CATALOG[self.source]

    @property
    def size(self) -> int:
        """Side of the images in px."""
        return self.image_size or self.info.image_size

    @property
    def val_share(self) -> float:
        """Share of train that is held out for validation."""
        return self.info.val_fraction if self.val_fraction is None else self.val_fraction

    @property
    def test_share(self) -> float | None:
        """Share of train that is held out for the test; None: the source has a test split."""
        return self.test_fraction or self.info.test_fraction

    @property
    def where(self) -> str:
        """What a message calls the data."""
        return self.path or self.source
