"""Time and memory of a global threshold over 85 M and 302 M weights, compared with numpy and torch.nn.utils.prune.

vit_base (32 px, patch 4) and vit_large (224 px, patch 16): magnitude scores of all prunable weights, one threshold,
masks that keep exactly 10 %. Contenders alternate in one process on the same weights: the project's selector, a
partition of one array of all scores in numpy, and on the smaller model `torch.nn.utils.prune.global_unstructured`; its
13 copies of the scores would take 15 GiB on the larger one. The masks must be equal, torch's up to ties. Peak memory is
the increase in a separate process that selects once, in copies of the scores (4 bytes per weight).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from _common import Interval, alternate, environment, interval, parse_args, report
from torch import nn
from torch.nn.utils import prune

from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_weights
from vit_rsst.pruning.criteria import CRITERIA, Evidence
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.selector import Selector

TIME_BOUND = 1.0
"""Maximum ratio of the selector's time to that of each other contender."""
COPIES_BOUND = 2.0
"""Maximum copies of the scores at peak; the resulting masks, a quarter of a copy, do not count."""
MASK_COPIES = 0.25
SAME_BOUND = 0.999999
"""Minimum fraction of the kept that torch keeps too, which breaks ties otherwise."""

DENSITY = 0.1
ALTERNATIONS, QUICK_ALTERNATIONS, WARMUPS = 7, 2, 1
OURS, NUMPYS, TORCHS = "vit_rsst selector", "numpy partition", "torch global_unstructured"
MODELS = {"vit_base": (OURS, NUMPYS, TORCHS), "vit_large_imagenet": (OURS, NUMPYS)}
"""Model → contenders; --quick measures the first model alone."""
MEMORY_OF = "SELECTION_MEMORY_OF"
"""Environment variable, MODEL/CONTENDER, that makes this script select once and print its peak memory."""


def network(model: str) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create(*zoo.describe(model, {}, 10))


def evidence(net: nn.Module) -> Evidence:
    weights = prunable_weights(net)
    return Evidence(weights, MaskSet.full(weights), seed=0)


def ours(net: nn.Module) -> MaskSet:
    return Selector(CRITERIA["magnitude"]).units(evidence(net), DENSITY)


def numpys(net: nn.Module) -> MaskSet:
    """A partition of one array of all scores, as the selector of the first versions did it."""
    found = evidence(net)
    scores = CRITERIA["magnitude"].of_elements(found)
    flat, start = np.empty(sum(score.numel() for score in scores.values()), dtype=np.float32), 0
    for name, score in scores.items():
        part = flat[start : start + score.numel()]
        np.copyto(part, score.numpy().reshape(-1))
        part[~found.alive[name].numpy().reshape(-1)] = -np.inf
        if np.isnan(part).any():
            raise ValueError("a score is not a number")
        start += score.numel()
    k = round(DENSITY * flat.size)
    flat.partition(flat.size - k)
    threshold = float(flat[flat.size - k])
    kept = {name: ((score > threshold) & found.alive[name]).contiguous() for name, score in scores.items()}
    missing = k - sum(int(mask.sum()) for mask in kept.values())
    for name, score in scores.items():
        ties = ((score == threshold) & found.alive[name]).flatten().nonzero().flatten()[:missing]
        kept[name].view(-1)[ties] = True
        missing -= len(ties)
    return MaskSet(kept)


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


CONTENDERS = {OURS: ours, NUMPYS: numpys, TORCHS: torchs}


def resident(key: str) -> int:
    """Current (`VmRSS`) or peak (`VmHWM`) memory of this process in bytes; Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def select_once(model: str, name: str) -> None:
    """Prints the increase in peak memory of one selection, in bytes."""
    net = network(model)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = resident("VmRSS")
    CONTENDERS[name](net)
    print(json.dumps(resident("VmHWM") - before))


def memory(model: str, name: str) -> int:
    command = [sys.executable, __file__]
    variables = os.environ | {MEMORY_OF: f"{model}/{name}"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def measure(model: str, alternations: int) -> dict:
    """Times, memory and masks of the contenders on one model."""
    net, contenders = network(model), {name: CONTENDERS[name] for name in MODELS[model]}
    number = sum(weight.numel() for weight in prunable_weights(net).values())
    mask = ours(net)
    same = {name: (mask & select(net)).num_alive / mask.num_alive for name, select in contenders.items()}
    timed = {name: lambda select=select: select(net) for name, select in contenders.items()}
    seconds = alternate(timed, alternations, WARMUPS, torch.device("cpu"))
    return {
        "weights": number,
        "kept": mask.num_alive,
        "kept_too": same,
        "seconds": {name: float(interval(values).median) for name, values in seconds.items()},
        "ratios": {name: vars(interval(seconds[OURS] / seconds[name])) for name in contenders if name != OURS},
        "copies": {name: memory(model, name) / (4 * number) for name in contenders},
    }


def judge(model: str, found: dict) -> list[str]:
    """A sentence for each missed bound."""
    missed = []
    for name, ratio in found["ratios"].items():
        if Interval(**ratio).exceeds(TIME_BOUND):
            missed.append(f"{model}: the selector takes {Interval(**ratio)} of the time of {name}, bound {TIME_BOUND}")
        if found["kept_too"][name] < (SAME_BOUND if name == TORCHS else 1.0):
            missed.append(f"{model}: {name} keeps {found['kept_too'][name]:.6%} of what the selector keeps")
    if (copies := found["copies"][OURS] - MASK_COPIES) > COPIES_BOUND:
        missed.append(f"{model}: the selector holds {copies:.2f} copies of the scores, bound {COPIES_BOUND}")
    if found["kept"] != round(DENSITY * found["weights"]):
        missed.append(f"{model}: {found['kept']} of {found['weights']} weights kept, asked for {DENSITY}")
    return missed


def rows_of(model: str, found: dict) -> list[tuple[str, ...]]:
    rows = []
    for name, copies in found["copies"].items():
        ratio = str(Interval(**found["ratios"][name])) if name in found["ratios"] else ""
        gib = copies * 4 * found["weights"] / 2**30
        what = f"{found['weights'] / 1e6:.0f} M ({model}), {name}"
        rows.append((what, f"{found['seconds'][name]:.2f}", ratio, f"{copies:.2f}", f"{gib:.2f}"))
    return rows


def main() -> int:
    if asked := os.environ.get(MEMORY_OF):
        select_once(*asked.split("/"))
        return 0
    args = parse_args(__doc__)
    alternations, models = (QUICK_ALTERNATIONS, list(MODELS)[:1]) if args.quick else (ALTERNATIONS, list(MODELS))
    found = {model: measure(model, alternations) for model in models}
    rows = [row for model in models for row in rows_of(model, found[model])]
    rows.append(("bounds", "", f"≤ {TIME_BOUND}", f"≤ {COPIES_BOUND + MASK_COPIES}", ""))
    result = {
        "environment": environment(torch.device("cpu")),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "density": DENSITY,
        "models": found,
        "missed": [sentence for model in models for sentence in judge(model, found[model])],
    }
    headers = (f"selection on {result['memory_gib']} GiB", "seconds", "of its time", "copies at the peak", "GiB")
    return report(args, result, headers, rows)


if __name__ == "__main__":
    sys.exit(main())
