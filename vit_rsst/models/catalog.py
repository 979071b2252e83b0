"""The project's model names: timm architectures with fixed arguments. No torch here: recipes are checked against it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stock:
    """A timm architecture with arguments; whoever has timm can build it without this package.

    Attributes:
        architecture: name in timm's registry, or `hf:TYPE` for a class of transformers.
        args: arguments of `timm.create_model`; of `hf:TYPE` the fields of its configuration.
        has_weights: whether published weights exist that fit (after resampling the embeddings).
        is_stock: whether timm or transformers alone can build it; False: it is this package's own.
    """

    architecture: str
    args: dict = field(default_factory=dict)
    has_weights: bool = True
    is_stock: bool = True


def _cifar_vit(architecture: str, has_weights: bool = True, **args: object) -> Stock:
    """32 px, patch 4: 64 patches."""
    return Stock(architecture, {"img_size": 32, "patch_size": 4, **args}, has_weights)


CATALOG: dict[str, Stock] = {
    "vit_tiny": _cifar_vit(
        "vit_tiny_patch16_224", has_weights=False, embed_dim=192, depth=9, num_heads=3, mlp_ratio=2.0
    ),
    "vit_small": _cifar_vit("vit_small_patch16_224", embed_dim=384, depth=12, num_heads=6, mlp_ratio=4.0),
    "vit_base": _cifar_vit("vit_base_patch16_224", embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0),
    "resnet20": Stock("resnet20", has_weights=False, is_stock=False),
}


def stock(name: str) -> Stock:
    """The architecture behind a recipe's `model.name`: from the catalogue, else taken as timm's own name."""
    return CATALOG.get(name, Stock(name))
