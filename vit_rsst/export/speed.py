"""Speed of an exported model on the machine that exports it, beside the dense model in fp32."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vit_rsst import machine, timing
from vit_rsst.export.work import Section

CPU = torch.device("cpu")
BATCHES = (1, 32)
DENSE = "dense, fp32"
FASTER = 1.05
"""Smallest ratio that is called faster: repeats of one network differ by a few percent."""


def report(networks: Mapping[str, nn.Module], image_size: int, runtime: str, device: torch.device = CPU) -> Section:
    """Times the networks in turns.

    Args:
        networks: the exported one last; with more than one, the dense one first.
        runtime: that runs them all, with its version.
    """
    found = {batch: timing.latency(networks, image_size, batch, device) for batch in BATCHES}
    seconds = {name: [found[batch][name]["median"] for batch in BATCHES] for name in networks}
    cores = f", {machine.cores()} core(s)" if device.type == "cpu" else ""
    where = f"{runtime} on {timing.device_name(device)}{cores}"
    return section(seconds, where)


def section(seconds: Mapping[str, Sequence[float]], where: str) -> Section:
    """The table, and what it says.

    Args:
        seconds: network → median time of a batch of each size.
    """
    *others, here = seconds
    rows = [("", *(f"batch {batch}" for batch in BATCHES))]
    rows += [(name, *(f"{1000 * value:.2f} ms" for value in values)) for name, values in seconds.items()]
    sentences = [f"Median time of a batch, measured by {where}."]
    if others:
        ratios = [dense / mine for dense, mine in zip(seconds[others[0]], seconds[here], strict=True)]
        rows.append(("times as fast", *(f"{ratio:.2f}" for ratio in ratios)))
        slower = [f"batch {batch}" for batch, ratio in zip(BATCHES, ratios, strict=True) if ratio < FASTER]
        if slower:
            sentences.append(f"At {' and '.join(slower)} it is no faster than the dense model on this machine.")
    else:
        sentences.append("It has the shape and precision of the dense model, and so its speed: zeros save no time.")
    return Section("Speed", rows, sentences)
