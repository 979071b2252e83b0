"""Swapping: a mask that moves at constant density, as in dynamic sparse training. Pure: tensors in, MaskSet out.

Every weight keeps its number of alive elements: its smallest are dropped, and as many of those that were dead before
grow (Mocanu et al. 2018; Evci et al. 2020). RigL's own code lets an element grow again that it has just dropped; here
such an element waits for the next update.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vit_rsst import shards
from vit_rsst.pruning.contest import Entry, contest
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.seeds import derived_seed


def swap(
    weights: Mapping[str, Tensor],
    alive: MaskSet,
    share: float,
    gradients: Mapping[str, Tensor] | None,
    seed: int,
    window: int | None = None,
) -> MaskSet:
    """Replaces a share of the alive elements of each weight.

    Args:
        weights: by name; the smallest in magnitude are dropped.
        share: of the alive elements, 0 … 1; no more are replaced than there are dead ones.
        gradients: those of largest magnitude grow, shaped like the weights and finite; None: drawn at random.
        seed: of the draw, which is the same on every device.
        window: M of N:M, in which elements are dropped and grow within the same M consecutive inputs, at most one at a
            time; None: anywhere in the weight.
    """
    moved, layers = {}, alive.layers()  # counted at once: a GPU is waited for once
    for name, weight in weights.items():
        growth = _drawn(weight, derived_seed(seed, name)) if gradients is None else gradients[name].abs().float()
        size, mask, number = weight.detach().abs().float(), alive[name], int(layers[name]["alive"])
        if window is None:
            moved[name] = _anywhere(size, growth, mask, number, share)
        else:
            moved[name] = _within_windows(size, growth, mask, number, share, window)
    return MaskSet(moved)


def _anywhere(size: Tensor, growth: Tensor, alive: Tensor, number: int, share: float) -> Tensor:
    count = min(round(share * number), alive.numel() - number)
    [kept] = contest([Entry("kept", "", size, alive)], number - count)
    [grown] = contest([Entry("grown", "", growth, ~alive)], count)
    return kept | grown


def _within_windows(size: Tensor, growth: Tensor, alive: Tensor, number: int, share: float, m: int) -> Tensor:
    """Swaps one element of each of the windows whose smallest alive element is smallest."""
    assert not shards.is_sharded(size), "windows of shards"
    places = alive.movedim(1, -1).shape  # (out, …, in)
    mask = alive.movedim(1, -1).reshape(-1, m).clone()  # (windows, m)
    smallest, dropped = size.movedim(1, -1).reshape(-1, m).masked_fill(~mask, torch.inf).min(1)
    grown = growth.movedim(1, -1).reshape(-1, m).masked_fill(mask, -torch.inf).argmax(1)
    can_swap = mask.any(1) & ~mask.all(1)
    [chosen] = contest([Entry("windows", "", -smallest, can_swap)], round(share * number))
    for place in (dropped, grown):  # alive and dead, so that both change
        mask ^= torch.zeros_like(mask).scatter_(1, place[:, None], chosen[:, None])
    return mask.view(places).movedim(-1, 1).contiguous()


def _drawn(weight: Tensor, seed: int) -> Tensor:
    return shards.placed(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)), weight)
