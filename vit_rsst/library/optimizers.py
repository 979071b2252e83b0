"""What pruning asks of an optimizer: which one it is, that it holds the weights, that the penalty knows its update."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vit_rsst.errors import InputError
from vit_rsst.pruning.plan import Penalty
from vit_rsst.training.optim import kind_of


def unwrapped(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer without the wrapper of Accelerate or Lightning.

    Raises:
        InputError: not an optimizer of torch, or one that makes several passes in a step.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer) or isinstance(inner, torch.optim.LBFGS):
        raise InputError(
            f"Pruner(optimizer=…): a {type(inner).__name__}; expected an optimizer of torch that makes one pass in a "
            "step."
        )
    return inner


def as_section(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The section `optim` of a recipe, as far as the rules for pruning look at it."""
    kind = kind_of(optimizer)
    decay = max(float(group["weight_decay"]) for group in optimizer.param_groups) if kind else 0.0
    return {"optim": {"name": kind or "sgd", "weight_decay": decay}}


def check_penalty(optimizer: torch.optim.Optimizer, penalty: object) -> None:
    """
    Raises:
        InputError: the penalty does not know this optimizer's weight decay, or counts in epochs.
    """
    if not isinstance(penalty, Penalty):
        return
    if kind_of(optimizer) is None:
        raise InputError(
            f"Pruner(optimizer=…): the penalty is exact with SGD, Adam and AdamW that minimize, not with "
            f"{type(optimizer).__name__}; use one of them, or a method without a penalty, such as imp or gmp."
        )
    if penalty.span == "epoch":
        raise InputError("Pruner(method.penalty.span=…): steps are not counted in epochs here; use round.")


def check_holds(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
    """
    Raises:
        InputError: a prunable weight is not among its parameters.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if missing := [name for name, weight in weights.items() if id(weight) not in held]:
        raise InputError(
            f"Pruner(optimizer=…): does not hold {len(missing)} of {len(weights)} prunable weights, such as "
            f"{missing[0]}; build it from the parameters of this model, or protect them."
        )
