"""Randomness as a pure function: every draw has its own seed, made from the run's seed and from what it is for.

So nothing random has a state to save, a resumed run draws what the undisturbed one draws, and one rank draws what
eight ranks draw together.
"""

import hashlib


def derived_seed(seed: int, *what: str | int) -> int:
    """A 63-bit seed for one purpose, such as `derived_seed(0, "augment", step)`; unrelated to any other's."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
