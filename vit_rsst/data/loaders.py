"""Loaders: deal global batches to ranks and micro-batches. An epoch is a whole number of optimizer steps everywhere.

`InMemoryLoader` gathers and augments whole batches on the device. A loader of another kind offers the same
`steps_per_epoch` and `steps`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vit_rsst.data.sources import Split
from vit_rsst.data.transforms import Augmentation, normalize
from vit_rsst.errors import InputError
from vit_rsst.progress import Progress
from vit_rsst.seeds import derived_seed

Batch = tuple[Tensor, Tensor]
"""Images float32 (batch, 3, size, size), labels int64 (batch,), on the device."""


@dataclass(frozen=True)
class Dealing:
    """How a global batch is divided: `global_batch = batch_per_device × num_processes × accumulation`."""

    global_batch: int
    batch_per_device: int
    num_processes: int
    accumulation: int

    @classmethod
    def of(cls, global_batch: int, batch_per_device: int | None, num_processes: int) -> "Dealing":
        """Derives the accumulation; without `batch_per_device` there is none.

        Raises:
            InputError: the numbers do not divide, with the arithmetic.
        """
        per_device = batch_per_device or global_batch // num_processes
        accumulation, rest = divmod(global_batch, max(per_device, 1) * num_processes)
        if rest or not accumulation:
            raise InputError(
                f"train.global_batch: {global_batch} cannot be divided into {num_processes} processes × "
                f"{per_device} images a device; choose a multiple of {max(per_device, 1) * num_processes}, or another "
                "train.batch_per_device."
            )
        return cls(global_batch, per_device, num_processes, accumulation)

    def __str__(self) -> str:
        return (
            f"{self.global_batch} = {self.batch_per_device} a device × {self.num_processes} processes "
            f"× {self.accumulation} accumulated"
        )


def steps_per_epoch(num_samples: int, global_batch: int, limit: int | None) -> int:
    """Whole global batches in an epoch; the tail that does not fill one is dropped.

    Raises:
        InputError: there is not even one.
    """
    steps = num_samples // global_batch
    if steps == 0:
        raise InputError(f"train.global_batch: {global_batch} is more than the {num_samples} training images.")
    return min(steps, limit or steps)


@dataclass
class InMemoryLoader:
    """Training batches from memory; order and augmentation are pure functions of seed and progress.

    Attributes:
        split: the training images, on the device that should gather and augment them.
        dealing: how a global batch is divided.
        rank: of this process.
        device: where the batches go.
    """

    split: Split
    dealing: Dealing
    rank: int
    device: torch.device
    seed: int
    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def steps(self, progress: Progress) -> Iterator[list[Batch]]:
        """From the step at which `progress` stands to the end of its epoch: this rank's micro-batches of each step."""
        size = self.dealing.global_batch
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", progress.global_epoch))
        order = torch.randperm(len(self.split), generator=generator)
        first = progress.global_step - progress.step
        for step in range(progress.step, progress.steps_per_epoch):
            rows = order[step * size : (step + 1) * size]
            drawn = self.augmentation.draw(size, derived_seed(self.seed, "augmentation", first + step))
            yield [self._batch(rows, *drawn, micro) for micro in range(self.dealing.accumulation)]

    def _batch(self, rows: Tensor, offsets: Tensor, flips: Tensor, micro: int) -> Batch:
        size = self.dealing.batch_per_device
        start = (micro * self.dealing.num_processes + self.rank) * size
        part = slice(start, start + size)
        index = rows[part].to(self.split.images.device)
        images = self.augmentation.apply(self.split.images[index], offsets[part], flips[part])
        labels = self.split.labels[index]
        images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
        return normalize(images, self.mean, self.std), labels


def evaluation_batches(
    split: Split, batch: int, rank: int, num_processes: int, device: torch.device, mean: tuple, std: tuple
) -> Iterator[Batch]:
    """Every sample of the split exactly once over all ranks, in order, without augmentation."""
    for start in range(rank * batch, len(split), batch * num_processes):
        images, labels = split.images[start : start + batch], split.labels[start : start + batch]
        yield normalize(images.to(device), mean, std), labels.to(device)


def balanced_rows(labels: Tensor, number: int, seed: int) -> Tensor:
    """Rows of `number` images, as many of each class as there are, drawn by the seed; all rows where that is fewer."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = labels.cpu()[order]
    turn = torch.zeros_like(drawn)  # first, second … of its class
    for label in drawn.unique():
        of_class = (drawn == label).nonzero().flatten()
        turn[of_class] = torch.arange(len(of_class))
    return order[torch.argsort(turn, stable=True)][:number]


def placed(split: Split, device: torch.device, limit_bytes: int = 4 * 2**30) -> Split:
    """The split on the device when it is small enough to lie there, else pinned in host memory."""
    if device.type == "cpu":
        return split
    if split.images.numel() <= limit_bytes:
        return Split(split.images.to(device), split.labels.to(device))
    return Split(split.images.pin_memory(), split.labels.pin_memory())
