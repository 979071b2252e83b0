"""Arithmetic on lists of tensors, against the same in float64, one by one."""

import pytest
import torch
from torch import Tensor

from vit_rsst.pruning.foreach import factors, products, subtract_, zero_

SHAPES = [(7, 5), (1, 33), (4, 3, 2, 2), (0, 4)]


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found = [torch.empty(shape, dtype=dtype).normal_(generator=draw) for shape in SHAPES]
    found[2] = found[2].to(memory_format=torch.channels_last)
    return found


def masks(seed: int) -> list[Tensor]:
    return [tensor > 0 for tensor in drawn(seed)]


def test_on_the_cpu_factors_share_the_memory_of_their_masks():
    chosen = masks(1)
    made = factors(chosen, drawn(0))
    assert [f.data_ptr() for f in made] == [mask.data_ptr() for mask in chosen]
    assert all(f.dtype == torch.int8 and torch.equal(f == 1, mask) for f, mask in zip(made, chosen, strict=True))


@pytest.mark.parametrize("where", [True, False])
@pytest.mark.parametrize("form", [torch.int8, torch.float32, torch.bool])
def test_zero_leaves_the_rest_bit_for_bit(form, where):
    tensors, chosen = drawn(0), masks(1)
    expected = [torch.where(mask == where, 0.0, tensor) for tensor, mask in zip(tensors, chosen, strict=True)]
    zero_(tensors, [mask.to(form) for mask in chosen], where)
    assert all(torch.equal(tensor, one) for tensor, one in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("where", [True, False])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_not_hidden(value, where):
    tensors = [torch.tensor([value, 1.0, 2.0])]
    zero_(tensors, [torch.tensor([where, where, not where]).to(torch.int8)], where)
    assert tensors[0].isnan().tolist() == [True, False, False]
    assert tensors[0][1:].tolist() == [0.0, 2.0]


def test_products_of_several_pairs():
    ours, theirs, more = drawn(0), drawn(1), masks(2)
    first, none, second = products((ours, theirs), ([], []), (theirs, factors(more, theirs)))
    assert none == []
    assert all(torch.equal(found, a * b) for found, a, b in zip(first, ours, theirs, strict=True))
    assert all(torch.equal(found, a * b) for found, a, b in zip(second, theirs, more, strict=True))
    assert products() == []
    assert products(([], [])) == [[]]


@pytest.mark.parametrize("share", [1.0, 0.25, torch.tensor(0.25)], ids=str)
@pytest.mark.parametrize("skipped", [None, 0.0, 1.0])
def test_a_share_is_subtracted_unless_the_step_was_skipped(share, skipped):
    tensors = drawn(0) + drawn(1, torch.float64)
    others = drawn(2) + drawn(3, torch.float64)
    others[2] = others[2].contiguous()  # laid out unlike its tensor
    if skipped:
        others[0][0, 0], others[1][0, 0] = torch.nan, torch.inf
    pairs = zip(tensors, others, strict=True)
    expected = [t.double() - (0 if skipped else float(share) * o.double()) for t, o in pairs]
    subtract_(tensors, others, share, None if skipped is None else torch.tensor(skipped))
    for tensor, one in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.double(), one, rtol=1e-6, atol=1e-7)
