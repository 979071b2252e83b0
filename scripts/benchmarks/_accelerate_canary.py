"""The same interruptions for a loop that saves and resumes with Accelerate alone, following its documentation."""

import json
import os
import signal
import time
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, STEPS, BATCH = 3, 8, 4
MOMENTS = {"mid-epoch": 11, "epoch end": 15, "evaluation": 16}
"""Moment → step after which it occurs; epoch 1 is steps 8 to 15, saved every two steps and at each epoch end."""


class Noisy(torch.utils.data.Dataset):
    """Numbers with a random augmentation, like any map-style dataset."""

    def __len__(self) -> int:
        return STEPS * BATCH + 2

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([float(i)]) + torch.rand(1)


def build_loader(kind: str, workers: int) -> DataLoader:
    forked = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    if kind == "in memory":
        return DataLoader(TensorDataset(torch.arange(34.0)[:, None]), BATCH, shuffle=True, drop_last=True)
    if kind == "map-style":
        return DataLoader(Noisy(), BATCH, shuffle=True, drop_last=True, **forked)
    rows = datasets.Dataset.from_dict({"x": [[float(i)] for i in range(34)]}).to_iterable_dataset(num_shards=4)
    rows = rows.shuffle(seed=0, buffer_size=16).map(lambda row: {"x": torch.tensor(row["x"])})
    return DataLoader(rows, BATCH, drop_last=True, collate_fn=lambda b: torch.stack([r["x"] for r in b]), **forked)


def train(folder: Path, kind: str, workers: int, moment: str = "", number: int = signal.SIGKILL) -> None:
    """Trains to the end, resuming from the newest state if any; writes the batches it saw and its weights."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    set_seed(0)
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    net = torch.nn.Linear(1, 1)
    net, optimizer, loader = accelerator.prepare(net, torch.optim.Adam(net.parameters()), build_loader(kind, workers))
    saved = sorted(folder.glob("step-*"))
    done = 0
    if saved:
        accelerator.load_state(str(saved[-1]))
        done = int(saved[-1].name.split("-")[1])
    for epoch in range(done // STEPS, EPOCHS):
        loader.set_epoch(epoch)
        skipped = done % STEPS if epoch == done // STEPS else 0
        batches = accelerator.skip_first_batches(loader, skipped) if skipped else loader
        for step, batch in enumerate(batches, epoch * STEPS + skipped):
            x = batch[0] if isinstance(batch, list | tuple) else batch
            with (folder / "seen").open("a") as file:
                file.write(json.dumps([step, x.flatten().tolist()]) + "\n")
            optimizer.zero_grad()
            accelerator.backward((net(x / 34) - 1).square().mean())
            optimizer.step()
            if step % 2:
                accelerator.save_state(str(folder / f"step-{step + 1:03d}"))
            if moment and MOMENTS[moment] == step + (moment == "evaluation"):
                os.kill(os.getpid(), number)
                time.sleep(5)
    torch.save([p.detach() for p in net.parameters()], folder / "weights.pt")
