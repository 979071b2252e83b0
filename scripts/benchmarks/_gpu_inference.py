"""Part c of gpu.py: inference speed-up from sparsity. Removed units, and 2:4 sparsity on sparse tensor cores."""

import copy
import functools
from collections.abc import Callable

import numpy as np
import torch
from _common import alternate, interval
from gpu import Ledger
from inference import DENSE, MASKED, SLIM, make_networks
from torch import Tensor, nn

from vit_rsst.models import zoo
from vit_rsst.models.complexity import flops
from vit_rsst.pruning.contest import keep_n_of_m

Contender = Callable[[Tensor], Tensor]
ALTERNATIONS, CALLS = (20, 10) if torch.cuda.is_available() else (2, 1)
TOLERANCE = 0.1
"""Maximum difference between logits of equivalent bf16 networks, relative to the largest logit."""


def cases(rehearse: bool) -> dict[str, Callable[[Ledger], None]]:
    """Name → measurement of one network at one batch size."""
    found = {
        f"slim, {size} px, batch {batch}": functools.partial(slim, size, batch)
        for size in ((32,) if rehearse else (32, 224))
        for batch in ((2,) if rehearse else (1, 64, 256))
    }
    model, args = ("vit_tiny", {"depth": 1}) if rehearse else ("vit_base_patch16_224", {})
    for batch in (2,) if rehearse else (64, 256):
        name = f"2:4, {model}, batch {batch}"
        found[name] = functools.partial(two_of_four, model, args, 32 if rehearse else 224, batch)
    return found


def slim(image_size: int, batch: int, ledger: Ledger) -> None:
    """vit_small with half of its heads and neurons removed, in bf16: eager, compiled, with CUDA graphs."""
    device, dtype = on()
    networks = {name: net for name, net in make_networks(image_size)[0].items() if name in (DENSE, SLIM, MASKED)}
    share = flops(networks[SLIM], image_size) / flops(networks[DENSE], image_size)  # counted in fp32
    networks = {name: net.to(device, dtype) for name, net in networks.items()}
    ready: dict[str, Contender] = dict(networks)
    if device.type == "cuda":
        torch.compiler.reset()
        for mode in ("default", "reduce-overhead"):
            ready |= {f"{name}, {mode}": compiled(networks[name], mode) for name in (DENSE, SLIM)}
    likes = {name: MASKED if name.startswith((SLIM, MASKED)) else DENSE for name in ready}
    time_them(
        f"slim, {image_size} px, batch {batch}", ready, likes, image_size, batch, ledger, {SLIM: {"flops": share}}
    )


def two_of_four(model: str, args: dict, image_size: int, batch: int, ledger: Ledger) -> None:
    """Linear layers of the blocks with 2:4 sparsity, stored as zeros and in the semi-structured sparse format."""
    device, dtype = on()
    torch.manual_seed(0)
    masked = zoo.create(*zoo.describe(model, args, 10)).to(device, dtype).eval()
    layers = {n: m for n, m in masked.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)}
    for layer in layers.values():
        weight = layer.weight.data
        weight.mul_(keep_n_of_m(weight.abs(), torch.ones_like(weight, dtype=torch.bool), 2, 4))
    ready: dict[str, Contender] = {DENSE: masked}
    name = f"2:4, {model}, batch {batch}"
    if device.type == "cpu":
        ledger.add(f"{name}: to_sparse_semi_structured (not here: needs a GPU)", {})
    else:
        with ledger.guarded(f"{name}: to_sparse_semi_structured"):
            sparse = copy.deepcopy(masked)
            for path in layers:
                layer = sparse.get_submodule(path)
                layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), False)
            with torch.inference_mode():
                sparse(torch.zeros(batch, 3, image_size, image_size, device=device, dtype=dtype))
            ready["to_sparse_semi_structured"] = sparse
    if device.type == "cuda":
        torch.compiler.reset()
        for other, net in list(ready.items()):
            with ledger.guarded(f"{name}: {other}, default"):
                ready[f"{other}, default"] = compiled(net, "default")
    time_them(name, ready, dict.fromkeys(ready, DENSE), image_size, batch, ledger, {})


def on() -> tuple[torch.device, torch.dtype]:
    has_gpu = torch.cuda.is_available()
    return torch.device("cuda" if has_gpu else "cpu"), torch.bfloat16 if has_gpu else torch.float32


def compiled(net: nn.Module, mode: str) -> nn.Module:
    net = copy.deepcopy(net)
    net.compile(dynamic=False, mode=None if mode == "default" else mode)
    return net


def time_them(
    case: str,
    ready: dict[str, Contender],
    likes: dict[str, str],
    image_size: int,
    batch: int,
    ledger: Ledger,
    more: dict[str, dict],
) -> None:
    """Adds a row for each contender whose logits match its reference."""
    device, dtype = on()
    images = torch.randn(batch, 3, image_size, image_size, device=device, dtype=dtype)
    with torch.inference_mode():
        logits = {}
        for name in list(ready):
            with ledger.guarded(f"{case}: {name}"):
                logits[name] = ready[name](images).float().clone()
                like = logits[likes[name]] if likes[name] in logits else ready[likes[name]](images).float().clone()
                off = float((logits[name] - like).abs().max() / like.abs().max().clamp(min=1.0))
                assert off <= TOLERANCE, f"logits differ by {off:.2g} of the largest"
            if name not in logits or f"{case}: {name}" in ledger.rows:
                ready = {key: value for key, value in ready.items() if key != name}

    def block(run: Contender) -> Callable[[], None]:
        @torch.inference_mode()
        def forward() -> None:
            for _ in range(CALLS):
                run(images)

        return forward

    seconds = alternate({name: block(run) for name, run in ready.items()}, ALTERNATIONS, 2, device)
    for name, values in seconds.items():
        median = float(np.median(values)) / CALLS
        row = {"ms": 1000 * median, "images_per_s": batch / median}
        if DENSE in seconds:
            row["speed"] = str(interval(seconds[DENSE] / values))
        ledger.add(f"{case}: {name}", row | more.get(name, {}))
