"""Accelerate: whole heads and neurons, with accumulation and clipping, saved and resumed; then a smaller module."""

import sys

import timm
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import vit_rsst

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
accelerator = Accelerator(gradient_accumulation_steps=2)
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)  # (1797, 3, 8, 8)
target = torch.tensor(digits.target)
model = timm.create_model("test_vit", img_size=8, patch_size=2, num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
loader = DataLoader(TensorDataset(images, target), batch_size=32, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
pruner = vit_rsst.Pruner(
    model, optimizer, total_steps=epochs * -(-len(loader) // 2), rounds=2, granularity="head+neuron",
    final_sparsity={"head": 0.5, "neuron": 0.5}, criterion="taylor", calibration=[(images[:256], target[:256])],
    on_event=lambda event: accelerator.print(f"step {event.step}: {event.name} {event.round}, {event.density:.3f}"),
)  # fmt: skip
accelerator.register_for_checkpointing(pruner)
for _ in range(epochs):
    for batch, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.cross_entropy(model(batch), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state("checkpoint")  # accelerator.load_state("checkpoint") resumes
pruner.finish()
small, report = vit_rsst.slim(model)
accelerator.print(report)
