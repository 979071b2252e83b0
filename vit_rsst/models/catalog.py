"""The model catalogue: architectures with fixed arguments. No torch import, so that recipes can be checked quickly."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stock:
    """An architecture with its arguments.

    Attributes:
        architecture: name in timm's registry, or `hf:TYPE` for a transformers class.
        args: arguments of `timm.create_model`; for `hf:TYPE`, configuration fields.
        has_weights: whether matching published weights exist (after resampling the embeddings).
        is_stock: whether timm or transformers can build it without this package.
    """

    architecture: str
    args: dict = field(default_factory=dict)
    has_weights: bool = True
    is_stock: bool = True


def _vit(
    architecture: str, size: int, patch: int, width: int, depth: int, heads: int, ratio: float = 4.0, **how: bool
) -> Stock:
    """A ViT by its shape; `ratio` is the MLP width relative to the embedding width."""
    args = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    return Stock(architecture, {**args, "mlp_ratio": ratio}, **how)


def _own(name: str, *shape: float, **more: object) -> Stock:
    """A ViT implemented in this package."""
    plain = _vit(name, *shape)
    return Stock(name, {**plain.args, **more}, has_weights=False, is_stock=False)


TINY, SMALL, BASE, LARGE = (f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))

CATALOG: dict[str, Stock] = {
    "vit_tiny": _vit(TINY, 32, 4, 192, 9, 3, 2.0, has_weights=False),
    "vit_small": _vit(SMALL, 32, 4, 384, 12, 6),
    "vit_base": _vit(BASE, 32, 4, 768, 12, 12),
    "vit_small_imagenet": _vit(SMALL, 224, 16, 384, 12, 6),
    "vit_base_imagenet": _vit(BASE, 224, 16, 768, 12, 12),
    "vit_large_imagenet": _vit(LARGE, 224, 16, 1024, 24, 16),
    "cifar_vit_small": _vit(SMALL, 32, 4, 384, 6, 6, has_weights=False),
    "cifar_vit_base": _vit(BASE, 32, 4, 512, 6, 8, has_weights=False),
    "dynamic_vit": _own("dynamic_vit", 32, 4, 512, 6, 8, stages=[1, 2, 4], keep_ratio=0.7),
    "lightweight_vit": _own("lightweight_vit", 32, 4, 512, 6, 8, rank=32),
    "vit_p8_tiny": _vit(TINY, 32, 8, 128, 4, 4, has_weights=False),
    "vit_p8_small": _vit(SMALL, 32, 8, 256, 6, 8, has_weights=False),
    "vit_p8_base": _vit(BASE, 32, 8, 512, 6, 8, has_weights=False),
    "vit_t16": _own("vit_t16", 224, 16, 192, 6, 3, 512 / 192),
    "vit_m16": _own("vit_m16", 224, 16, 192, 12, 3, 512 / 192),
    "resnet20": Stock("resnet20", has_weights=False, is_stock=False),
}


def stock(name: str) -> Stock:
    """The architecture of a recipe's `model.name`: from the catalogue, else a timm name."""
    return CATALOG.get(name, Stock(name))
