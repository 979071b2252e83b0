"""The pruning methods, one file each. Importing this package registers them; a user's own come in by `plugins:`."""

from vit_rsst.pruning.methods import dense, gmp, imp, rsst

__all__ = ["dense", "gmp", "imp", "rsst"]
