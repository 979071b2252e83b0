"""The loss of a removal to second order: what a layer's outputs lose when elements or units leave and the others are
fitted again (Optimal Brain Surgeon, Hassibi & Stork 1993; by layer, Frantar et al. 2022, arXiv:2208.11580).

With the Gram matrix G of a layer's inputs and the damping λ of `compensation.least_squares`, H = G + λ I. If the set S
leaves a row w, the least ‖X w' − X w‖² + λ ‖w' − w‖² is w_Sᵀ ([H⁻¹]_SS)⁻¹ w_S. What leaves is eliminated one by one,
cheapest first, so that of two equal inputs only the first is free; the loss of an elimination is the score.
"""

import torch
from torch import Tensor

from vit_rsst.pruning.compensation import DAMPING

BLOCK = 32
"""Columns within which elements of a row are eliminated one after the other; the blocks of a row are scored apart."""
CHUNK = 2**24
"""Elements of the inverse matrices that are held at once."""


def inverse(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """H⁻¹ in float64: (in, in). A layer that sees only zeros loses nothing by any removal: 0."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    ridge = gram + damping * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(ridge))


def element_losses(weight: Tensor, inverted: Tensor, block: int = BLOCK) -> Tensor:
    """The loss of each element at its elimination from its row and block of columns, (out, in), float32.

    Args:
        weight: (out, in).
        inverted: H⁻¹, (in, in).
    """
    found = torch.empty_like(weight, dtype=torch.float32)
    for start in range(0, weight.shape[1], block):
        part = inverted[start : start + block, start : start + block].float()
        rows = max(CHUNK // part.numel(), 1)
        for first in range(0, len(weight), rows):
            piece = weight[first : first + rows, start : start + block].float()
            found[first : first + rows, start : start + block] = _eliminated(piece, part.expand(len(piece), -1, -1))
    return found


def _eliminated(w: Tensor, inverted: Tensor) -> Tensor:
    """Losses in the order of elimination, none less than the one before it: (rows, columns)."""
    w, inverted, rows = w.clone(), inverted.clone(), torch.arange(len(w), device=w.device)
    found, left = torch.zeros_like(w), torch.ones_like(w, dtype=torch.bool)
    largest = w.new_zeros(len(w))
    for _ in range(w.shape[1]):
        diagonal = inverted.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(w.dtype).tiny)
        losses = torch.where(left, w.square() / diagonal, torch.inf)
        loss, q = losses.min(1)
        largest = torch.maximum(largest, loss)
        found[rows, q] = largest
        left[rows, q] = False
        column = inverted[rows, q] / diagonal[rows, q].sqrt()[:, None]  # symmetric, so also the row
        w -= column * (w[rows, q] / diagonal[rows, q].sqrt())[:, None]
        inverted.baddbmm_(column[:, :, None], column[:, None], alpha=-1)
    return found


def unit_losses(weight: Tensor, inverted: Tensor, index: Tensor, block: int = BLOCK) -> Tensor:
    """The loss of each unit at its elimination from the layer that consumes it, and its block of units: (units,).

    Args:
        weight: of the consumer, (out, in).
        inverted: H⁻¹ of its inputs, (in, in).
        index: the columns of each unit, (units, span).
    """
    found = []
    for part in index.split(block):
        columns = part.flatten()
        places = torch.arange(len(columns), device=columns.device).view_as(part)
        found.append(_eliminated_units(weight[:, columns].double(), inverted[columns][:, columns].double(), places))
    return torch.cat(found).float()


def _eliminated_units(w: Tensor, inverted: Tensor, index: Tensor) -> Tensor:
    """Losses in the order of elimination, none less than the one before it: (units,)."""
    found, left = w.new_zeros(len(index)), torch.ones(len(index), dtype=torch.bool, device=w.device)
    largest = w.new_zeros(())
    for _ in range(len(index)):
        blocks, owned = inverted[index[:, :, None], index[:, None]], w[:, index].permute(1, 2, 0)  # (units, span, …)
        loss, u = torch.where(left, (owned * torch.linalg.solve(blocks, owned)).sum((1, 2)), torch.inf).min(0)
        largest = torch.maximum(largest, loss)
        found[u], left[u], own = largest, False, index[u]
        shares = torch.linalg.solve(inverted[own][:, own], inverted[own])  # (span, in)
        w, inverted = w - w[:, own] @ shares, inverted - inverted[:, own] @ shares
        w[:, own] = inverted[own] = inverted[:, own] = 0.0
        inverted[own, own] = 1.0
    return found
