"""ViT whose attention costs in proportion to the number of tokens (Linformer, Wang et al. 2020): `lightweight_vit`.

Every head looks at `rank` mixtures of the keys and of the values instead of at those of all tokens. The mixtures are
learned for each block and shared by its heads, so that a head can be removed as from any other ViT.
"""

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class LinearAttention(Attention):
    """Self-attention over `rank` mixtures of the tokens; `mix_` gives it their weights."""

    def mix_(self, num_tokens: int, rank: int) -> None:
        """Adds the mixtures, (rank, tokens): they keep the size of independent keys and values."""
        self.key_mix, self.value_mix = (nn.Parameter(torch.empty(rank, num_tokens)) for _ in range(2))
        for mix in (self.key_mix, self.value_mix):
            nn.init.normal_(mix, std=num_tokens**-0.5)

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """(batch, tokens, width) → the same.

        Raises:
            ValueError: a mask; a mixture has no place that could be masked.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention over mixtures of tokens takes no mask")
        heads = (self.num_heads, self.head_dim)
        query, key, value = self.qkv(x).unflatten(2, (3, *heads)).permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, …)
        key, value = self.key_mix @ self.k_norm(key), self.value_mix @ value  # (batch, heads, rank, …)
        dropout = self.attn_drop.p if self.training else 0.0
        seen = scaled_dot_product_attention(self.q_norm(query), key, value, dropout_p=dropout)
        return self.proj_drop(self.proj(seen.transpose(1, 2).flatten(2)))


class LightweightVit(VisionTransformer):
    """timm's ViT with linear attention.

    Args:
        rank: mixtures of keys and values in each block.
        kwargs: timm's.

    Raises:
        ValueError: a rank below 1, or tokens that are left out at random, which no mixture has a place for.
    """

    def __init__(self, rank: int = 32, **kwargs: object):
        if rank < 1:
            raise ValueError(f"rank {rank} is less than 1")
        if kwargs.get("patch_drop_rate"):
            raise ValueError("patch_drop_rate leaves out tokens, and its mixtures are of all of them")
        super().__init__(attn_layer=LinearAttention, **kwargs)
        for block in self.blocks:
            block.attn.mix_(self.patch_embed.num_patches + self.num_prefix_tokens, rank)
