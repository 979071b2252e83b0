"""Selection: from scores to a mask that keeps exactly k elements, ties broken by index, in float32."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vit_rsst.pruning.masks import MaskSet


def keep_top(scores: Mapping[str, Tensor], alive: MaskSet, density: float, scope: str) -> MaskSet:
    """Keeps the elements of the highest score among those alive.

    Args:
        scores: per weight, its shape; higher means keep.
        alive: what may be kept; the dead stay dead whatever their score.
        density: share of all elements to keep, 0 … 1. Exactly round(density · elements) survive, less where fewer
            are alive.
        scope: `global` ranks all weights together, `layer` gives each weight the same density.

    Raises:
        ValueError: a score is not a number.
    """
    if scope == "layer":
        kept = {}
        for name in alive:
            kept.update(_keep_k({name: scores[name]}, MaskSet({name: alive[name]}), density))
        return MaskSet(kept)
    return MaskSet(_keep_k(scores, alive, density))


def _keep_k(scores: Mapping[str, Tensor], alive: MaskSet, density: float) -> dict[str, Tensor]:
    """One competition: the k-th largest score is the threshold; those equal to it are kept by index until k are."""
    k = min(round(density * alive.num_elements), alive.num_alive)
    if k == 0:
        return {name: torch.zeros_like(mask) for name, mask in alive.masks.items()}
    flat = np.empty(alive.num_elements, dtype=np.float32)  # the one copy of all scores
    start = 0
    for name, mask in alive.masks.items():
        end = start + mask.numel()
        flat[start:end] = scores[name].float().masked_fill(~mask, -torch.inf).flatten().cpu().numpy()
        start = end
    if np.isnan(flat).any():
        raise ValueError("pruning.criterion: a score is not a number; the weights or the statistics have diverged.")
    flat.partition(flat.size - k)
    threshold = float(flat[flat.size - k])
    kept = {name: ((scores[name].float() > threshold) & mask).contiguous() for name, mask in alive.masks.items()}
    missing = k - sum(int(mask.sum()) for mask in kept.values())
    for name, mask in alive.masks.items():
        if missing == 0:
            break
        ties = ((scores[name].float() == threshold) & mask).flatten().nonzero().flatten()[:missing]
        kept[name].view(-1)[ties] = True
        missing -= len(ties)
    return kept
