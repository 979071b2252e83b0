"""The order of a stream: arithmetic over blocks, as good as a full shuffle."""

import numpy as np
import pytest

from vit_rsst.data.lanes import Epoch, cut
from vit_rsst.errors import InputError


def entropy(batches: np.ndarray, labels: np.ndarray) -> float:
    """Mean class entropy of global batches, in nats."""
    counts = np.stack([np.bincount(labels[batch], minlength=labels.max() + 1) for batch in batches])
    shares = counts / counts.sum(1, keepdims=True)
    return float(-(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(1).mean())


def shared_neighbours(first: np.ndarray, second: np.ndarray) -> int:
    """Pairs of rows that follow each other in two orders."""
    pairs = [{tuple(sorted(pair)) for pair in zip(o.ravel(), o.ravel()[1:], strict=False)} for o in (first, second)]
    return len(pairs[0] & pairs[1])


def shared_batches(first: np.ndarray, second: np.ndarray) -> int:
    """Pairs of rows that lie in one batch in two orders."""
    of = [dict(zip(o.ravel().tolist(), np.repeat(np.arange(len(o)), o.shape[1]).tolist(), strict=True)) for o in
          (first, second)]  # fmt: skip
    both = [(of[0][row], of[1][row]) for row in of[0].keys() & of[1].keys()]
    counts = np.unique(np.asarray(both), axis=0, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def one_class_shards() -> list[int]:
    """Rows of 64 shards of 10 classes of 5,000 images, each of one class."""
    return [len(part) for c in range(10) for part in np.array_split(np.arange(5000), 7 if c < 4 else 6)]


@pytest.mark.parametrize("counts", [[1000], [7, 0, 993], [50] * 20, [1] * 1000, [333, 3, 500, 164]])
@pytest.mark.parametrize("global_batch", [8, 24, 250])
def test_an_epoch_has_every_row_once_less_a_tail_below_one_batch(counts, global_batch):
    lanes = cut(np.asarray(counts), 1000, global_batch, 128)
    rows = lanes.order(0, global_batch).ravel()
    assert len(rows) == 1000 // global_batch * global_batch
    assert len(set(rows.tolist())) == len(rows)


def test_no_row_is_always_in_the_tail():
    lanes = cut(np.asarray([1000]), 1000, 64, 128)
    seen = {row for seed in range(40) for row in lanes.order(seed, 64).ravel().tolist()}
    assert len(seen) == 1000


@pytest.mark.parametrize("rows_of_a_block", [100, 6250])
@pytest.mark.parametrize("shards", [[6250] * 8, one_class_shards()], ids=["8 sorted", "64 of one class"])
def test_shards_of_one_class_are_shuffled_as_well_as_in_memory(shards, rows_of_a_block):
    counts = [min(rows_of_a_block, shard - row) for shard in shards for row in range(0, shard, rows_of_a_block)]
    labels, full = np.repeat(np.arange(10), 5000), np.random.default_rng(0).permutation(50_000)[: 195 * 256]
    lanes = cut(np.asarray(counts), 100_000, 256, 4096)
    epochs = [lanes.order(seed, 256) for seed in range(5)]
    for found in epochs:
        assert entropy(found, labels) >= 0.97 * entropy(full.reshape(195, 256), labels)
    pairs = [(a, b) for i, a in enumerate(epochs) for b in epochs[:i]]
    # Two full shuffles share 2 of 50,000 neighbours (without tracks it would be 76), and 32,500 pairs of one batch.
    # Where a whole shard is one block, its halves may meet again in all lanes at once: the mean is that of chance, the
    # spread is not.
    assert np.mean([shared_neighbours(a, b) for a, b in pairs]) < 2 + 4
    assert np.mean([shared_batches(a, b) for a, b in pairs]) < 1.03 * 32_500


def test_lanes_are_the_largest_divisor_of_the_global_batch_up_to_64():
    counts = np.full(1000, 100)
    assert [cut(counts, 10**6, size, 4096).lanes for size in (256, 1024, 96, 100, 127, 1)] == [64, 64, 48, 50, 1, 1]
    assert cut(counts, 10**6, 256, 4096, lanes=32).lanes == 32
    with pytest.raises(
        InputError, match=r"data\.lanes: 48 does not divide train\.global_batch=256; choose one of 1, 2"
    ):
        cut(counts, 10**6, 256, 4096, lanes=48)


def test_large_blocks_make_fewer_lanes_and_tracks():
    assert (cut(np.full(1000, 100), 11 * 2**20, 256, 4096).tracks) == 2
    large = cut(np.full(1000, 1000), 100 * 2**20, 256, 4096)
    assert (large.lanes, large.tracks) == (32, 1)


def test_small_blocks_are_joined_before_they_are_shuffled():
    lanes = cut(np.full(40_000, 1), 1000, 64, 4096)
    windows = Epoch(lanes, 0).windows(0, 0)
    assert lanes.tracks == 16
    assert {window.last - window.first for window in windows[:-1]} == {4}
