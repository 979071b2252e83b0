"""Calibration: what flows through a network while it looks at images, summed over images, tokens and ranks.

The network runs as it stands, in evaluation mode. Sums and counts are kept in float64 and reduced over ranks before
any mean is taken, so that ragged batches weigh what they hold.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from vit_rsst.errors import InputError
from vit_rsst.pruning.criteria import SiteStatistics, Statistics
from vit_rsst.pruning.units import UnitGroup

Sums = dict[tuple[str, str], Tensor]
"""(what, where) → float64 sum."""


def collect(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    weights: Mapping[str, Tensor],
    groups: Sequence[UnitGroup],
    with_gradients: bool,
) -> Statistics:
    """Statistics over the batches of all ranks; collective.

    Args:
        net: without wrappers.
        batches: images and labels of this rank; sizes may differ, and a rank may have none.
        weights: prunable weights by name, whose inputs and gradients are watched when there are no groups.
        groups: unit groups whose consumers' inputs are watched.

    Raises:
        InputError: there is not one image.
    """
    modules = dict(net.named_modules())
    watched = {group.name: modules[group.site.module] for group in groups}
    if not groups:
        watched = {name: modules[name.removesuffix(".weight")] for name in weights}
    sums = _zeros(watched, weights, groups, with_gradients)
    was_training = net.training
    net.eval()
    # Compiled code would not see the hooks.
    with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(with_gradients):
        for images, labels in batches:
            with _inputs(watched) as inputs:
                loss = F.cross_entropy(net(images).float(), labels, reduction="sum")  # so that images stay apart
            sums["images", ""] += len(images)
            for name, module in watched.items():
                _add_activations_(sums, name, _features_last(module, inputs[name].detach()))
            if with_gradients and groups:
                found = torch.autograd.grad(loss, [inputs[group.name] for group in groups])
                for group, gradient in zip(groups, found, strict=True):
                    product = inputs[group.name].detach().float() * gradient.float()
                    _add_gates_(sums, group, _features_last(watched[group.name], product))
            elif with_gradients:
                found = torch.autograd.grad(loss, list(weights.values()))
                for name, gradient in zip(weights, found, strict=True):
                    sums["gradient", name] += gradient
    net.train(was_training)
    _reduce_(sums)
    if not sums["images", ""]:
        raise InputError("pruning.calibration_images: the criterion needs images and there is not one.")
    return _means(sums, weights, groups, with_gradients)


@contextmanager
def _inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The inputs of the modules in the forward pass made meanwhile."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():

            def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = args[0]

            stack.enter_context(module.register_forward_pre_hook(note))
        yield seen


def _features_last(module: nn.Module, x: Tensor) -> Tensor:
    """(images, tokens, features): pixels are the tokens of a convolution."""
    x = x if isinstance(module, nn.Linear) else x.movedim(1, -1)
    return x.reshape(len(x), -1, x.shape[-1])


def _zeros(
    watched: Mapping[str, nn.Module], weights: Mapping[str, Tensor], groups: Sequence[UnitGroup], with_gradients: bool
) -> Sums:
    device = next(iter(weights.values())).device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    sums: Sums = {("images", ""): zeros(1)}
    for name, module in watched.items():
        width = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        sums |= {("absolute", name): zeros(width), ("square", name): zeros(width), ("tokens", name): zeros(1)}
    if with_gradients and groups:
        for group in groups:
            sums["saliency", group.name] = zeros(group.units)
            sums["gate", group.name] = zeros(group.units)
    elif with_gradients:
        sums |= {("gradient", name): torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    return sums


def _add_activations_(sums: Sums, name: str, x: Tensor) -> None:
    """Adds a batch of (images, tokens, features)."""
    x = x.float()
    sums["absolute", name] += x.abs().sum((0, 1), dtype=torch.float64)
    sums["square", name] += x.square().sum((0, 1), dtype=torch.float64)
    sums["tokens", name] += x.shape[0] * x.shape[1]


def _add_gates_(sums: Sums, group: UnitGroup, product: Tensor) -> None:
    """Adds a batch of A · ∂L/∂A, (images, tokens, features)."""
    index = group.site.index.to(product.device)
    saliency = product.abs().sum((0, 1), dtype=torch.float64)
    sums["saliency", group.name] += saliency[index].sum(1)  # (units,)
    gates = product.sum(1, dtype=torch.float64)[:, index].sum(2)  # (images, units)
    sums["gate", group.name] += gates.abs().sum(0)


def _reduce_(sums: Sums) -> None:
    """Adds up all ranks, in one message for each precision."""
    if PartialState().num_processes == 1:
        return
    for dtype in (torch.float64, torch.float32):
        mine = [tensor for tensor in sums.values() if tensor.dtype == dtype]
        if not mine:
            continue
        total = reduce(torch.cat([tensor.flatten() for tensor in mine]), "sum")
        for tensor, part in zip(mine, total.split([tensor.numel() for tensor in mine]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _means(sums: Sums, weights: Mapping[str, Tensor], groups: Sequence[UnitGroup], with_gradients: bool) -> Statistics:
    images = sums["images", ""]

    def mean(what: str, name: str) -> Tensor:
        return sums[what, name] / sums["tokens", name]

    if groups:
        sites = {}
        for group in groups:
            index = group.site.index.to(images.device)
            sites[group.name] = SiteStatistics(
                absolute=mean("absolute", group.name)[index].mean(1),
                square=mean("square", group.name)[index].mean(1),
                saliency=mean("saliency", group.name) / index.shape[1] if with_gradients else None,
                gate=sums["gate", group.name] / images if with_gradients else None,
            )
        return Statistics(sites=sites)
    gradient = {name: sums["gradient", name] / images.float() for name in weights} if with_gradients else {}
    absolute, square = ({name: mean(what, name) for name in weights} for what in ("absolute", "square"))
    return Statistics(absolute, square, gradient)
