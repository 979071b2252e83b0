"""Attention maps, recorded while a model runs its own fused attention.

A `TorchFunctionMode` intercepts scaled dot-product attention and computes the weights alongside: no model is rewritten,
and timm, transformers and slim networks all work the same way.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            self.layers.append(_weights(**dict(zip(names, args, strict=False)) | kwargs))
        return func(*args, **kwargs)


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights (batch, heads, tokens, tokens) and a mask of living heads, (batch, heads).

    A pruned head has the same value at every token, its bias, so its attention has no effect.
    """
    scores = query.float() @ key.float().transpose(-2, -1) * (scale or 1.0 / math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        is_hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_hidden else scores + attn_mask.float()
    return scores.softmax(-1), (value != value[..., :1, :]).flatten(2).any(-1)


@contextmanager
def _fused(net: nn.Module) -> Iterator[None]:
    """Switches timm modules that would compute attention by hand, unseen by the recorder."""
    switched = [module for module in net.modules() if getattr(module, "fused_attn", None) is False]
    for module in switched:
        module.fused_attn = True
    try:
        yield
    finally:
        for module in switched:
            module.fused_attn = False


@torch.no_grad()
def attention(net: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Attention of every layer over the same tokens.

    Args:
        net: in evaluation mode.
        images: normalised, (batch, 3, size, size).

    Returns:
        Per layer, weights (batch, heads, tokens, tokens) and living heads (batch, heads); and the logits. No layers if
        attention does not span all tokens.
    """
    with _fused(net), _Recorder() as recorder:
        logits = net(images)
    found = [(w, alive) for w, alive in recorder.layers if w.ndim == 4 and len(w) == len(images)]
    tokens = {w.shape[-2:] for w, _ in found}
    if len(tokens) != 1 or len(set(tokens.pop())) != 1:  # windowed attention, or a varying number of tokens
        return [], [], logits
    return [w for w, _ in found], [alive for _, alive in found], logits


def mean_of_heads(weights: Tensor, alive: Tensor) -> Tensor:
    """Mean over living heads, (batch, tokens, tokens); the identity if there are none."""
    share = alive.float() / alive.sum(1, keepdim=True).clamp(min=1)  # (batch, heads)
    mean = (weights * share[:, :, None, None]).sum(1)
    own = torch.eye(weights.shape[-1], device=weights.device)
    return torch.where(alive.any(1)[:, None, None], mean, own)


def rollout(layers: list[Tensor], alive: list[Tensor]) -> Tensor:
    """Attention rollout, (batch, tokens, tokens): half of each layer is residual (Abnar & Zuidema 2020)."""
    total = None
    for weights, heads in zip(layers, alive, strict=True):
        own = torch.eye(weights.shape[-1], device=weights.device)
        step = 0.5 * mean_of_heads(weights, heads) + 0.5 * own
        total = step if total is None else step @ total
    return total


def over_patches(attended: Tensor) -> Tensor | None:
    """Attention over the square of patches, summing to one, (batch, side, side).

    Args:
        attended: (batch, tokens, tokens), tokens other than patches first. Attention is that of the class token;
            without one, the mean over all patches.

    Returns:
        None if the patches form no square.
    """
    tokens = attended.shape[-1]
    side = math.isqrt(tokens)
    prefix = tokens - side * side
    if prefix > 5:  # a class token and up to four registers, as in published models
        return None
    asked = attended[:, 0] if prefix else attended.mean(1)
    patches = asked[:, prefix:]
    return (patches / patches.sum(1, keepdim=True).clamp(min=1e-12)).view(-1, side, side)
