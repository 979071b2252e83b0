"""ViT with attention linear in the number of tokens (Linformer, Wang et al. 2020): `lightweight_vit`.

Every head attends to `rank` mixtures of keys and values instead of to all tokens. The mixtures are learned per block
and shared by its heads, so that heads can be removed as from any other ViT.
"""

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class LinearAttention(Attention):
    """Self-attention over `rank` mixtures of the tokens; `mix_` adds their weights."""

    def mix_(self, num_tokens: int, rank: int) -> None:
        """Adds the mixtures, (rank, tokens), initialized to preserve the variance of independent keys and values."""
        self.key_mix, self.value_mix = (nn.Parameter(torch.empty(rank, num_tokens)) for _ in range(2))
        for mix in (self.key_mix, self.value_mix):
            nn.init.normal_(mix, std=num_tokens**-0.5)

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """(batch, tokens, width) → the same.

        Raises:
            ValueError: a mask is given; mixtures have no positions to mask.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention over mixtures of tokens does not support masks")
        heads = (self.num_heads, self.head_dim)
        query, key, value = self.qkv(x).unflatten(2, (3, *heads)).permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, …)
        key, value = self.key_mix @ self.k_norm(key), self.value_mix @ value  # (batch, heads, rank, …)
        dropout = self.attn_drop.p if self.training else 0.0
        seen = scaled_dot_product_attention(self.q_norm(query), key, value, dropout_p=dropout)
        return self.proj_drop(self.proj(seen.transpose(1, 2).flatten(2)))


class LightweightVit(VisionTransformer):
    """timm's ViT with linear attention.

    Args:
        rank: mixtures of keys and values per block.
        kwargs: arguments of timm's ViT.

    Raises:
        ValueError: a rank below 1, or `patch_drop_rate`, since mixtures are over all tokens.
    """

    def __init__(self, rank: int = 32, **kwargs: object):
        if rank < 1:
            raise ValueError(f"rank {rank} is less than 1")
        if kwargs.get("patch_drop_rate"):
            raise ValueError("patch_drop_rate is not supported: attention mixes all tokens")
        super().__init__(attn_layer=LinearAttention, **kwargs)
        for block in self.blocks:
            block.attn.mix_(self.patch_embed.num_patches + self.num_prefix_tokens, rank)
