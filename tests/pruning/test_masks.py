"""MaskSet: set algebra on literal masks, packing round trips, fingerprints."""

import hashlib

import numpy as np
import pytest
import torch

from vit_rsst.pruning.masks import MaskSet, pack_bits, unpack_bits


def mask(*rows: list[int], name: str = "w") -> MaskSet:
    return MaskSet({name: torch.tensor(rows, dtype=torch.bool)})


A, B = mask([1, 1, 0], [0, 1, 0]), mask([1, 0, 0], [1, 1, 0])


def test_and_or_and_minus_by_hand():
    assert torch.equal((A & B)["w"], torch.tensor([[True, False, False], [False, True, False]]))
    assert torch.equal((A | B)["w"], torch.tensor([[True, True, False], [True, True, False]]))
    assert torch.equal(A.minus(B)["w"], torch.tensor([[False, True, False], [False, False, False]]))


def test_operations_return_new_sets_and_leave_their_operands_unchanged():
    before = A.fingerprint(), B.fingerprint()
    _ = (A & B, A | B, A.minus(B))
    assert (A.fingerprint(), B.fingerprint()) == before


def test_nested_means_that_nothing_outside_is_alive():
    assert (A & B).nested_in(A)
    assert A.nested_in(A)
    assert not A.nested_in(B)
    assert not (A | B).nested_in(A)


def test_masks_of_different_weights_do_not_combine():
    with pytest.raises(AssertionError):
        _ = A & mask([1], name="other")


def test_density_is_over_all_elements_and_the_report_lists_it_by_weight():
    both = MaskSet({"a": torch.tensor([True, False]), "b": torch.tensor([[True, True, True], [True, False, True]])})
    assert (both.num_alive, both.num_elements, both.density) == (6, 8, 0.75)
    assert both.layers() == {
        "a": {"elements": 2, "alive": 1, "density": 0.5},
        "b": {"elements": 6, "alive": 5, "density": pytest.approx(5 / 6)},
    }


def test_a_full_set_has_the_shapes_of_its_weights_and_everything_alive():
    full = MaskSet.full({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    assert {name: tuple(full[name].shape) for name in full} == {"a": (2, 3), "b": (4,)}
    assert full.density == 1.0
    assert all(t.dtype == torch.bool for t in full.tensors())


def test_bits_are_packed_row_major_most_significant_first():
    bits = pack_bits(torch.tensor([[True, False, True], [False, False, False], [True, True, True]]))
    assert bits.tolist() == [0b10100011, 0b10000000]


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (1, 1), (5, 1, 3), (2, 3, 5, 7), (0,), (3, 0)])
def test_packing_round_trips_for_any_shape(shape):
    original = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = pack_bits(original)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-original.numel() // 8)
    assert torch.equal(unpack_bits(bits, shape), original)


def test_a_whole_set_round_trips_through_its_bits():
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.zeros(5, 3), "b.c": torch.zeros(11)}
    original = MaskSet({name: torch.rand(w.shape, generator=generator) < 0.3 for name, w in weights.items()})
    back = MaskSet.unpack(original.pack(), weights)
    assert list(back) == list(original)
    assert all(torch.equal(back[name], original[name]) for name in weights)
    assert back.fingerprint() == original.fingerprint()


def test_the_layout_in_memory_changes_neither_bits_nor_fingerprint():
    straight = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    turned = straight.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(pack_bits(turned), pack_bits(straight))


def test_the_fingerprint_is_sixteen_digits_of_the_sha256_over_names_and_bits():
    expected = hashlib.sha256(b"w\0" + np.packbits([1, 1, 0, 0, 1, 0]).tobytes()).hexdigest()[:16]
    assert A.fingerprint() == expected


def test_fingerprints_are_equal_for_equal_masks_and_change_with_any_bit_or_name():
    same = mask([1, 1, 0], [0, 1, 0])
    one_bit = mask([1, 1, 0], [0, 1, 1])
    renamed = mask([1, 1, 0], [0, 1, 0], name="v")
    assert A.fingerprint() == same.fingerprint()
    assert len({A.fingerprint(), one_bit.fingerprint(), renamed.fingerprint(), B.fingerprint()}) == 4
