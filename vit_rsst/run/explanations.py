"""Library errors in the user's terms: a lost rank, a full disk, too little memory."""

import errno
from typing import TYPE_CHECKING

from vit_rsst.errors import MissingRequirement, Stopped

if TYPE_CHECKING:
    from vit_rsst.recipe.schema import Recipe
    from vit_rsst.run.folder import RunFolder
    from vit_rsst.run.ranks import Ranks

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""A disk that is full, failing or no longer writable."""


class LostRank(MissingRequirement):
    """Another process of the job died or hangs."""


SIGNS = ("gloo", "nccl", "process group", "processgroup", "connection closed by peer", "timed out waiting")
"""What torch writes, in lower case, when a collective fails because another rank is gone."""


def is_of_a_lost_rank(error: BaseException) -> bool:
    """Whether an error means that another rank died or hangs."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def lost_rank(found: str, folder: "RunFolder") -> LostRank:
    """The error for a sentence of the heartbeat that names who is lost."""
    who = found.rstrip(".") or "another process of this job died"
    return LostRank(
        f"{who}. Its own message and {folder.logs} may say why; run the same command to resume "
        "from the last resume point. Where steps or disks are that slow, raise train.rank_timeout."
    )


def explained(error: BaseException, recipe: "Recipe", folder: "RunFolder", ranks: "Ranks | None") -> BaseException:
    """The error, or what it means to the user where the library cannot know."""
    if is_of_a_lost_rank(error):
        found, exit_code = ranks.heartbeat.missing() if ranks is not None else ("", None)
        if exit_code == Stopped.exit_code:  # cleanly, and this rank was a moment late
            return Stopped(found)
        return lost_rank(found, folder)
    if isinstance(error, OSError) and error.errno in DISK:
        where = f" {error.filename}" if error.filename else ""
        return MissingRequirement(
            f"{folder.path} can no longer be written ({error.strerror}{where}). Free some space there, then run "
            "the same command to resume from the last resume point."
        )
    if is_out_of_memory(error):
        return MissingRequirement(out_of_memory_text(1 if ranks is None else ranks.world, recipe))
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host (torch's CPU allocator) is out of memory."""
    import torch

    by_allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or by_allocator


def out_of_memory_text(num_processes: int, recipe: "Recipe") -> str:
    """The batch arithmetic and the next smaller batch per device."""
    from vit_rsst.data.dealing import Dealing

    dealing = Dealing.of(recipe.train.global_batch, recipe.train.batch_per_device, num_processes)
    share, now = dealing.global_batch // num_processes, dealing.batch_per_device
    smaller = next((n for n in range(now // 2, 0, -1) if share % n == 0), None)
    if smaller is None:
        return f"out of memory with {dealing}: not even one image per device fits; use a smaller model or images."
    again = Dealing.of(dealing.global_batch, smaller, num_processes)
    return (
        f"out of memory with a global batch of {dealing}; set train.batch_per_device={smaller}: {again} takes the "
        "same steps with less memory and resumes this run."
    )
