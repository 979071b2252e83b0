"""ViT with norms on both sides of the patch projection and gated MLPs: `vit_t16` and `vit_m16`.

Pixels of a patch are normalised before the projection and tokens after it (Kumar et al. 2023); MLPs are SwiGLU
(Shazeer 2020), three matrices without biases; one norm follows the blocks and another precedes the classifier. timm's
`global_pool` selects the class token (`token`) or the mean over all tokens, including the class token (`avg`).
"""

from timm.layers import LayerNorm, PatchEmbed, SwiGLU
from timm.models import VisionTransformer
from torch import Tensor, nn


class NormedPatchEmbed(PatchEmbed):
    """Normalises the pixels of each patch before the projection."""

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
    """SwiGLU without biases, whatever `bias` is."""

    def __init__(self, *args: object, bias: bool = True, **kwargs: object):
        super().__init__(*args, bias=False, **kwargs)

    def init_weights(self) -> None:
        """Does nothing: timm's initialization relies on the gate's bias, so default initialization is kept."""


class GatedVit(VisionTransformer):
    """timm's ViT with these layers; all other arguments are timm's."""

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
