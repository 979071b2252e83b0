"""Library errors in the user's terms: a lost rank, a full disk, too little memory."""

import errno
from typing import TYPE_CHECKING

from vit_rsst.errors import MissingRequirement

if TYPE_CHECKING:
    from vit_rsst.recipe.schema import Recipe
    from vit_rsst.run.state import Run

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""A disk that is full, failing or no longer writable."""


class LostRank(MissingRequirement):
    """Another process of the job died or hangs."""


def explained(error: BaseException, run: "Run", recipe: "Recipe") -> BaseException:
    """The error, or what it means to the user where the library cannot know."""
    from vit_rsst.run import watchdog

    if watchdog.is_of_a_lost_rank(error):
        return LostRank(
            f"another process of this job died or did not answer for {recipe.train.rank_timeout:g} s "
            f"(train.rank_timeout), at step {run.progress.global_step}; its own message and "
            f"{run.watchdog.path.parent} may say why. "
            "The same command goes on from the last resume point; where disks are slow, with a larger "
            "train.rank_timeout."
        )
    if isinstance(error, OSError) and error.errno in DISK:
        where = f" {error.filename}" if error.filename else ""
        return MissingRequirement(
            f"{run.folder.path} can no longer be written ({error.strerror}{where}). Free some space there, then run "
            "the same command to resume from the last resume point."
        )
    if is_out_of_memory(error):
        return MissingRequirement(out_of_memory_text(run.accelerator.num_processes, recipe))
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host (torch's CPU allocator) is out of memory."""
    import torch

    by_allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or by_allocator


def out_of_memory_text(num_processes: int, recipe: "Recipe") -> str:
    """The batch arithmetic and the next smaller batch per device."""
    from vit_rsst.data.loaders import Dealing

    dealing = Dealing.of(recipe.train.global_batch, recipe.train.batch_per_device, num_processes)
    share, now = dealing.global_batch // num_processes, dealing.batch_per_device
    smaller = next((n for n in range(now // 2, 0, -1) if share % n == 0), None)
    if smaller is None:
        return f"out of memory with {dealing}: not even one image per device fits; use a smaller model or images."
    again = Dealing.of(dealing.global_batch, smaller, num_processes)
    return (
        f"out of memory with a global batch of {dealing}; set train.batch_per_device={smaller}: {again} takes the "
        "same steps with less memory, under another name (name=…) or with --restart."
    )
