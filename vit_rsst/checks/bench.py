"""The bench that checks work on: the recipe's own model, data, batches and optimizer, and how a verdict looks."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vit_rsst.assembly.data import build_loader, channels, data_options
from vit_rsst.assembly.model import build_model
from vit_rsst.assembly.optim import build_optimizer
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import Batch, Dealing, Loader, steps_per_epoch
from vit_rsst.data.sources import open_data
from vit_rsst.data.transforms import normalize
from vit_rsst.progress import Progress
from vit_rsst.recipe.schema import Recipe
from vit_rsst.seeds import derived_seed

LIMIT = 300.0
"""Seconds that one check may take."""


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        state: `ok`; `warning`: look at it; `failed`: the run would not be worth its time; `skipped`.
        text: what was seen, with numbers.
        advice: what to try, in fields of the recipe.
        details: more numbers, for the JSON.
        blocks: why none of the checks after it can run; empty where they can.
    """

    name: str
    state: str
    text: str
    advice: str = ""
    details: dict = field(default_factory=dict)
    blocks: str = ""


@dataclass
class Bench:
    """All that a check may use; every network is made anew and may be spoilt.

    Attributes:
        make_net: the recipe's network, seeded, on the device.
        draw: (split, number, seed) → images and labels balanced over classes, without augmentation, as the model sees
            them.
        loader: the recipe's own.
        step_seconds: of a training step on `batch` images; guessed by `first_loss`, then measured.
        toy: a trained network, where one was trained.
    """

    recipe: Recipe
    data: ImageData
    accelerator: Accelerator
    dealing: Dealing
    progress: Progress
    make_net: Callable[[], nn.Module]
    draw: Callable[[str, int, int], Batch]
    loader: Loader
    step_seconds: float = 0.0
    toy: nn.Module | None = None

    @classmethod
    def of(cls, recipe: Recipe, accelerator: Accelerator) -> "Bench":
        """Opens the data and builds the model once.

        Raises:
            RunError: what a run of the recipe would stop at before its first step.
        """
        data = open_data(data_options(recipe), recipe.seed, recipe.data.shuffle_buffer)
        dealing = Dealing.of(recipe.train.global_batch, recipe.train.batch_per_device, accelerator.num_processes)
        steps = steps_per_epoch(data.count("train"), recipe.train.global_batch, recipe.train.steps_per_epoch)
        mean, std = channels(recipe)

        def draw(split: str, number: int, seed: int) -> Batch:
            found = data.balanced(split, number, derived_seed(recipe.seed, "check", seed))
            return normalize(found.images.to(accelerator.device), mean, std), found.labels.to(accelerator.device)

        return cls(
            recipe=recipe,
            data=data,
            accelerator=accelerator,
            dealing=dealing,
            progress=Progress(steps, recipe.round_epochs),
            make_net=lambda: build_model(recipe, data)[0].to(accelerator.device),
            draw=draw,
            loader=build_loader(recipe, data, dealing, accelerator),
        )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def num_classes(self) -> int:
        return len(self.data.classes)

    @cached_property
    def batch(self) -> Batch:
        """The first micro-batch that training sees, of 64 images at most."""
        [images, labels] = next(self.loader.steps(Progress(self.progress.steps_per_epoch, (1,))))[0]
        return images[:64], labels[:64]

    def batches(self, number: int) -> list[Batch]:
        """The first micro-batches of as many steps, over epochs; of 64 images at most."""
        epochs = -(-number // self.progress.steps_per_epoch)
        found: list[Batch] = []
        for epoch in range(epochs):
            progress = Progress(self.progress.steps_per_epoch, (epochs,), 0, epoch)
            steps = islice(self.loader.steps(progress), number - len(found))
            found += [(micro[0][0][:64], micro[0][1][:64]) for micro in steps]
        return found

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """Plain cross-entropy, in the recipe's precision."""
        with self.accelerator.autocast():
            logits = net(batch[0])
        return nn.functional.cross_entropy(logits.float(), batch[1])

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(net, self.recipe.optim)

    def estimate(self, steps: float, images: int) -> float:
        """Seconds of as many training steps on so many images each."""
        return self.step_seconds * steps * images / max(len(self.batch[1]), 1)


def timed(call: Callable[[], object], device: torch.device) -> tuple[object, float]:
    """What a call returns, and its seconds with the GPU's work."""
    start = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - start
