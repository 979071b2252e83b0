"""Narrow: replacements for timm attention modules that require as many features from their heads as at the input.

Their forward pass ends in `reshape(B, N, C)` with the C of the input, so heads cannot be removed. A module that loses a
head becomes one of the classes here, which differ in that line only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat, maybe_add_mask, resolve_self_attn_mask
from timm.models import beit, eva, fastvit, metaformer, swin_transformer
from torch import Tensor, nn


def _attended(
    module: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Softmax attention over (batch, heads, tokens, dim), projected: (batch, tokens, features)."""
    if module.fused_attn:
        dropped = module.attn_drop.p if module.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped, is_causal=is_causal)
    else:
        scores = (q * module.scale) @ k.transpose(-2, -1)
        scores = maybe_add_mask(scores, resolve_self_attn_mask(q.shape[-2], scores, bias, is_causal))
        x = module.attn_drop(scores.softmax(dim=-1)) @ v
    return x.transpose(1, 2).flatten(2)


def _qkv(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from one matrix, whose bias may be stored in three parts."""
    bias = module.qkv.bias
    if getattr(module, "q_bias", None) is not None:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    found = F.linear(x, module.qkv.weight, bias)
    return found.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class NarrowEva(eva.EvaAttention):
    """timm's EvaAttention with one qkv matrix, without norm or gate over the heads."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        q, k, v = _qkv(self, x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            prefix, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
            q, k = (
                torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)], 2).type_as(v)
                for t in (q, k)
            )
        return self.proj_drop(self.proj(_attended(self, q, k, v, attn_mask, is_causal)))


class NarrowBeit(beit.Attention):
    """timm's BEiT attention, with or without a relative position bias table."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self.proj_drop(self.proj(_attended(self, *_qkv(self, x), bias)))


class NarrowMetaFormer(metaformer.Attention):
    """timm's CAFormer attention."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(_attended(self, *_qkv(self, x))))


class NarrowFastVit(fastvit.Attention):
    """timm's FastViT attention, over (batch, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(-2, -1)
        found = self.proj_drop(self.proj(_attended(self, *_qkv(self, tokens))))
        return found.transpose(-2, -1).unflatten(-1, x.shape[-2:])


NARROW: dict[type[nn.Module], type[nn.Module]] = {
    eva.EvaAttention: NarrowEva,
    beit.Attention: NarrowBeit,
    metaformer.Attention: NarrowMetaFormer,
    fastvit.Attention: NarrowFastVit,
}
"""timm class → its replacement."""

FREE = (swin_transformer.WindowAttention, *NARROW.values())
"""Classes that derive the features of their heads from their weights."""


def lets_heads_go(module: nn.Module) -> bool:
    """Whether a timm module works with fewer heads, as it is or as its replacement."""
    return hasattr(module, "attn_dim") or type(module) in NARROW or type(module) in FREE


def let_go_(module: nn.Module) -> None:
    """Replaces a module's class by one that allows fewer heads; tensors and attributes are kept."""
    module.__class__ = NARROW.get(type(module), type(module))
