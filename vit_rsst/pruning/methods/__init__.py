"""The pruning methods, one file each. Importing this package registers them; `plugins:` adds your own."""

from importlib import import_module
from pkgutil import iter_modules

from vit_rsst.pruning.plan import METHODS

__all__ = ["METHODS"]

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
