"""Plain PyTorch: a small ViT learns handwritten digits and loses nine tenths of its weights on the way."""

import sys

import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import vit_rsst

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)  # (1797, 3, 8, 8)
target = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1500], target[:1500]), batch_size=64, shuffle=True)
steps, shape = len(loader) * epochs, {"img_size": 8, "patch_size": 2}
model = timm.create_model("test_vit", num_classes=10, **shape)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)


@torch.no_grad()
def accuracy() -> float:
    return 100 * (model.eval()(images[1500:]).argmax(1) == target[1500:]).float().mean().item()


pruner = vit_rsst.Pruner(model, optimizer, total_steps=steps, final_sparsity=0.9, rounds=3, evaluate=accuracy)
for _ in range(epochs):
    model.train()
    for batch, labels in loader:
        torch.nn.functional.cross_entropy(model(batch), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
pruner.finish()
pruner.save_ticket("digits.safetensors", name="test_vit", args=shape)
print(pruner.report(), f"accuracy {accuracy():.2f}", sep="\n")
