"""Calibration: statistics of activations and gradients on calibration images, summed over images, tokens and ranks.

The network runs unmodified, in evaluation mode. Inputs are recorded where they are multiplied by a weight, not where a
layer is called: a forward pass may use a weight without calling its layer. Sums and counts are kept in float64 and
reduced over ranks before any mean is taken, so that ragged batches are weighted by size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from vit_rsst import shards
from vit_rsst.errors import InputError
from vit_rsst.pruning.compensation import bias_of, is_supported, rows_of
from vit_rsst.pruning.criteria import Needs, SiteStatistics, Statistics
from vit_rsst.pruning.products import Products
from vit_rsst.pruning.units import UnitGroup

Sums = dict[tuple[str, str], Tensor]
"""(what, where) → float64 sum."""


def collect(
    net: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    weights: Mapping[str, Tensor],
    groups: Sequence[UnitGroup],
    needs: Needs,
    forward: Callable[[Any], Tensor] | None = None,
) -> Statistics:
    """Statistics over the batches of all ranks. Collective.

    Args:
        net: unwrapped.
        batches: images and labels of this rank; sizes may differ, and a rank may have none. Images without labels are
            computed and not counted.
        weights: prunable weights by name; without groups, their inputs and gradients are recorded.
        groups: unit groups; the inputs of their consumers are recorded.
        needs: of the criterion: activations, gradients too, or moments, which are the Gram matrices of inputs.
        forward: images → logits; None: the network itself.

    Raises:
        InputError: there are no images, or moments of a layer that has none.
    """
    with_gradients, with_moments = needs == "gradients", needs == "moments"
    watched = {group.name: f"{group.site.module}.weight" for group in groups}
    if not groups:
        watched = {name: name for name in weights}
    parameters = dict(net.named_parameters())
    widths = {place: _width(net, parameters, name) for place, name in watched.items()}
    sums = _zeros(widths, weights, groups, with_gradients)
    if with_moments:
        sums |= _no_moments(net, watched)
    was_training = net.training
    net.eval()
    # Compiled code would hide the matrix products.
    with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(with_gradients):
        for images, labels in batches:
            with Inputs(net, watched.values()) as inputs:
                logits = (forward or net)(images)[: len(labels)].float()
                loss = F.cross_entropy(logits, labels, reduction="sum")  # per-image gradients
            sums["images", ""] += len(labels)
            for place, name in watched.items():
                for seen in inputs[name] if len(labels) else ():
                    _add_activations_(sums, place, seen.features(len(labels), seen.x.detach()))
                    if with_moments:
                        _add_moments_(sums, place, rows_of(net.get_submodule(name.rpartition(".")[0]), seen.x))
            if with_gradients and groups:
                seen = [(group, one) for group in groups for one in inputs[watched[group.name]]]
                found = torch.autograd.grad(loss, [one.x for _, one in seen], allow_unused=True)
                for (group, one), gradient in zip(seen, found, strict=True):
                    if gradient is not None and len(labels):  # None: the loss does not depend on this product
                        product = one.x.detach().float() * gradient.float()
                        _add_gates_(sums, group, one.features(len(labels), product))
            elif with_gradients:
                for name, gradient in _gradients(loss, net, weights):
                    shards.local(sums["gradient", name]).add_(gradient)
    net.train(was_training)
    _reduce_(sums)
    if not sums["images", ""]:
        raise InputError("pruning.calibration_images: the criterion needs calibration images, but there are none.")
    unseen = [name for place, name in watched.items() if not sums["tokens", place]]
    if unseen:
        raise InputError(
            f"pruning.criterion: no input of {unseen[0]} was recorded ({len(unseen)} such weights): the forward pass "
            "does not multiply by it directly; protect it with pruning.protect, or use the criterion magnitude."
        )
    found = _means(sums, weights, groups, with_gradients)
    return _with_moments(found, sums, net, watched, groups) if with_moments else found


@dataclass(frozen=True)
class Seen:
    """An input at the point where it is multiplied by a weight.

    Attributes:
        x: the input, still in the autograd graph.
        is_map: whether features are dimension 1, as for a convolution, or the last.
    """

    x: Tensor
    is_map: bool

    def features(self, num_images: int, x: Tensor) -> Tensor:
        """Reshapes a tensor of the input's shape to (images, tokens, features); windows and pixels count as tokens."""
        x = x.movedim(1, -1) if self.is_map else x
        first = num_images if len(x) % num_images == 0 else 1  # a position table is shared by all images
        return x.reshape(first, -1, x.shape[-1])


class Inputs(Products):
    """Records the inputs of weights, given by name, inside the context; a mapping by name."""

    def __init__(self, net: nn.Module, names: Iterable[str]):
        super().__init__()
        self._net, self._seen = net, {name: list[Seen]() for name in names}
        self._names = {id(net.get_parameter(name)): name for name in self._seen}
        self._is_sharded = shards.is_fsdp(net)

    def note(self, weight: Tensor, x: Tensor, name: str) -> None:
        if self._is_sharded:  # FSDP2 puts a whole weight in place of its shard for the time of a forward pass
            place = next((own for own in self._seen if self._net.get_parameter(own) is weight), None)
        else:
            place = self._names.get(id(weight))
        if place is not None:
            self._seen[place].append(Seen(x, name != "linear"))

    def __getitem__(self, name: str) -> list[Seen]:
        return self._seen[name]


