"""One of several processes that train a ViT with a `Pruner`: `worker.py KIND CRITERION FOLDER`, with the kinds
ddp, accelerate, and prune, which prunes once."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from toys_of_others import vit

import vit_rsst

METHOD = {"name": "rsst", "penalty": {"residual": 0.01, "window": [0.0, 0.5]}, "remove_at": 0.5}
BATCH, STEPS = 12, 12
IMAGES = torch.randn(BATCH * STEPS, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(BATCH * STEPS) % 10


def main(kind: str, criterion: str, folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model, accelerator = vit(), None
    # Adam would blow the rounding of gradients that are zero, those of key biases, up to whole steps.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    if kind == "accelerate":
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(model, optimizer)
    elif world > 1:
        torch.distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    own = IMAGES[rank::world], LABELS[rank::world]  # 72, 48 images: batches of 30 are ragged, and differ by rank
    calibration = None if criterion == "magnitude" else list(zip(*(part.split(30) for part in own), strict=True))
    if kind == "prune":
        pruned_once(model, folder, rank, world)
        return
    pruner = vit_rsst.Pruner(
        model, optimizer, total_steps=STEPS, rounds=2, method=METHOD, final_sparsity=0.75, criterion=criterion,
        calibration=calibration,
    )  # fmt: skip
    net = getattr(model, "module", model)
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH)[rank::world]
        if accelerator is None:
            nn.functional.cross_entropy(model(IMAGES[rows]), LABELS[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        else:
            for part in rows.split(len(rows) // 2):
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(IMAGES[part]), LABELS[part]))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        zeros = all(not (net.get_parameter(n).detach() * ~alive).any() for n, alive in pruner.masks.items())
        assert zeros, f"step {step}"
    pruner.finish()
    told = {
        "masks": [result.mask_fingerprints for result in pruner.results],
        "ratio": pruner.results[1].condemned_ratio,
    }
    (folder / f"{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    if rank == 0:
        torch.save(net.state_dict(), folder / "model.pt")


def pruned_once(model: nn.Module, folder: Path, rank: int, world: int) -> None:
    """Prunes with compensation; of three ranks, the last has no images."""
    images = IMAGES[rank :: min(world, 2)] if rank < 2 else IMAGES[:0]
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(30) if len(part)]
    net = getattr(model, "module", model)
    found = vit_rsst.prune(model, granularity="2:4", compensate="least_squares", calibration=batches)
    told = {"masks": found.mask.fingerprint(), "weights": digest(net.state_dict())}
    told["tokens"] = [fit.tokens for fit in found.compensation.fits.values()]
    (folder / f"{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    if rank == 0:
        torch.save(net.state_dict(), folder / "model.pt")


def digest(state: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
