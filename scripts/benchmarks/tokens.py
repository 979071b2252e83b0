"""Inference speed-up of dynamic_vit from dropping tokens, compared with the same network keeping all tokens.

DynamicViT trades its predictors for speed. Both networks have the same weights; with a keep ratio of 1 the network is a
plain ViT and must return exactly the plain ViT's logits before anything is timed. The tokens entering each block are
counted. The two alternate in one process, in random order, on 64 images of 32 px (patch 4) in fp32 on one thread. A
ratio compares two runs of one alternation, so that 2 is twice as fast. The bound is missed if the whole 95 % interval
is below it. The cost of `lightweight_vit` must grow no faster than its tokens: a bound on its FLOPs, which are exact.
"""

import sys

import torch
from _common import alternate, environment, interval, parse_args, report
from torch import Tensor, nn

from vit_rsst.models import zoo
from vit_rsst.models.complexity import flops

SPEED_BOUND = 1.5
"""Minimum speed-up with a keep ratio of 0.7."""
GROWTH_BOUND = 4.1
"""Maximum ratio of the FLOPs of lightweight_vit at 1,024 patches to those at 256."""

KEEP_RATIO, BATCH, QUICK_BATCH, THREADS = 0.7, 64, 4, 1
ALTERNATIONS, QUICK_ALTERNATIONS, WARMUPS = 6, 3, 1
PATCHES = (64, 256, 1024)
FULL, AGAIN, DROPPING = "keeps all", "keeps all, again", f"keeps {KEEP_RATIO}"


def build(name: str, **args: object) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create(*zoo.describe(name, args, 10)).eval()


def networks() -> tuple[dict[str, nn.Module], nn.Module]:
    """The dynamic networks by name, and a plain ViT with the same weights."""
    plain, dropping = build("cifar_vit_base"), build("dynamic_vit", keep_ratio=KEEP_RATIO)
    full = build("dynamic_vit", keep_ratio=1.0)
    dropping.load_state_dict(plain.state_dict(), strict=False)
    full.load_state_dict(plain.state_dict())
    return {FULL: full, AGAIN: full, DROPPING: dropping}, plain


def tokens(net: nn.Module, images: Tensor) -> list[int]:
    """Tokens that enter each block."""
    seen: list[int] = []
    hooks = [block.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1])) for block in net.blocks]
    net(images)
    for hook in hooks:
        hook.remove()
    return seen


def growth() -> dict[str, dict[int, int]]:
    """FLOPs per image by number of patches, for linear and plain attention."""
    sides = {number: 4 * round(number**0.5) for number in PATCHES}
    names = ("lightweight_vit", "cifar_vit_base")
    return {name: {n: flops(build(name, img_size=side), side) for n, side in sides.items()} for name in names}


@torch.no_grad()
def main() -> int:
    args = parse_args(__doc__)
    torch.set_num_threads(THREADS)
    cpu, missed = torch.device("cpu"), []
    nets, plain = networks()
    images = torch.randn(QUICK_BATCH if args.quick else BATCH, 3, 32, 32)
    if not torch.equal(nets[FULL](images), plain(images)):
        missed.append("the network that keeps all tokens does not return the plain ViT's logits")
    passed = {name: tokens(net, images[:1]) for name, net in nets.items()}
    seconds = alternate(
        {name: lambda net=net: net(images) for name, net in nets.items()},
        QUICK_ALTERNATIONS if args.quick else ALTERNATIONS, WARMUPS, cpu,
    )  # fmt: skip
    ratios = {name: interval(seconds[FULL] / seconds[name]) for name in nets}
    if ratios[DROPPING].high < SPEED_BOUND:
        missed.append(f"dynamic_vit {DROPPING}: {ratios[DROPPING]} times as fast, bound {SPEED_BOUND}")
    cost = growth()
    steps = {name: by_number[PATCHES[2]] / by_number[PATCHES[1]] for name, by_number in cost.items()}
    if steps["lightweight_vit"] > GROWTH_BOUND:
        missed.append(f"lightweight_vit costs {steps['lightweight_vit']:.3f} times the FLOPs, bound {GROWTH_BOUND}")
    result = {
        "environment": environment(cpu),
        "batch": len(images),
        "seconds": {name: float(interval(values).median) for name, values in seconds.items()},
        "ratios": {name: vars(ratio) for name, ratio in ratios.items()},
        "flops": {name: flops(net, 32) for name, net in nets.items()},
        "tokens": passed,
        "flops_by_patches": cost,
        "missed": missed,
    }
    rows = [
        (f"dynamic_vit {name}", str(passed[name][-1]), f"{result['flops'][name] / 1e9:.2f}",
         f"{len(images) / result['seconds'][name]:.0f}", str(ratios[name]))
        for name in nets
    ]  # fmt: skip
    rows += [
        (f"{name}, {number:,} patches", str(number + 1), f"{by_number[number] / 1e9:.2f}", "", "")
        for name, by_number in cost.items() for number in PATCHES
    ]  # fmt: skip
    return report(
        args, result, (f"batch {len(images)}", "tokens at the end", "GFLOPs", "images/s", "times as fast"), rows
    )


if __name__ == "__main__":
    sys.exit(main())
