"""Passes before the first step, without a trace: they settle DDP's buckets and find parameters without gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vit_rsst.models.observation import unreached_by


@contextmanager
def without_trace(net: nn.Module) -> Iterator[None]:
    """Training mode; buffers, gradients, mode and random states are put back afterwards."""
    buffers, was_training = {name: buffer.clone() for name, buffer in net.named_buffers()}, net.training
    devices = {p.device for p in net.parameters() if p.device.type == "cuda"}
    net.train()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        net.train(was_training)
        net.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(buffers[name])


def loss_of(model: nn.Module, shape: tuple[int, ...], auxiliary_loss: Callable[[], Tensor] | None) -> Tensor:
    """A loss of zeros of a micro-batch's shape, with a gradient as in training."""
    loss = model(torch.zeros(shape, device=next(model.parameters()).device)).float().mean()
    return loss if auxiliary_loss is None else loss + auxiliary_loss()


def settle_buckets(
    model: nn.Module, net: nn.Module, shape: tuple[int, ...], auxiliary_loss: Callable[[], Tensor] | None = None
) -> None:
    """Lets DDP rebuild its buckets before the first step; collective, does nothing without DDP.

    DDP reduces its first backward pass in one bucket, in reversed order of the parameters, and all later ones in
    buckets in the order in which gradients became ready. From three ranks on, each order adds in another one, so that
    a resumed run, whose first step is another, would differ in the last bits (torch.nn.parallel, `_rebuild_buckets`).

    Args:
        model: `net` in DDP.
        shape: of a micro-batch of images.
        auxiliary_loss: the model's own loss term, which changes the order of gradients.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    with without_trace(net):
        for _ in range(2):  # the second forward pass rebuilds, its backward pass is the first of the new buckets
            loss_of(model, shape, auxiliary_loss).backward()


def unreached(net: nn.Module, image_size: int) -> tuple[str, ...]:
    """Names of the trainable parameters without a gradient, of a net that a pass on shapes alone does not show."""
    with without_trace(net):
        loss = loss_of(net, (2, 3, image_size, image_size), getattr(net, "auxiliary_loss", None))
        return unreached_by(loss, net)
