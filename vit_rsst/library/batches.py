"""Calibration batches in the forms that training scripts have: pairs, or mappings as those of transformers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from vit_rsst.errors import InputError

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
"""A loader, or a callable that returns one: batches are (inputs, labels), or mappings with `labels`."""


def pairs(calibration: Batches, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and labels, (batch,), on a device.

    Raises:
        InputError: a batch of another form.
    """
    for batch in calibration() if callable(calibration) else calibration:
        batch = send_to_device(batch, device)
        if isinstance(batch, Mapping):
            inputs = dict(batch)
            labels = inputs.pop("labels", inputs.pop("label", None))
        else:
            inputs, labels = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (None, None)
        if not isinstance(labels, Tensor):
            raise InputError(
                f"pruning.calibration: a batch of type {type(batch).__name__}; expected (inputs, labels), or a mapping "
                "with labels."
            )
        yield inputs, labels


def forward_of(net: nn.Module) -> Callable[[Any], Tensor]:
    """Inputs → logits, (batch, classes)."""

    def forward(inputs: Any) -> Tensor:
        output = net(**inputs) if isinstance(inputs, Mapping) else net(inputs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise InputError(
                f"pruning.calibration: {type(net).__name__} returns a {type(logits).__name__}; expected logits of "
                "shape (batch, classes), or an output that has them as `logits`."
            )
        return logits

    return forward
