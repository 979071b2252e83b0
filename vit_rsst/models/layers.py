"""Layers: Linear and Conv layers, and whether they apply their weight unmodified.

A weight that its layer standardises first (`StdConv2d`, `ScaledStdConv2d`, BiT's) cannot be pruned by zeroing it: the
subtracted mean makes the zeros non-zero again.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vit_rsst.errors import OF_A_LIBRARY
from vit_rsst.pruning.products import Products

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
"""Norms that treat each feature separately."""
_PLAIN = {kind.forward for kind in LAYERS}
_known: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


class _Watch(Products):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.is_seen = weight, False

    def note(self, weight: Tensor, x: Tensor, name: str) -> None:
        self.is_seen |= weight is self.weight


def applies_its_weight(layer: nn.Module) -> bool:
    """Whether a Linear or Conv layer multiplies its input by its unmodified weight.

    A subclass that overrides `forward` is called on a tiny input on `meta`; if that fails, the answer is no.
    """
    if "weight" not in layer._parameters:  # a parametrization computes it
        return False
    if type(layer).forward in _PLAIN and not layer._forward_pre_hooks:
        return True
    if type(layer) not in _known:
        _known[type(layer)] = _seen_alone(layer)
    return _known[type(layer)]


@torch.no_grad()
def _seen_alone(layer: nn.Module) -> bool:
    shape = (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, *layer.kernel_size)
    tensors = {n: t.to("meta") for n, t in (*layer.named_parameters(), *layer.named_buffers())}

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> bool:
            with _Watch(self.layer.weight) as watch:
                self.layer(x)
            return watch.is_seen

    try:
        named = {f"layer.{n}": t for n, t in tensors.items()}
        return torch.func.functional_call(Alone(), named, (torch.zeros(1, *shape, device="meta"),))
    except OF_A_LIBRARY:
        return False


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear and Conv layers that apply their weight unmodified, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and applies_its_weight(module):
            yield name, module


def altered_weights(model: nn.Module) -> list[str]:
    """Weights of Linear and Conv layers that are standardised or computed before use."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and not applies_its_weight(module)
    ]
