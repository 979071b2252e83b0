"""Products: intercepts where a forward pass multiplies an input by a weight, whichever module does it."""

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = ("linear", "conv1d", "conv2d")
"""torch functions that multiply an input by a weight."""


class Products(TorchFunctionMode):
    """Calls `note(weight, input, function)` for every linear map and convolution inside the context."""

    def note(self, weight: Tensor, x: Tensor, name: str) -> None:
        """Handles one product."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if (name := getattr(func, "__name__", "")) in PRODUCTS:
            given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            self.note(given["weight"], given["input"], name)
        return func(*args, **kwargs)
