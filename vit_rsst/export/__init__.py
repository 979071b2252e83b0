"""Export: folders and files that others load, of tickets. `vit_rsst.load` reads slim and dense folders back."""

from vit_rsst.export.slim_target import load

__all__ = ["load"]
