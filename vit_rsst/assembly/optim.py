"""The optimizer of a recipe and its learning rate over the rounds."""

from collections.abc import Callable

import torch
from torch import nn

from vit_rsst.models import zoo
from vit_rsst.progress import Progress
from vit_rsst.recipe.schema import Optim, Recipe, StepDecay
from vit_rsst.training import optim
from vit_rsst.training.schedules import learning_rate


def build_optimizer(net: nn.Module, options: Optim) -> torch.optim.Optimizer:
    return optim.create_optimizer(
        net,
        options.name,
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        betas=options.betas,
        lr_scales=lr_scales(net, options),
    )


def lr_scales(net: nn.Module, options: Optim) -> dict[str, float] | None:
    """Relative learning rate of each parameter; None: the same for all."""
    return zoo.lr_scales(net, options.layer_decay) if options.layer_decay < 1.0 else None


def make_lr(recipe: Recipe) -> Callable[[Progress], float]:
    """The learning rate as a function of progress: one schedule per round, from epoch K with `rewind: epoch:K`."""
    options, epochs = recipe.optim, recipe.train.epochs
    decay = options.schedule if isinstance(options.schedule, StepDecay) else None
    one_round = recipe.pruning.method.one_round
    rewind = recipe.pruning.rewind
    # A single-round method has one schedule over all epochs: warm-up and milestones are still counted in epochs.
    length = recipe.round_epochs[0] if one_round else epochs

    def lr(progress: Progress) -> float:
        start = 0.0
        if progress.round > 0:
            if rewind == "none":
                return at(1.0, 1)
            start = (recipe.pruning.rewind_epoch or 0) / epochs
        x = start + (1.0 - start) * progress.round_step / max(progress.round_steps, 1)
        return at(x, progress.round_steps)

    def at(fraction: float, num_steps: int) -> float:
        return learning_rate(
            fraction * num_steps,
            num_steps,
            lr=options.lr,
            warmup=options.warmup_epochs / length,
            schedule="steps" if decay else options.schedule,
            min_lr=options.min_lr,
            milestones=tuple(epoch / length for epoch in decay.steps) if decay else (),
            gamma=decay.gamma if decay else 1.0,
        )

    return lr
