"""Train and prune Vision Transformers: a Hugging Face Accelerate trainer for sparse ViTs, and a library for your loop.

Importing the package is free: neither torch nor datasets is loaded until one of its public names is used.
`__init__.pyi` tells editors and type checkers where they are.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "Event": "pruner",
    "Pruner": "pruner",
    "analyze": "functions",
    "load": "files",
    "prune": "functions",
    "register_models": "functions",
    "save": "files",
    "slim": "functions",
}
"""Public name → its module in `library/`."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.library.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
