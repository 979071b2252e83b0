"""ViT with norms on both sides of the patch projection and gated MLPs: `vit_t16` and `vit_m16`.

Pixels of a patch are normalised before the projection and its tokens after it (Kumar et al. 2023); MLPs are SwiGLU
(Shazeer 2020), of three matrices without biases; one norm follows the blocks and one more stands in the head. timm's
`global_pool` chooses the class token (`token`) or the mean over all tokens, the class token among them (`avg`).
"""

from timm.layers import LayerNorm, PatchEmbed, SwiGLU
from timm.models import VisionTransformer
from torch import Tensor, nn


class NormedPatchEmbed(PatchEmbed):
    """Normalises the pixels of each patch before their projection."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.pixel_norm = LayerNorm(self.proj.weight[0].numel())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, patches, features)."""
        height, width = self.patch_size
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        normed = self.pixel_norm(patches.flatten(3)).view_as(patches)  # (batch, rows, columns, channels, height, width)
        return super().forward(normed.permute(0, 3, 1, 4, 2, 5).reshape(x.shape))


class BiasFreeSwiGLU(SwiGLU):
    """Gate, value and output without biases, whatever the attention beside it has."""

    def __init__(self, *args: object, bias: bool = True, **kwargs: object):
        super().__init__(*args, bias=False, **kwargs)

    def init_weights(self) -> None:
        """timm would start the gate closed and open it by its bias, which this one lacks: it starts as the rest."""


class GatedVit(VisionTransformer):
    """timm's ViT with these parts; every other argument is timm's."""

    def __init__(self, **kwargs: object):
        super().__init__(
            embed_layer=NormedPatchEmbed,
            embed_norm_layer=LayerNorm,
            qkv_bias=False,
            act_layer=nn.SiLU,
            mlp_layer=BiasFreeSwiGLU,
            fc_norm=False,
            pool_include_prefix=True,
            **kwargs,
        )
        self.fc_norm = LayerNorm(self.embed_dim)
