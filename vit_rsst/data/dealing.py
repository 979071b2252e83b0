"""How a global batch is divided among ranks, micro-batches and workers; how many of them an epoch has."""

from dataclasses import dataclass

from vit_rsst.errors import InputError


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

    def slices(self, rank: int) -> list[slice]:
        """The part of a global batch that each micro-batch of a rank is."""
        size = self.batch_per_device
        starts = ((micro * self.num_processes + rank) * size for micro in range(self.accumulation))
        return [slice(start, start + size) for start in starts]

    def lanes_of(self, rank: int, lanes: int) -> list[int]:
        """The lanes that a rank's positions of a global batch belong to."""
        size = self.global_batch // lanes
        return sorted({p // size for part in self.slices(rank) for p in range(part.start, part.stop)})

    def __str__(self) -> str:
        return (
            f"{self.global_batch} = {self.batch_per_device} a device × {self.num_processes} processes "
            f"× {self.accumulation} accumulated"
        )


def steps_per_epoch(num_samples: int | None, global_batch: int, limit: int | None) -> int:
    """Whole global batches in an epoch; the tail that does not fill one is dropped.

    Args:
        num_samples: None: not counted.

    Raises:
        InputError: there is not even one, or nobody knows.
    """
    if num_samples is None:
        if limit is None:
            raise InputError(
                "train.steps_per_epoch: the training images have not been counted; set how many steps an epoch has."
            )
        return limit
    steps = num_samples // global_batch
    if steps == 0:
        fitting = 1 << max(num_samples.bit_length() - 1, 0)
        raise InputError(
            f"train.global_batch: {global_batch} is more than the {num_samples} training images; set "
            f"train.global_batch={fitting} train.batch_per_device=null, or bring more images."
        )
    return min(steps, limit or steps)


def dealt(count: int, size: int, rank: int, num_processes: int) -> range:
    """The positions of an evaluation that fall to a rank: neighbouring whole batches, the same ones for any number."""
    batches = -(-count // size)
    first, last = (batches * number // num_processes for number in (rank, rank + 1))
    return range(first * size, min(last * size, count))
