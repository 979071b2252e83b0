"""The baseline: a hand-written loop, bare or with Accelerate, or masked with torch's own utilities.

It uses the project's data, augmentation, optimizer and recipe, so that only the loop differs; it has no controller,
seeding, console, tracker or resume points.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrize, prune

from vit_rsst.assembly.optim import build_optimizer
from vit_rsst.data.loaders import InMemoryLoader
from vit_rsst.models import zoo
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.recipe.schema import Recipe
from vit_rsst.train import make_accelerator


class Masked(nn.Module):
    """A parametrization that multiplies a weight by a mask."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


MASKINGS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "torch.nn.utils.prune": lambda layer, mask: prune.custom_from_mask(layer, "weight", mask),
    "parametrizations": lambda layer, mask: parametrize.register_parametrization(layer, "weight", Masked(mask)),
}
"""Peer → how it masks one layer in place."""


@dataclass
class PlainLoop:
    """Trains `net` in blocks.

    Attributes:
        data: provides images and augmentation; batches are made here.
        log: file that receives a line of JSON per step.
        accelerator: None for the bare loop.
        loss, hits: sums over all steps.
    """

    recipe: Recipe
    data: InMemoryLoader
    net: nn.Module
    optimizer: torch.optim.Optimizer
    log: Path
    accelerator: Accelerator | None = None
    step: int = 0
    loss: float | Tensor = 0.0
    hits: int | Tensor = 0

    def train_block(self) -> None:
        """One epoch of `train.steps_per_epoch` steps."""
        train, split = self.recipe.train, self.data.split
        num_steps, began = train.steps_per_epoch * train.epochs, time.monotonic()
        train_step = self._accelerated_step if self.accelerator else self._bare_step
        self.net.train()
        order = torch.randperm(len(split), device=split.images.device)
        for rows in order[: train.steps_per_epoch * train.global_batch].split(train.global_batch):
            drawn = self.data.augmentation.draw(len(rows), seed=self.step)
            images = self.data.augmentation.apply(split.images[rows], drawn, self.data.mean, self.data.std)
            labels = split.labels[rows]
            lr = self.recipe.optim.lr * (1 + math.cos(math.pi * self.step / num_steps)) / 2
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            logits, loss, norm = train_step(images, labels)
            self.step += 1
            self.loss += loss.detach()
            self.hits += (logits.detach().argmax(1) == labels).sum()
            rate = len(rows) / (time.monotonic() - began)
            record = {"step": self.step, "loss": loss.item(), "grad_norm": norm.item(), "lr": lr, "images_per_s": rate}
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _bare_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16"):
            logits = self.net(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        norm = clip_grad_norm_(self.net.parameters(), self.recipe.optim.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return logits, loss, norm

    def _accelerated_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with self.accelerator.accumulate(self.net):
            logits = self.net(images)
            loss = F.cross_entropy(logits, labels)
            self.accelerator.backward(loss)
            norm = self.accelerator.clip_grad_norm_(self.net.parameters(), self.recipe.optim.clip_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return logits, loss, norm


def plain_loop(recipe: Recipe, data: InMemoryLoader, log: Path) -> PlainLoop:
    """The bare loop."""
    net = _net(recipe, data)
    return PlainLoop(recipe, data, net, build_optimizer(net, recipe.optim), log)


def accelerated_loop(recipe: Recipe, data: InMemoryLoader, log: Path) -> PlainLoop:
    """The plain Accelerate loop, as in its documentation."""
    net, accelerator = _net(recipe, data), make_accelerator(recipe)
    prepared = accelerator.prepare(net, build_optimizer(net, recipe.optim))
    return PlainLoop(recipe, data, *prepared, log, accelerator)


def masked_loop(peer: str, mask: MaskSet, recipe: Recipe, data: InMemoryLoader, log: Path) -> PlainLoop:
    """The bare loop on a network masked with one of `MASKINGS`."""
    net = _net(recipe, data)
    for weight in mask:
        MASKINGS[peer](net.get_submodule(weight.removesuffix(".weight")), mask[weight])
    return PlainLoop(recipe, data, net, build_optimizer(net, recipe.optim), log)


def _net(recipe: Recipe, data: InMemoryLoader) -> nn.Module:
    num_classes = int(data.split.labels.max()) + 1
    return zoo.create(*zoo.describe(recipe.model.name, recipe.model.args, num_classes)).to(data.device)
