"""ViT with dynamic token pruning (DynamicViT, Rao et al. 2021): `dynamic_vit`.

Before some blocks a predictor scores the remaining patches. In training it samples which to keep (straight-through
Gumbel-softmax) and masks the others in attention, so that gradients reach the decision; a ratio loss pulls the kept
fraction towards `keep_ratio` to the power of the stage. In evaluation exactly that fraction, the best, is kept; the
rest is dropped and costs nothing.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerNorm
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Predictor(nn.Module):
    """Scores for keeping and dropping each token, from the token and the mean of all alive tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.embed = nn.Sequential(LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2),
        )  # fmt: skip

    def forward(self, tokens: Tensor, alive: Tensor) -> Tensor:
        """(batch, patches, width) and alive mask (batch, patches, 1) → (batch, patches, 2)."""
        own, shared = self.embed(tokens).chunk(2, dim=-1)
        mean = (shared * alive).sum(1, keepdim=True) / (alive.sum(1, keepdim=True) + 1e-6)  # possibly none is alive
        return self.decide(torch.cat([own, mean.expand_as(own)], dim=-1)).float()


class SparseAttention(Attention):
    """Self-attention in which dropped tokens are attended to only by themselves."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(batch, tokens, width) → the same.

        Args:
            attn_mask: 1 for alive tokens, 0 for dropped ones, (batch, tokens, 1), with gradients.
        """
        if attn_mask is None:
            return super().forward(x)
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = (self.q_norm(query) * self.scale @ self.k_norm(key).transpose(-2, -1)).float()
        seen = attn_mask[:, None, :, 0].unsqueeze(1)  # (batch, 1, 1, tokens)
        itself = torch.eye(x.shape[1], device=x.device)
        weights = (scores - scores.detach().amax(-1, keepdim=True)).exp() * (seen + (1.0 - seen) * itself)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)  # visible scores may be far below the maximum
        mixed = self.attn_drop(weights.to(value.dtype)) @ value  # (batch, heads, tokens, …)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class DynamicVit(VisionTransformer):
    """timm's ViT with a predictor before some of its blocks.

    Args:
        stages: indices of the blocks before which tokens are dropped.
        keep_ratio: fraction of patches kept at each stage; 1 drops none: a plain ViT.
        ratio_weight: weight of the ratio loss.
        kwargs: arguments of timm's ViT.

    Raises:
        ValueError: a ratio outside (0, 1], stages that are not increasing block indices, or a negative weight.
    """

    task_modules = ("predictors",)
    """Not pruned, and absent from weights published for a plain ViT."""

    def __init__(
        self, stages: Sequence[int] = (1, 2, 4), keep_ratio: float = 0.7, ratio_weight: float = 2.0, **kwargs: object
    ):
        super().__init__(attn_layer=SparseAttention, global_pool="token", **kwargs)
        if not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio {keep_ratio} is not in (0, 1]")
        if not ratio_weight >= 0.0:
            raise ValueError(f"ratio_weight {ratio_weight} is negative")
        if not stages:
            raise ValueError("stages is empty; to drop no tokens, set keep_ratio=1")
        if list(stages) != sorted(set(stages)) or not set(stages) <= set(range(len(self.blocks))):
            raise ValueError(f"stages {list(stages)} must be increasing block indices, 0 to {len(self.blocks) - 1}")
        self.stages, self.keep_ratio, self.ratio_weight = list(stages), keep_ratio, ratio_weight
        self.predictors = nn.ModuleList(Predictor(self.embed_dim) for _ in stages if keep_ratio < 1.0)
        self.predictors.apply(self._init_weights)
        self._ratio_loss = torch.zeros(())

    def shares(self) -> list[float]:
        """Fraction of patches left after each stage."""
        return [self.keep_ratio**stage for stage in range(1, len(self.stages) + 1)]

    def auxiliary_loss(self) -> Tensor:
        """The ratio loss of the last training forward pass: squared distance of the kept fraction from its target."""
        return self._ratio_loss

    def forward_features(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """(batch, channels, height, width) → (batch, tokens, width): all tokens in training, else the kept ones."""
        if self.keep_ratio == 1.0:
            return super().forward_features(x)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        return self.norm(self._while_drawing(x) if self.training else self._while_cutting(x))

    def _while_cutting(self, x: Tensor) -> Tensor:
        """Drops all but the best patches at each stage, preserving their order."""
        first, total = self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens
        for number, block in enumerate(self.blocks):
            if number in self.stages:
                stage = self.stages.index(number)
                patches = x[:, first:]
                keep, drop = self.predictors[stage](patches, torch.ones_like(patches[:, :, :1])).unbind(-1)
                best = (keep - drop).topk(max(int(self.shares()[stage] * total), 1)).indices.sort().values
                left = patches.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
                x = torch.cat([x[:, :first], left], dim=1)
            x = block(x)
        return x

    def _while_drawing(self, x: Tensor) -> Tensor:
        """Samples which patches to keep, and masks the others so that gradients flow."""
        first, distances = self.num_prefix_tokens, []
        alive = x.new_ones(x.shape[0], x.shape[1] - first, 1, dtype=torch.float32)
        prefix, mask = alive.new_ones(len(x), first, 1), None
        for number, block in enumerate(self.blocks):
            if number in self.stages:
                stage = self.stages.index(number)
                scores = self.predictors[stage](x[:, first:], alive)
                alive = alive * F.gumbel_softmax(scores, hard=True)[..., :1]  # dropped tokens stay dropped
                distances.append((alive.mean((1, 2)) - self.shares()[stage]).square().mean())
                mask = torch.cat([prefix, alive], dim=1)
            if self.grad_checkpointing:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
        self._ratio_loss = self.ratio_weight * torch.stack(distances).mean()
        return x
