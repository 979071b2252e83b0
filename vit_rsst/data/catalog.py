"""The data sources that a recipe can name, with what is known without reading them. No torch, no datasets here."""

from dataclasses import dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SourceInfo:
    """Facts about a source.

    Attributes:
        about: one line for `vit-rsst methods`.
        hub_id: id on the Hub; None for the embedded digits and for local folders.
        image_size: default side in px.
        mean, std: of the channels, in 0 … 1.
        test_split: name of the split that scores tickets.
        test_fraction: share of train used as the test split if there is none.
        val_fraction: default share of train held out for validation.
        crop: default crop of training images.
        rows: published sizes of train and test, for plans made without the data.
        num_classes: likewise.
        hflip: whether flipping an image preserves its class.
        crop_pct: center crop for validation and test, as a share of the shorter side (timm's term).
        interpolation: default resampling filter.
    """

    about: str
    hub_id: str | None = None
    image_size: int = 32
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    test_split: str = "test"
    test_fraction: float | None = None
    val_fraction: float = 0.1
    crop: str = "pad"
    rows: tuple[int, int] | None = None
    num_classes: int | None = None
    hflip: bool = True
    crop_pct: float = 1.0
    interpolation: str = "bicubic"


CATALOG: dict[str, SourceInfo] = {
    "digits": SourceInfo(
        "scikit-learn's handwritten digits, 1,797 real images of 8 × 8 px, enlarged; needs no network",
        mean=(0.305, 0.305, 0.305),
        std=(0.376, 0.376, 0.376),
        test_fraction=360 / 1797,
        rows=(1797, 0),
        num_classes=10,
        hflip=False,
        interpolation="bilinear",
    ),
    "cifar10": SourceInfo(
        "CIFAR-10, 50,000 + 10,000 images of 32 × 32 px",
        hub_id="uoft-cs/cifar10",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        rows=(50_000, 10_000),
        num_classes=10,
    ),
    "cifar100": SourceInfo(
        "CIFAR-100 with its 100 fine labels, 50,000 + 10,000 images of 32 × 32 px",
        hub_id="uoft-cs/cifar100",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        rows=(50_000, 10_000),
        num_classes=100,
    ),
    "imagenet1k": SourceInfo(
        "ImageNet-1k (ILSVRC 2012); its public validation split scores the tickets",
        hub_id="ILSVRC/imagenet-1k",
        image_size=224,
        test_split="validation",
        val_fraction=0.01,
        crop="resized",
        crop_pct=0.875,
        rows=(1_281_167, 50_000),
        num_classes=1000,
    ),
    "folder": SourceInfo("any local folder of parquet files or class folders, named by data.path", image_size=224),
}
"""Means and standard deviations: of the training images of each set; ImageNet's for folders."""

LABEL_COLUMNS = {"cifar100": "fine_label"}
"""The default label column of sources that have several."""
