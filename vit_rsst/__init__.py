"""Train and prune Vision Transformers: a Hugging Face Accelerate trainer for sparse ViTs, and a library for your loop.

Importing the package is free: neither torch nor datasets is loaded until a name in `__all__` is used.
`__init__.pyi` tells editors and type checkers where they are.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

__all__ = ["prune"]

_HOMES = {"prune": "functions"}
"""Public name → its module in `library/`."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.library.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
