"""transformers' Trainer: a callback prunes, logs, and is saved and resumed with the checkpoints."""

import sys

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from vit_rsst.integrations.transformers import PruningCallback

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)  # (1797, 3, 8, 8)
rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, digits.target.tolist(), strict=True)]
shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_labels=10, **shape))

callback = PruningCallback(final_sparsity=0.8, rounds=2, dense_steps=0.4, protect=["classifier*", "*projection*"])
trainer = Trainer(
    model,
    TrainingArguments("trainer", num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=2e-3,
                      report_to=[], save_strategy="epoch", save_total_limit=2),
    train_dataset=rows[:1500],
    eval_dataset=rows[1500:],
    compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(1) == result.label_ids).mean()},
    callbacks=[callback],
)  # fmt: skip
trainer.train()  # trainer.train(resume_from_checkpoint=True) resumes
print(callback.pruner.report(), trainer.evaluate(), sep="\n")
