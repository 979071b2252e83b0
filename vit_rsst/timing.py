"""Timing of networks side by side in one process, and the name of the device that they ran on."""

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

T = TypeVar("T")

BUDGET, FEWEST, MOST = 2.0, 5, 200
"""Time limit of a measurement in seconds, and the fewest and most repeats; the fewest are always done."""


@torch.inference_mode()
def latency(networks: Mapping[str, nn.Module], image_size: int, batch: int, device: torch.device) -> dict[str, dict]:
    """Seconds per forward pass; the networks take turns, so that a disturbance affects all of them.

    Returns:
        By network: `median`, `low` and `high` (the quartiles) in seconds, `repeats`, `images_per_s`.
    """
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for net in networks.values():
        net(images)  # the first pass allocates memory
    start = time.perf_counter()
    budget = BUDGET * len(networks)
    for repeat in range(MOST):
        if repeat >= FEWEST and time.perf_counter() - start > budget:
            break
        for name, net in networks.items():
            seconds[name].append(timed(lambda net=net: net(images), device)[1])
    return {
        name: summary(values) | {"images_per_s": batch / float(np.median(values))} for name, values in seconds.items()
    }


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of a call and its duration in seconds, including GPU work."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    found = call()
    synchronize()
    return found, time.perf_counter() - start


def summary(seconds: list[float]) -> dict:
    low, median, high = np.percentile(seconds, [25, 50, 75]).tolist()
    return {"median": median, "low": low, "high": high, "repeats": len(seconds)}


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
