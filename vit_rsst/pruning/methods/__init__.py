"""The pruning methods, one file each. Importing this package registers them; `plugins:` adds your own."""

from vit_rsst.pruning.methods import constant, dense, gmp, imp, refill, rsst, rst, ste

__all__ = ["constant", "dense", "gmp", "imp", "refill", "rsst", "rst", "ste"]
