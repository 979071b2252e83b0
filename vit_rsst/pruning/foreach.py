"""Arithmetic on all weights at once: a kernel or two, whatever their number, and no synchronization with the device."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype


def factors(masks: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Factors 0 and 1 for multiplying the tensors `like`, in the fastest form for their device.

    On the CPU they share the masks' memory as int8, which multiplies more than twice as fast as bool. On other devices,
    a foreach call is a single kernel only if all tensors have one dtype: they are copies, to be freed after the step.
    """
    if not like or like[0].device.type == "cpu":
        return [mask.view(torch.int8) for mask in masks]
    made = [torch.empty_like(tensor) for tensor in like]
    torch._foreach_copy_(made, list(masks))
    return made


def zero_(tensors: Sequence[Tensor], factors: Sequence[Tensor], where: bool) -> None:
    """Zeroes the elements whose factor is `where`, 1 or 0; infinities and NaN among them become NaN."""
    if where:
        torch._foreach_addcmul_(tensors, tensors, factors, value=-1)
    else:
        torch._foreach_mul_(tensors, factors)


def products(*pairs: tuple[Sequence[Tensor], Sequence[Tensor]]) -> list[list[Tensor]]:
    """The elementwise products of each pair of equally long lists, all by one kernel."""
    ours, theirs = ([tensor for pair in pairs for tensor in pair[side]] for side in (0, 1))
    made = iter(torch._foreach_mul(ours, theirs) if ours else ())
    return [list(islice(made, len(pair[0]))) for pair in pairs]


def subtract_(
    tensors: Sequence[Tensor], others: Sequence[Tensor], share: float | Tensor = 1.0, skipped: Tensor | None = None
) -> None:
    """Subtracts share · other, by a kernel for each dtype.

    Args:
        share: a tensor is float32 and on the device of `tensors`.
        skipped: 1.0 on their device if nothing is to change, whatever the others hold, else 0.0; None: not skipped.
    """
    laid_out = [_laid_out_like(tensor, other) for tensor, other in zip(tensors, others, strict=True)]
    # A step of SGD is such a subtraction, and the one that can be skipped on the device: a product by 0 would not do,
    # as gradients of a skipped step are NaN or infinite.
    for (ours, theirs), _ in _group_tensors_by_device_and_dtype([list(tensors), laid_out]).values():
        torch._fused_sgd_(
            ours, theirs, [], weight_decay=0.0, momentum=0.0, lr=share, dampening=0.0, nesterov=False, maximize=False,
            is_first_step=False, grad_scale=None, found_inf=skipped,
        )  # fmt: skip


def _laid_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A fused step reads memory in order, whatever the strides are."""
    return other if other.stride() == tensor.stride() else torch.empty_like(tensor).copy_(other)
