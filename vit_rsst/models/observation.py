"""Observation: properties of a model that only running it reveals.

A forward and backward pass finds the weights that are applied unmodified and the parameters that get no gradient. A
trial removal on a copy finds units that the forward pass cannot do without.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vit_rsst.errors import OF_A_LIBRARY, InputError, first_line
from vit_rsst.models import complexity, slim
from vit_rsst.models.layers import altered_weights
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.products import Products
from vit_rsst.pruning.units import UnitGroup

TOLERANCE = 1e-4
"""Maximum difference of logits between a masked and a shrunk network, relative to the largest logit."""
SEED = 0


@dataclass(frozen=True)
class Observed:
    """Findings of one forward and backward pass in training mode.

    Attributes:
        applied: parameters that a linear map or convolution applies unmodified; None: the forward pass fails.
        unreached: parameters without gradient; empty if the loss has no gradient at all.
    """

    applied: frozenset[str] | None = None
    unreached: tuple[str, ...] = ()


class _Pass(nn.Module):
    """Forward and backward in one call, so that both see the substituted parameters."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Observed:
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}
        with torch.enable_grad(), _Applied(names) as applied:
            loss = self.net(images).float().square().sum()
        auxiliary_loss: Callable[[], Tensor] | None = getattr(self.net, "auxiliary_loss", None)
        if auxiliary_loss is not None:
            loss = loss + auxiliary_loss()
        return Observed(frozenset(applied.found), unreached_by(loss, self.net))


class _Applied(Products):
    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self.names, self.found = names, set()

    def note(self, weight: Tensor, x: Tensor, name: str) -> None:
        if id(weight) in self.names:
            self.found.add(self.names[id(weight)])


def observe(net: nn.Module, image_size: int) -> Observed:
    """Observes one forward and backward pass; computes shapes only, wherever the weights are.

    A model that does not accept such images yields empty findings.

    Args:
        net: returns logits; not modified.
        image_size: side of the images in px.
    """

    def passed(device: str) -> Observed:
        tensors = complexity.shapes_of(net, device)
        for name, parameter in net.named_parameters():
            tensors[name].requires_grad_(parameter.requires_grad)
        named = {f"net.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(_Pass(net), named, (complexity.images(2, image_size, device),))

    try:
        with complexity.in_mode(net, training=True):
            return complexity.without_numbers(passed)
    except OF_A_LIBRARY:
        return Observed()


def unreached_by(loss: Tensor, net: nn.Module) -> tuple[str, ...]:
    """Names of the trainable parameters that a loss has no gradient for; empty if it has no gradient at all."""
    learnt = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    if not loss.requires_grad:
        return ()
    gradients = torch.autograd.grad(loss, list(learnt.values()), allow_unused=True)
    return tuple(name for name, found in zip(learnt, gradients, strict=True) if found is None)


def freeze_(net: nn.Module, names: Iterable[str]) -> None:
    """Freezes parameters: they are not pruned, not counted in budgets, and DDP does not wait for their gradients."""
    for name in names:
        net.get_parameter(name).requires_grad_(False)


def check_inputs(observed: Observed, weights: Iterable[str], groups: Sequence[UnitGroup]) -> None:
    """Checks that a criterion can record the inputs of weights.

    Raises:
        InputError: the forward pass does not apply one of them unmodified.
    """
    if observed.applied is None:
        return
    watched = [f"{group.site.module}.weight" for group in groups] if groups else list(weights)
    if unseen := [name for name in watched if name not in observed.applied]:
        raise InputError(
            f"pruning.criterion: the inputs of {unseen[0]} cannot be recorded ({len(unseen)} such weights): the "
            "forward pass does not multiply by it directly; protect it with pruning.protect, or use the criterion "
            "magnitude."
        )


def notes(net: nn.Module) -> list[str]:
    """One line for each set of weights that are not trained or not pruned."""
    frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    lines = {"frozen, not pruned and not counted in budgets (no gradient reaches them)": frozen}
    lines["not pruned (standardised before use, which undoes zeros)"] = altered_weights(net)
    return [f"{what}: {_listed(names)}" for what, names in lines.items() if names]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_units(net: nn.Module, groups: Sequence[UnitGroup], image_size: int) -> None:
    """Removes one unit of each group from a copy and compares it with a copy in which they are masked.

    On `meta`, compares shapes only.

    Raises:
        InputError: the forward pass fails after the removal, or the logits differ.
    """
    if not groups or (reason := _cut_fails(net, groups, image_size)) is None:
        return
    kinds = dict.fromkeys(group.kind for group in groups)
    wrong = {kind: _cut_fails(net, [g for g in groups if g.kind == kind], image_size) for kind in kinds}
    kind = next((kind for kind in wrong if wrong[kind] is not None), groups[0].kind)
    others = [other for other in kinds if wrong[other] is None]
    raise InputError(
        f"pruning.granularity: no {kind} of this {type(net).__name__} can be removed exactly "
        f"({wrong[kind] or reason}); use {', '.join((*others, 'element'))} or N:M."
    )


def _cut_fails(net: nn.Module, groups: Sequence[UnitGroup], image_size: int) -> str | None:
    """Why removing the first unit of each group differs from masking it; None if it does not."""
    device = next(net.parameters()).device
    on_meta = device.type == "meta"
    with complexity.in_mode(net, training=False), torch.no_grad(), _seeded():
        full = slim.copy_of(net)
        names = dict.fromkeys(member.name for group in groups for member in group.members)
        mask = MaskSet.full({name: full.get_parameter(name) for name in names})
        for group in (group for group in groups if group.units > 1):
            for member in group.members:
                mask[member.name].index_fill_(member.dim, member.index[0].to(device), False)
        if not on_meta:
            _disturb_(full)
        for name in names:
            full.get_parameter(name).mul_(mask[name])
        small = slim.copy_of(full)
        slim.shrink_(small, {g.name: torch.arange(1, g.units) for g in groups if g.units > 1})
        images = complexity.images(2, image_size, str(device))
        if not on_meta:
            images = torch.randn(images.shape, device=device)
        try:
            expected = full(images)
        except OF_A_LIBRARY:
            return None  # it fails with or without the units
        try:
            found = small(images)
        except OF_A_LIBRARY as error:
            return f"the forward pass fails without it: {first_line(error)}"
    if on_meta:
        return None if found.shape == expected.shape else f"logits of shape {tuple(found.shape)}"
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    return None if difference <= TOLERANCE else f"logits differ by {difference:.1e} of the largest"


def _disturb_(net: nn.Module) -> None:
    """Adds noise to vectors and zero tensors: initial layer scales and biases are too small to reveal a difference."""
    for parameter in net.parameters():
        if parameter.dim() <= 1 or not parameter.any():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


@contextmanager
def _seeded() -> Iterator[None]:
    """Reproducible random draws that leave the global RNG state unchanged."""
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(SEED)
        yield
