"""Optimizers: parameter groups, construction, and the in-place edits that pruning needs."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vit_rsst import shards

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
TOKENS = ("cls_token", "dist_token", "reg_token", "mask_token", "pos_embed")
UNDECAYED = re.compile(
    r"(^|_)(cls|dist|reg|register|mask|distillation|class)_?(tokens?|embedding)\d*$"
    r"|pos(ition)?_?embed|^rel(ative)?_pos|bias_table$|attention_biases$"
    r"|^(logit_scale|layer_?scale|gamma|lambda|temperature|scale)(_?\d+)?$"
)
"""Names of tokens, position embeddings and biases, scales and temperatures in timm and transformers."""


def param_groups(model: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] | None = None) -> list[dict]:
    """Parameter groups by learning rate; weight decay on matrices only, not on norms, biases, tokens or embeddings.

    Args:
        lr_scales: parameter → fraction of the learning rate, the group's `lr_scale`; None: 1. Groups are sorted by
            decreasing scale, so that the first has the recipe's learning rate.
    """
    named: Callable[[], Iterable[str]] = getattr(model, "no_weight_decay", set)
    undecayed = set(named()) | set(TOKENS)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]  # an embedding's name is its module's
            is_named = name in undecayed or leaf in undecayed or UNDECAYED.search(leaf)
            is_free = parameter.ndim <= 1 or is_named
            key = (lr_scales[name] if lr_scales else 1.0, 0.0 if is_free else weight_decay)
            groups.setdefault(key, []).append(parameter)
    ordered = sorted(groups.items(), reverse=True)
    return [{"params": params, "weight_decay": decay, "lr_scale": scale} for (scale, decay), params in ordered]


def create_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    betas: tuple[float, float],
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """SGD (momentum without Nesterov), Adam or AdamW over `param_groups`, fused on CPU and GPU."""
    options = {"momentum": momentum} if name == "sgd" else {"betas": betas}
    return OPTIMIZERS[name](param_groups(model, weight_decay, lr_scales), lr=lr, fused=True, **options)


def set_lr_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group, multiplied by its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def reset_state_(optimizer: torch.optim.Optimizer) -> None:
    """Clears all optimizer state; the object is kept, since Accelerate has wrapped it."""
    optimizer.state.clear()


def clip_grads_(accelerator: Accelerator, model: nn.Module, limit: float | None) -> Tensor:
    """Clips the gradient norm to `limit`; returns the norm before clipping, on the device."""
    if limit is None:
        return shards.whole(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    return shards.whole(accelerator.clip_grad_norm_(model.parameters(), limit))


def step_unless_(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """A fused optimizer step that changes nothing if `skipped` (float32, on its device) is 1."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, torch.optim.SGD) and not inner.state:
        # The first step allocates the momentum buffers; skipped, it would leave them uninitialized.
        for group in inner.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    inner.found_inf = skipped
    optimizer.step()


def clear_moments_(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], where: Mapping[str, Tensor]
) -> None:
    """Zeroes the moments of the elements selected by `where` (bool, shaped like the weight)."""
    for name, weight in weights.items():
        for moment in _moments(optimizer.state.get(weight, {}), weight):
            shards.local(moment).masked_fill_(shards.local(where[name]), 0.0)


def _moments(state: Mapping[str, object], weight: Tensor) -> Iterable[Tensor]:
    return (value for value in state.values() if isinstance(value, Tensor) and value.shape == weight.shape)


def kind_of(optimizer: torch.optim.Optimizer) -> str | None:
    """The name in `OPTIMIZERS` of the update that it makes; None: another one."""
    if any(group.get("maximize") for group in optimizer.param_groups):
        return None
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return "adamw" if all(group["decoupled_weight_decay"] for group in optimizer.param_groups) else "adam"
    return "sgd" if isinstance(optimizer, torch.optim.SGD) else None


def decay_rates(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Effect of weight decay on each weight in one step: (factor of AdamW's decoupled decay, λ of SGD's L2 term)."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rates = {}
    for name, weight in weights.items():
        group = group_of[id(weight)]
        decoupled, decay = group.get("decoupled_weight_decay", False), group.get("weight_decay", 0.0)  # True in AdamW
        rates[name] = (1 - float(group["lr"]) * decay, 0.0) if decoupled else (1.0, decay)
    return rates


def state_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimizer's state as `parameter/entry` → tensor; `names` maps id(parameter) to its name."""
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_state_tensors_(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, shards.Source], parameters: Mapping[str, Tensor]
) -> None:
    """Inverse of `state_tensors`, given whole tensors: replaces all state. Raises KeyError for an unknown parameter."""
    optimizer.state.clear()
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        if tuple(value.shape) == tuple(parameter.shape):
            # In the weight's memory format: a fused step requires channels-last moments for channels-last weights.
            entry = torch.empty_like(parameter, dtype=value.dtype)
            shards.load_(entry, value)
        else:
            entry = shards.in_memory(value).to(parameter.device)  # fused optimizers keep the step count there too
        optimizer.state[parameter][key] = entry