def _gradients(loss: Tensor, net: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Gradients of a sum over this rank's images; of sharded weights, the rows this rank holds of all ranks' sum."""
    if not any(map(shards.is_sharded, weights.values())):
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        yield from ((name, gradient) for name, gradient in zip(weights, found, strict=True) if gradient is not None)
        return
    loss.backward()  # FSDP2 reduces gradients in a backward pass alone, to their mean over ranks
    ranks = PartialState().num_processes
    yield from ((n, shards.local(w.grad) * ranks) for n, w in weights.items() if w.grad is not None)
    net.zero_grad(set_to_none=True)


def _width(net: nn.Module, parameters: Mapping[str, Tensor], name: str) -> int:
    """Input features of a weight, over all groups of a convolution."""
    return parameters[name].shape[1] * getattr(net.get_submodule(name.rpartition(".")[0]), "groups", 1)


def _zeros(
    widths: Mapping[str, int], weights: Mapping[str, Tensor], groups: Sequence[UnitGroup], with_gradients: bool
) -> Sums:
    device = next(iter(weights.values())).device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    sums: Sums = {("images", ""): zeros(1)}
    for name, width in widths.items():
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


def _no_moments(net: nn.Module, watched: Mapping[str, str]) -> Sums:
    """
    Raises:
        InputError: a weight multiplies something that is no matrix of rows.
    """
    sums: Sums = {}
    for place, name in watched.items():
        if not is_supported(net, name):
            raise InputError(
                f"pruning.criterion: obs scores linear layers and ungrouped two-dimensional convolutions, and {name} "
                "belongs to another; protect it with pruning.protect, or use activation_l2 or magnitude."
            )
        weight = net.get_parameter(name)
        width = weight[0].numel()
        sums["gram", place] = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
        sums["rows", place] = torch.zeros(width + 1, dtype=torch.float64, device=weight.device)  # sums, and how many
    return sums


def moments_bytes(net: nn.Module, weights: Mapping[str, Tensor], groups: Sequence[UnitGroup]) -> int:
    """What the criterion `obs` holds at once: a matrix for each layer, and what inverting the largest takes."""
    watched = [f"{group.site.module}.weight" for group in groups] or list(weights)
    squares = [net.get_parameter(name)[0].numel() ** 2 for name in watched]
    return 8 * (sum(squares) + 3 * max(squares, default=0))


def _add_moments_(sums: Sums, place: str, rows: Tensor) -> None:
    """Adds (tokens, in). Rows are centred before they are multiplied, or float32 would lose small deviations from a
    large mean."""
    mean = rows.mean(0, dtype=torch.float64)
    varying = rows.float() - mean.float()
    sums["gram", place] += (varying.T @ varying).double() + len(rows) * mean.outer(mean)
    sums["rows", place] += len(rows) * torch.cat([mean, mean.new_ones(1)])


def _with_moments(
    found: Statistics, sums: Sums, net: nn.Module, watched: Mapping[str, str], groups: Sequence[UnitGroup]
) -> Statistics:
    """Adds Gram matrices, centred where a bias takes over the mean.

    Raises:
        InputError: inputs are not finite.
    """
    grams = {}
    for place, name in watched.items():
        total, gram = sums["rows", place], sums["gram", place]
        if not gram.isfinite().all():
            raise InputError(
                f"pruning.criterion: inputs of {name} are not finite on the calibration images; use magnitude."
            )
        if bias_of(net, name) is not None:
            gram -= total[:-1].outer(total[:-1]) / total[-1]
        grams[place] = gram
    if not groups:
        return replace(found, gram=grams)
    sites = {}
    for group in groups:
        weight, index = net.get_parameter(watched[group.name]).detach(), group.site.index
        taps = torch.arange(weight[0, 0].numel())  # a column of the matrix for each of a kernel
        sites[group.name] = replace(
            found.sites[group.name],
            gram=grams[group.name],
            consumer=weight.flatten(1),
            index=(index[:, :, None] * len(taps) + taps).flatten(1).to(weight.device),
        )
    return replace(found, sites=sites)


def _reduce_(sums: Sums) -> None:
    """Sums over all ranks, in one reduction per dtype."""
    if PartialState().num_processes == 1:
        return
    for dtype in (torch.float64, torch.float32):
        mine = [tensor for tensor in sums.values() if tensor.dtype == dtype and not shards.is_sharded(tensor)]
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
    gradient = {}
    for name in weights if with_gradients else ():
        gradient[name] = shards.like(shards.local(sums["gradient", name]) / images.float(), sums["gradient", name])
    absolute, square = ({name: mean(what, name) for name in weights} for what in ("absolute", "square"))
    return Statistics(absolute, square, gradient)
