"""Criteria: how much a weight is worth. Scores have the weight's shape, float32; higher means keep.

A criterion sees trained weights, before any rewind. Registered by name; a new one is a function of this signature
under `@register_criterion`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vit_rsst.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Criterion = Callable[[Mapping[str, "Tensor"], int], dict[str, "Tensor"]]
"""(weights by name, seed of this selection) → scores by name."""

CRITERIA: Registry[Criterion] = Registry("criterion")
register_criterion = CRITERIA.register


@register_criterion("magnitude")
def magnitude(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """|w|: the weights that trained to a large value matter (Han et al. 2015)."""
    return {name: weight.detach().float().abs() for name, weight in weights.items()}


@register_criterion("random")
def random(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Uniform noise: the control that any criterion has to beat. The same on every device."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in weights.items()}
