"""The bench that checks run on (model, data, batches and optimizer of the recipe) and their verdicts."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor, nn

from vit_rsst import shards
from vit_rsst.assembly import sharding
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
from vit_rsst.run.ranks import once_a_node
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

    Of several processes, all run the checks, on batches of their own. If the launcher asks for sharded weights, so are
    those of every network, whose passes are then collective: what decides whether a check goes on is a `mean`.

    Attributes:
        parts_on_meta: of the network, from shapes alone.
        build_net: builds the network of the recipe, seeded, on the CPU.
        make_net: the same on the device, and sharded if that is asked.
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
    parts_on_meta: Parts
    build_net: Callable[[], nn.Module]
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
        with once_a_node(accelerator):
            data = open_data(data_options(recipe), recipe.seed, recipe.data.shuffle_buffer)
        sizes = Sizes.of(recipe, Rows.counted(data), accelerator.num_processes)
        num_classes = sizes.rows.num_classes
        net, start_mask = build_model(recipe, num_classes, sizes.rows.classes, is_real=False)
        on_meta = parts_of(recipe, net, start_mask, sizes.image_size)  # rejects what a run rejects
        if sharding.is_on(accelerator):
            sharding.check(recipe, net)
        mean, std = channels(recipe)

        def draw(split: str, number: int, seed: int) -> Batch:
            found = data.balanced(split, number, derived_seed(recipe.seed, "check", seed))
            return normalize(found.images.to(accelerator.device), mean, std), found.labels.to(accelerator.device)

        def build_net() -> nn.Module:
            return build_model(recipe, num_classes, sizes.rows.classes)[0]

        def make_net() -> nn.Module:
            net = build_net()
            return sharding.shard_(accelerator, net) if sharding.is_on(accelerator) else net.to(accelerator.device)

        return cls(
            recipe=recipe,
            data=data,
            accelerator=accelerator,
            dealing=sizes.dealing,
            progress=sizes.progress,
            parts_on_meta=on_meta,
            build_net=build_net,
            make_net=make_net,
            start_mask=start_mask,
            draw=draw,
            loader=build_loader(recipe, data, sizes.dealing, accelerator),
        )

    def parts(self, net: nn.Module) -> Parts:
        """Of a network that `make_net` built."""
        if not self.is_sharded:
            return parts_of(self.recipe, net, self.start_mask, self.data.options.size)
        start = self.start_mask.masks if self.start_mask is not None else {}
        shapes = {name: weight.shape for name, weight in self.parts_on_meta.weights.items()}
        mask = {name: start.get(name, torch.ones(shape, dtype=torch.bool)) for name, shape in shapes.items()}
        return sharding.sharded(replace(self.parts_on_meta, net=net, mask=MaskSet(mask)))

    def whole(self, net: nn.Module) -> nn.Module | None:
        """A network that `make_net` built; if it is sharded, a whole copy in the host memory of rank 0, None elsewhere.

        Collective.
        """
        if not self.is_sharded:
            return net
        state = shards.gathered(net.state_dict())
        if not self.accelerator.is_main_process:
            return None
        copy = self.build_net()
        copy.load_state_dict(state)
        return copy

    def mean(self, number: float) -> float:
        """Mean over all ranks of a number that may differ between them; collective."""
        if self.accelerator.num_processes == 1:
            return number
        return float(reduce(torch.tensor(number, dtype=torch.float64, device=self.device), "mean"))

    @property
    def is_sharded(self) -> bool:
        return sharding.is_on(self.accelerator)

    @property
    def told(self) -> list[str]:
        """What was found out about the data, and how the weights are sharded."""
        units = sharding.Units.of(self.parts_on_meta.net).text(self.accelerator.num_processes)
        return [*self.data.told, units] if self.is_sharded else list(self.data.told)

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
