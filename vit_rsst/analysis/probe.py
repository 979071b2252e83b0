"""A process that builds and runs one network and reports its memory: `python -m vit_rsst.analysis.probe`.

Reads a JSON specification from standard input and prints one line of JSON; started by `measure.probe`.
"""

import json
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from vit_rsst import machine
from vit_rsst.models import zoo
from vit_rsst.models.footprint import training_bytes
from vit_rsst.timing import summary, timed

STEPS, STEP_SECONDS = 3, 2.0
"""Training steps that are timed, after one for warm-up, and the time limit of a step in seconds."""


def main() -> None:
    spec = json.load(sys.stdin)
    torch.set_num_threads(spec["threads"])
    device = torch.device(spec["device"])
    net = zoo.described(spec["header"], "analysis", device="meta")
    if device.type == "cuda":
        torch.zeros(1, device=device)
    found = {"kind": "cuda" if device.type == "cuda" else "rss", "before": peak(device)}
    net.to_empty(device=device)
    fill_(net)
    images = torch.randn(spec["batch"], 3, spec["image_size"], spec["image_size"], device=device)
    with torch.inference_mode():
        net.eval()(images)
        seconds = min(timed(lambda: net(images), device)[1] for _ in range(2))
    found["inference"] = peak(device)
    if spec["train_batch"]:
        batch = fitting_batch(net, spec, seconds / spec["batch"], device)
        found |= {"train_batch": batch, "step": summary(train(net, batch, spec["image_size"], device))}
        found["training"] = peak(device)
    print(json.dumps(found))


def peak(device: torch.device) -> int:
    """Peak memory so far in bytes: allocated by torch on a GPU, otherwise resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # getrusage also counts the parent's memory before exec
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def fill_(net: nn.Module) -> None:
    """Small random weights, and buffers that are safe as indices or scales."""
    for parameter in net.parameters():
        parameter.normal_(std=0.02)
    for buffer in net.buffers():
        buffer.fill_(1 if buffer.is_floating_point() else 0)


def fitting_batch(net: nn.Module, spec: dict, seconds: float, device: torch.device) -> int:
    """The requested batch, halved until a step fits in two thirds of free memory and in the time limit.

    Args:
        seconds: of the forward pass per image; the backward pass takes about twice as long.
    """
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else machine.available_memory()
    state = 12 * sum(parameter.numel() for parameter in net.parameters())
    batch = spec["train_batch"]
    while batch > 1 and (
        3 * seconds * batch > STEP_SECONDS or state + training_bytes(net, spec["image_size"], batch) > 2 / 3 * free
    ):
        batch //= 2
    return batch


def train(net: nn.Module, batch: int, image_size: int, device: torch.device) -> list[float]:
    """Seconds per AdamW step on random images, in fp32."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters())
    images = torch.randn(batch, 3, image_size, image_size, device=device)

    def step() -> None:
        logits = net(images)
        F.cross_entropy(logits, torch.zeros(batch, dtype=torch.long, device=device)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return [timed(step, device)[1] for _ in range(STEPS)]


if __name__ == "__main__":
    main()
