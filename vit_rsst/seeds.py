"""Randomness as a pure function: every draw has its own seed, derived from the run's seed and the draw's purpose.

There is no RNG state to save, a resumed run draws what an uninterrupted one draws, and one rank draws what eight ranks
draw together.
"""

import hashlib


def derived_seed(seed: int, *what: str | int) -> int:
    """A 63-bit seed for one purpose, such as `derived_seed(0, "augment", step)`; independent of all others."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
