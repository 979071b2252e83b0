"""Part b of gpu.py: training steps of this project, a bare PyTorch loop and timm's train.py."""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
from _common import alternate, interval
from _runs import begin_run, train_epoch
from accelerate.state import AcceleratorState
from gpu import Ledger
from torch import Tensor, nn

from vit_rsst.assembly.optim import build_optimizer
from vit_rsst.data.loaders import InMemoryLoader, placed
from vit_rsst.data.tables import Split
from vit_rsst.models import zoo
from vit_rsst.models.complexity import flops
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Penalty
from vit_rsst.recipe.schema import Augment, Data, Model, Pruning, Recipe, Schedule, Train
from vit_rsst.timing import device_name

NUM_CLASSES, WARMUPS, ALTERNATIONS = 10, 2, 8
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "B200": 2250e12}
"""GPU → dense bf16 FLOP/s with fp32 accumulation, from the vendor's data sheets (SXM if there are several)."""


@dataclass(frozen=True)
class Case:
    """One comparison; a block is one epoch of `steps` steps."""

    model: str
    image_size: int
    batch: int
    steps: int
    args: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.model}, {self.image_size} px, batch {self.batch}"


def cases(rehearse: bool) -> list[Case]:
    """Cases in order of interest."""
    if rehearse:
        return [Case("vit_tiny", 32, 4, 2, {"embed_dim": 24, "depth": 2, "num_heads": 3})]
    return [
        Case("vit_tiny", 32, 256, 20),
        Case("vit_small_patch16_224", 224, 256, 8),
        Case("vit_small", 32, 256, 15),
        Case("vit_base_patch16_224", 224, 128, 8),
        Case("vit_base", 32, 256, 8),
        Case("vit_large_patch16_224", 224, 64, 6),
    ]


def recipe_of(case: Case, folder: Path, compile: bool | str, is_in_window: bool, blocks: int, rehearse: bool) -> Recipe:
    """A recipe for round 0 of rsst, or for its penalty window."""
    return Recipe(
        name=f"{compile}-{is_in_window}",
        output_dir=str(folder),
        data=Data(source="digits", image_size=case.image_size, augment=Augment(hflip=0.5)),
        model=Model(name=case.model, args=case.args),
        train=Train(
            epochs=blocks,
            steps_per_epoch=case.steps,
            global_batch=case.batch,
            precision="no" if rehearse else "bf16",
            compile=compile,
            log_every_steps=case.steps,
        ),
        pruning=Pruning(
            method=Rsst(Penalty(window=(0.0, 1.0)), remove_at=1.0), schedule=Schedule(rounds=1, final_sparsity=0.5)
        ),
    )


@dataclass
class ByHand:
    """A hand-written loop: bare, or with what timm's train.py does around a step; reads the loss once per block."""

    recipe: Recipe
    data: InMemoryLoader
    net: nn.Module
    optimizer: torch.optim.Optimizer
    like_timm: bool = False
    step: int = 0

    def __post_init__(self) -> None:
        self.losses = timm.utils.AverageMeter()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        train, split = self.recipe.train, self.data.split
        order = torch.randperm(len(split), device=split.images.device)
        for rows in order.split(train.global_batch):
            drawn = self.data.augmentation.draw(len(rows), seed=self.step)
            images = self.data.augmentation.apply(split.images[rows], drawn, self.data.mean, self.data.std)
            yield images, split.labels[rows]

    def train_block(self) -> None:
        self.net.train()
        device, train = self.data.device, self.recipe.train
        num_steps = train.steps_per_epoch * train.epochs
        for images, labels in self.batches():
            lr = self.recipe.optim.lr * (1 + math.cos(math.pi * self.step / num_steps)) / 2
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                loss = F.cross_entropy(self.net(images), labels)
            loss.backward()
            if self.like_timm:
                timm.utils.dispatch_clip_grad(self.net.parameters(), value=1.0, mode="norm")
            else:
                nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        value = loss.item()  # train.py reads its loss at every log_interval
        self.losses.update(value, len(labels))


def by_hand(recipe: Recipe, data: InMemoryLoader, compile: bool = False, like_timm: bool = False) -> ByHand:
    net = zoo.create(*zoo.describe(recipe.model.name, recipe.model.args, NUM_CLASSES)).to(data.device)
    if like_timm:
        optimizer = timm.optim.create_optimizer_v2(net, "adamw", lr=recipe.optim.lr, weight_decay=0.05)
    else:
        optimizer = build_optimizer(net, recipe.optim)
    if compile:
        net.compile(dynamic=False)
    return ByHand(recipe, data, net, optimizer, like_timm)


BARE = "bare loop"


def contenders(case: Case, folder: Path, rehearse: bool) -> dict[str, Callable[[], Callable[[], None]]]:
    """Name → factory of a block of work; built one by one, so that a failure does not affect the others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = torch.Generator().manual_seed(0)
    number = case.batch * case.steps
    images = torch.randint(0, 256, (number, 3, case.image_size, case.image_size), dtype=torch.uint8, generator=random)
    split = placed(Split(images, torch.arange(number) % NUM_CLASSES), device)
    blocks, loaders = WARMUPS + ALTERNATIONS + 3, []

    def ours(compile: bool | str = False, is_in_window: bool = False) -> Callable[[], None]:
        run = begin_run(recipe_of(case, folder, compile, is_in_window, blocks, rehearse), split, int(is_in_window))
        loaders.append(run.loader)
        return lambda: train_epoch(run)

    def theirs(**options: bool) -> Callable[[], None]:
        return by_hand(recipe_of(case, folder, False, False, blocks, rehearse), loaders[0], **options).train_block

    return {
        "this project": ours,
        "this project, in the window": lambda: ours(is_in_window=True),
        BARE: theirs,
        "timm-like loop": lambda: theirs(like_timm=True),
        "this project, compiled": lambda: ours("default"),
        "bare loop, compiled": lambda: theirs(compile=True),
        "this project, reduce-overhead": lambda: ours("reduce-overhead"),
    }


def measure(case: Case, ledger: Ledger, rehearse: bool) -> None:
    """Adds a row for each contender; ratios are to the bare loop within the same alternation."""
    AcceleratorState._reset_state(reset_partial_state=True)  # precision is otherwise fixed once per process
    torch.compiler.reset()
    device, peaks = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    cost = 3 * flops(zoo.create(*zoo.describe(case.model, case.args, NUM_CLASSES), device="meta"), case.image_size)
    with tempfile.TemporaryDirectory() as folder:
        ready = {}
        for name, make in contenders(case, Path(folder), rehearse).items():
            with ledger.guarded(f"{case}: {name}"):
                block = make()
                for _ in range(WARMUPS):
                    block()
                peaks[name] = peak_of(block, device)
                ready[name] = block
        seconds = alternate(ready, 2 if rehearse else ALTERNATIONS, 0, device)
    for name, values in seconds.items():
        rate = case.batch * case.steps / float(np.median(values))
        row = {"images_per_s": rate, "ms": 1000 * float(np.median(values)) / case.steps}
        if BARE in seconds:
            row["ratio"] = str(interval(values / seconds[BARE]))
        if peak := next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in device_name(device)), None):
            row["mfu"] = rate * cost / peak
        ledger.add(f"{case}: {name}", row | peaks[name])
    ready.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_of(block: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Peak GiB of one block, in addition to what all contenders hold."""
    if device.type != "cuda":
        block()
        return {}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block()
    torch.cuda.synchronize()
    return {"peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30}
