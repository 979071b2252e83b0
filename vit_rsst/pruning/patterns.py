"""The names of granularities, without torch: recipes are checked against them."""

import re

UNIT_KINDS = {"head": ("head",), "neuron": ("neuron",), "head+neuron": ("head", "neuron"), "channel": ("channel",)}
"""Structured granularity → the kinds of units that it prunes."""


def pattern(granularity: str) -> tuple[int, int] | None:
    """(N, M) of an `N:M` granularity, else None."""
    match = re.fullmatch(r"(\d+):(\d+)", str(granularity))
    return (int(match[1]), int(match[2])) if match else None
