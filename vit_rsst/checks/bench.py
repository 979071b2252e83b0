"""The bench that checks run on (model, data, batches and optimizer of the recipe) and their verdicts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vit_rsst.assembly.data import Rows, build_loader, channels, data_options
from vit_rsst.assembly.model import build_model
from vit_rsst.assembly.optim import build_optimizer
from vit_rsst.assembly.parts import Parts, Sizes, parts_of
from vit_rsst.data.dealing import Dealing
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import Batch, Loader
from vit_rsst.data.sources import open_data
from vit_rsst.data.transforms import normalize
from vit_rsst.progress import Progress
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.recipe.schema import Recipe
from vit_rsst.seeds import derived_seed

LIMIT = 300.0
"""Longest time of one check, in seconds."""


@dataclass(frozen=True)
class Verdict:
    """Result of a check.

    Attributes:
        state: `ok`; `warning`: take a look; `failed`: training would be a waste of time; `skipped`.
        text: findings, with numbers.
        advice: what to try, as fields of the recipe.
        details: more numbers, for the JSON.
        blocks: why the remaining checks cannot run; empty if they can.
    """

    name: str
    state: str
    text: str
    advice: str = ""
    details: dict = field(default_factory=dict)
    blocks: str = ""


@dataclass
class Bench:
    """Everything that a check may use; each network is freshly built, so a check may modify it.

    Attributes:
        make_net: builds the network of the recipe, seeded, on the device.
        start_mask: of `model.start_from`, if set.
        draw: (split, number, seed) → class-balanced images and labels, normalised, without augmentation.
        loader: training batches of the recipe.
        step_seconds: of a training step on `batch`; estimated by `first_loss`, then measured.
        toy: a network trained by an earlier check, if any.
    """

    recipe: Recipe
    data: ImageData
    accelerator: Accelerator
    dealing: Dealing
    progress: Progress
    make_net: Callable[[], nn.Module]
    start_mask: MaskSet | None
    draw: Callable[[str, int, int], Batch]
    loader: Loader
    step_seconds: float = 0.0
    toy: nn.Module | None = None

    @classmethod
    def of(cls, recipe: Recipe, accelerator: Accelerator) -> "Bench":
        """Opens the data and builds the loader.

        Raises:
            RunError: whatever would stop a run of the recipe before its first step.
        """
        data = open_data(data_options(recipe), recipe.seed, recipe.data.shuffle_buffer)
        sizes = Sizes.of(recipe, Rows.counted(data), accelerator.num_processes)
        num_classes = sizes.rows.num_classes
        net, start_mask = build_model(recipe, num_classes, sizes.rows.classes, is_real=False)
        parts_of(recipe, net, start_mask, sizes.image_size)  # rejects what a run rejects
        mean, std = channels(recipe)

        def draw(split: str, number: int, seed: int) -> Batch:
            found = data.balanced(split, number, derived_seed(recipe.seed, "check", seed))
            return normalize(found.images.to(accelerator.device), mean, std), found.labels.to(accelerator.device)

        return cls(
            recipe=recipe,
            data=data,
            accelerator=accelerator,
            dealing=sizes.dealing,
            progress=sizes.progress,
            make_net=lambda: build_model(recipe, num_classes, sizes.rows.classes)[0].to(accelerator.device),
            start_mask=start_mask,
            draw=draw,
            loader=build_loader(recipe, data, sizes.dealing, accelerator),
        )

    def parts(self, net: nn.Module) -> Parts:
        """Of a network that `make_net` built."""
        return parts_of(self.recipe, net, self.start_mask, self.data.options.size)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def num_classes(self) -> int:
        return len(self.data.classes)

    @cached_property
    def batch(self) -> Batch:
        """The first micro-batch of training; at most 64 images."""
        [images, labels] = next(self.loader.steps(Progress(self.progress.steps_per_epoch, (1,))))[0]
        return images[:64], labels[:64]

    def batches(self, number: int) -> list[Batch]:
        """The first micro-batch of each of `number` steps, across epochs; at most 64 images each."""
        epochs = -(-number // self.progress.steps_per_epoch)
        found: list[Batch] = []
        for epoch in range(epochs):
            progress = Progress(self.progress.steps_per_epoch, (epochs,), 0, epoch)
            steps = islice(self.loader.steps(progress), number - len(found))
            found += [tuple(part[:64] for part in micro_batches[0]) for micro_batches in steps]
        return found

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """Plain cross-entropy, in the recipe's precision."""
        with self.accelerator.autocast():
            logits = net(batch[0])
        return nn.functional.cross_entropy(logits.float(), batch[1])

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(net, self.recipe.optim)

    def estimate(self, steps: float, images: int) -> float:
        """Seconds of `steps` training steps on `images` each."""
        return self.step_seconds * steps * images / max(len(self.batch[1]), 1)
