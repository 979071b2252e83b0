"""Batches: the same global batch on any number of ranks, every sample once, augmentation against a loop over pixels."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import CPU, MEAN, STD, images

from vit_rsst.data.dealing import Dealing, steps_per_epoch
from vit_rsst.data.loaders import Batch, InMemoryLoader, evaluation_batches
from vit_rsst.data.tables import Split
from vit_rsst.data.transforms import Augmentation, normalize
from vit_rsst.errors import InputError
from vit_rsst.progress import Progress

PLAIN = Augmentation()
CROP_AND_FLIP = Augmentation(2, 0.5)


def loader(
    num_processes: int = 1,
    rank: int = 0,
    per_device: int | None = None,
    augmentation: Augmentation = CROP_AND_FLIP,
    seed: int = 0,
    split: Split | None = None,
) -> InMemoryLoader:
    dealing = Dealing.of(8, per_device, num_processes)
    return InMemoryLoader(dealing, rank, CPU, seed, augmentation, MEAN, STD, split=split or images(43, seed=5))


def epoch(of: InMemoryLoader, number: int = 0, step: int = 0, round: int = 0) -> list[list[Batch]]:
    """All steps of an epoch: 43 samples make 5 of 8."""
    return list(of.steps(Progress(5, (4, 4), round, number, step)))


def joined(steps: list[list[Batch]]) -> list[Batch]:
    """Global batches: the concatenated micro-batches of each step."""
    return [tuple(torch.cat(parts) for parts in zip(*micro, strict=True)) for micro in steps]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for (x, y), (a, b) in zip(found, expected, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


# -- dealing


@pytest.mark.parametrize("num_processes, per_device", [(1, 4), (1, 2), (2, None), (2, 2), (4, 1), (8, None)])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(num_processes, per_device):
    expected = joined(epoch(loader(), number=1))
    ranks = [epoch(loader(num_processes, rank, per_device), number=1) for rank in range(num_processes)]
    accumulation = 8 // (num_processes * (per_device or 8 // num_processes))
    assert all(len(micro) == accumulation for steps in ranks for micro in steps)
    # within a step: micro-batch after micro-batch, and in each of them rank after rank
    together = [
        [steps[step][micro] for micro in range(accumulation) for steps in ranks] for step in range(len(expected))
    ]
    assert_same(joined(together), expected)


def test_every_sample_comes_once_per_epoch_except_the_incomplete_last_batch():
    numbered = Split(torch.arange(43).view(43, 1, 1, 1).expand(43, 3, 4, 4).byte().contiguous(), torch.arange(43))
    orders = []
    for number in range(3):
        labels = torch.cat([y for _, y in joined(epoch(loader(split=numbered, augmentation=PLAIN), number))])
        counts = Counter(labels.tolist())
        assert len(counts) == 40
        assert set(counts.values()) == {1}
        orders.append(labels.tolist())
    assert orders[0] != orders[1] != orders[2]
    dropped = [set(range(43)) - set(order) for order in orders]
    assert len({frozenset(d) for d in dropped}) > 1, "the tail differs from epoch to epoch"


def test_images_keep_their_labels():
    numbered = Split(torch.arange(43).view(43, 1, 1, 1).expand(43, 3, 4, 4).byte().contiguous(), torch.arange(43))
    for x, y in joined(epoch(loader(2, 1, 2, augmentation=PLAIN, split=numbered))):
        assert torch.equal(((x * STD[0] + MEAN[0]) * 255).round()[:, 0, 0, 0].long(), y)


@pytest.mark.parametrize("num_processes, per_device", [(1, None), (1, 2), (2, 2)])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_an_epoch_resumed_mid_way_yields_the_same_batches(step, num_processes, per_device):
    for rank in range(num_processes):
        whole = epoch(loader(num_processes, rank, per_device), number=2)
        rest = epoch(loader(num_processes, rank, per_device), number=2, step=step)
        assert_same(joined(rest), joined(whole[step:]))


def test_progress_may_advance_while_the_epoch_is_iterated():
    progress = Progress(5, (4, 4), 0, 1)
    found = []
    for micro_batches in loader().steps(progress):
        found.append(micro_batches)
        progress.advance()
    assert_same(joined(found), joined(epoch(loader(), number=1)))


def test_seed_epoch_and_round_each_change_order_and_augmentation():
    first = joined(epoch(loader()))[0]
    plain = loader(augmentation=PLAIN)
    order = joined(epoch(plain))[0]
    for other, plain_other in (
        (epoch(loader(seed=1)), epoch(loader(seed=1, augmentation=PLAIN))),
        (epoch(loader(), number=1), epoch(plain, number=1)),
        (epoch(loader(), round=1), epoch(plain, round=1)),
    ):
        assert not torch.equal(joined(other)[0][0], first[0])
        assert not torch.equal(joined(plain_other)[0][0], order[0])
    assert_same(joined(epoch(loader())), joined(epoch(loader())))
    same = Split(torch.full((43, 3, 8, 8), 9, dtype=torch.uint8), torch.zeros(43, dtype=torch.int64))
    one_image = [batch for number in range(3) for batch in joined(epoch(loader(split=same), number))]
    assert len({x.numpy().tobytes() for x, _ in one_image}) == 15, "each step of each epoch draws its own crops"


def test_the_arithmetic_of_a_global_batch():
    assert Dealing.of(256, 32, 4) == Dealing(256, 32, 4, 2)
    assert Dealing.of(256, None, 8) == Dealing(256, 32, 8, 1)
    for global_batch, per_device, processes in ((100, 16, 1), (8, 16, 1), (3, None, 8), (10, None, 4)):
        with pytest.raises(InputError, match="global_batch"):
            Dealing.of(global_batch, per_device, processes)
    assert [steps_per_epoch(*case) for case in ((43, 8, None), (40, 8, None), (43, 8, 3), (43, 8, 9))] == [5, 5, 3, 5]
    with pytest.raises(InputError, match="more than the 7"):
        steps_per_epoch(7, 8, None)


# -- augmentation and normalisation


def by_pixel(image: np.ndarray, top: int, left: int, flip: bool, padding: int) -> np.ndarray:
    """Zero-pads, crops a window of the original size, flips it."""
    channels, height, width = image.shape
    found = np.zeros_like(image)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                row, column = y + top - padding, x + left - padding
                if 0 <= row < height and 0 <= column < width:
                    found[c, y, width - 1 - x if flip else x] = image[c, row, column]
    return found


@pytest.mark.parametrize(
    "padding, hflip, size", [(2, 0.5, (6, 6)), (1, 1.0, (5, 7)), (0, 0.5, (4, 4)), (3, 0.0, (4, 6))]
)
def test_crops_and_flips_are_those_of_a_loop_over_pixels(padding, hflip, size):
    originals = torch.randint(0, 256, (16, 3, *size), generator=torch.Generator().manual_seed(3)).byte()
    augmentation = Augmentation(padding, hflip)
    drawn = augmentation.draw(16, seed=7)
    offsets, flips, _ = drawn
    found = augmentation.moved(originals, drawn)
    assert found.dtype == torch.uint8
    for i in range(16):
        expected = by_pixel(originals[i].numpy(), int(offsets[i, 0]), int(offsets[i, 1]), bool(flips[i]), padding)
        assert np.array_equal(found[i].numpy(), expected), i
    if hflip == 0.5:
        assert 0 < flips.sum() < 16
    else:
        assert flips.all() == bool(hflip)


def test_offsets_cover_every_shift_and_flips_have_the_requested_frequency():
    offsets, flips, _ = Augmentation(2, 0.25).draw(20_000, seed=0)
    counts = torch.zeros(5, 5).index_put((offsets[:, 0], offsets[:, 1]), torch.ones(20_000), accumulate=True)
    assert counts.min() > 600  # 800 each on average
    assert counts.max() < 1000
    assert flips.double().mean() == pytest.approx(0.25, abs=0.015)


def test_without_padding_and_flips_images_are_unchanged():
    originals = images(8, seed=1).images
    assert torch.equal(PLAIN.moved(originals, PLAIN.draw(8, seed=0)), originals)


def test_normalisation_is_the_formula_in_float64():
    originals = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16).byte()
    mean, std = (0.5, 0.4, 0.1), (0.25, 0.2, 0.5)
    found = normalize(originals, mean, std)
    assert found.dtype == torch.float32
    for c in range(3):
        expected = (np.arange(256) / 255.0 - mean[c]) / std[c]
        assert np.abs(found[0, c].flatten().double().numpy() - expected).max() < 1e-6
    assert originals.max() == 255, "the source is not written to"


# -- evaluation


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_evaluation_sees_every_sample_once_over_all_ranks_without_augmentation(num_processes):
    split = images(43, seed=5)
    found: list[tuple[Tensor, Tensor]] = []
    for rank in range(num_processes):
        found += evaluation_batches(split, 5, rank=rank, num_processes=num_processes, device=CPU, mean=MEAN, std=STD)
    x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert len(y) == 43
    expected = normalize(split.images, MEAN, STD)
    assert sorted(i.numpy().tobytes() for i in x) == sorted(i.numpy().tobytes() for i in expected)
    if num_processes == 1:
        assert torch.equal(x, expected)
        assert torch.equal(y, split.labels)
