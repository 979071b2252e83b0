"""The pruning methods, one file each. Importing this package registers them; a user's own come in by `plugins:`."""

from vit_rsst.pruning.methods import constant, dense, gmp, imp, refill, rsst, rst, ste

__all__ = ["constant", "dense", "gmp", "imp", "refill", "rsst", "rst", "ste"]
