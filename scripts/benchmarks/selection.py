"""Time and memory of a global threshold over 85 M weights, compared with torch.nn.utils.prune.

vit_base (32 px, patch 4): magnitude scores of all prunable weights, one threshold, masks that keep exactly 10 %. The
project's selector and `torch.nn.utils.prune.global_unstructured` alternate in one process on the same weights; the
masks must be equal up to ties. Peak memory is the increase in a separate process that selects once, in copies of the
scores (4 bytes per weight).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from _common import alternate, environment, interval, parse_args, report
from torch import nn
from torch.nn.utils import prune

from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_weights
from vit_rsst.pruning.criteria import CRITERIA, Evidence
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.selector import Selector

TIME_BOUND = 1.0
"""Maximum ratio of the selector's time to that of `global_unstructured`."""
COPIES_BOUND = 2.0
"""Maximum copies of the scores at peak; the resulting masks, a quarter of a copy, do not count."""

MODEL, DENSITY = "vit_base", 0.1
ALTERNATIONS, QUICK_ALTERNATIONS, WARMUPS = 7, 2, 1
OURS, TORCHS = "vit_rsst selector", "torch global_unstructured"
MEMORY_OF = "SELECTION_MEMORY_OF"
"""Environment variable that makes this script select once and print its peak memory."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return zoo.create(*zoo.describe(MODEL, {}, 10))


def ours(net: nn.Module) -> MaskSet:
    weights = prunable_weights(net)
    selector = Selector(CRITERIA["magnitude"])
    return selector.units(Evidence(weights, MaskSet.full(weights), seed=0), DENSITY)


def torchs(net: nn.Module) -> MaskSet:
    names = list(prunable_weights(net))
    places = [(net.get_submodule(name.removesuffix(".weight")), "weight") for name in names]
    prune.global_unstructured(places, prune.L1Unstructured, amount=1.0 - DENSITY)
    masks = {name: module.weight_mask.bool() for name, (module, _) in zip(names, places, strict=True)}
    for module, name in places:  # restore plain weights
        module.parametrized = module._parameters.pop("weight_orig")
        for hook in list(module._forward_pre_hooks):
            del module._forward_pre_hooks[hook]
        del module._buffers["weight_mask"], module.weight
        setattr(module, name, module._parameters.pop("parametrized"))
    return MaskSet(masks)


CONTENDERS = {OURS: ours, TORCHS: torchs}


def resident(key: str) -> int:
    """Current (`VmRSS`) or peak (`VmHWM`) memory of this process in bytes; Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def select_once(name: str) -> None:
    """Prints the increase in peak memory of one selection, in bytes."""
    net = network()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = resident("VmRSS")
    CONTENDERS[name](net)
    print(json.dumps(resident("VmHWM") - before))


def memory(name: str) -> int:
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=os.environ | {MEMORY_OF: name}, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def main() -> int:
    if name := os.environ.get(MEMORY_OF):
        select_once(name)
        return 0
    args = parse_args(__doc__)
    cpu, net = torch.device("cpu"), network()
    number = sum(weight.numel() for weight in prunable_weights(net).values())
    masks = {name: select(net) for name, select in CONTENDERS.items()}
    same = (masks[OURS] & masks[TORCHS]).num_alive / masks[OURS].num_alive
    seconds = alternate(
        {name: lambda select=select: select(net) for name, select in CONTENDERS.items()},
        QUICK_ALTERNATIONS if args.quick else ALTERNATIONS, WARMUPS, cpu,
    )  # fmt: skip
    ratio = interval(seconds[OURS] / seconds[TORCHS])
    copies = {name: memory(name) / (4 * number) for name in CONTENDERS}
    mask_copies = 0.25
    missed = []
    if ratio.exceeds(TIME_BOUND):
        missed.append(f"the selector takes {ratio} of the time of global_unstructured, bound {TIME_BOUND}")
    if copies[OURS] - mask_copies > COPIES_BOUND:
        missed.append(f"the selector holds {copies[OURS] - mask_copies:.2f} copies of the scores, bound {COPIES_BOUND}")
    if masks[OURS].num_alive != round(DENSITY * number) or same < 0.999999:
        missed.append(f"{masks[OURS].num_alive} kept, {same:.6%} of them by both")
    contenders = {
        name: {"seconds": float(interval(seconds[name]).median), "copies": copies[name]} for name in CONTENDERS
    }
    result = {
        "environment": environment(cpu),
        "weights": number,
        "density": DENSITY,
        "ratio": vars(ratio),
        "kept_by_both": same,
        "contenders": contenders,
        "missed": missed,
    }
    rows = [
        (name, f"{c['seconds']:.2f}", f"{c['copies']:.2f}", f"{c['copies'] * 4 * number / 2**30:.2f}")
        for name, c in contenders.items()
    ]
    rows.append((f"ratio {ratio}, bound {TIME_BOUND}", "", f"≤ {COPIES_BOUND + mask_copies}", ""))
    return report(args, result, (f"selection of {number:,} weights", "seconds", "copies at the peak", "GiB"), rows)


if __name__ == "__main__":
    sys.exit(main())
