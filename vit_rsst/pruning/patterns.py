"""Names of granularities, without importing torch: recipes are checked against them."""

import re

UNIT_KINDS = {"head": ("head",), "neuron": ("neuron",), "head+neuron": ("head", "neuron"), "channel": ("channel",)}
"""Structured granularity → the kinds of units it prunes."""

GRANULARITIES = {
    "element": "single weights of Linear and Conv layers",
    "head": "attention heads: their rows of q, k and v and their columns of the projection",
    "neuron": "hidden neurons of MLPs: a row of fc1 (and of the gate) and a column of fc2",
    "head+neuron": "both, each among its like",
    "channel": "output channels of the inner convolutions of residual blocks",
    "N:M": "N of every M consecutive inputs stay, such as 2:4",
}
"""One-line description of every granularity."""


def pattern(granularity: str) -> tuple[int, int] | None:
    """(N, M) of an `N:M` granularity, else None."""
    match = re.fullmatch(r"(\d+):(\d+)", str(granularity))
    return (int(match[1]), int(match[2])) if match else None
