"""Sharded weights: FSDP2 as Accelerate drives it, on GPUs and, to try it out, on CPUs."""

import os
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model, parse_flag_from_env
from torch import nn

from vit_rsst import shards
from vit_rsst.assembly.parts import Parts
from vit_rsst.errors import InputError
from vit_rsst.pruning.criteria import CRITERIA
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.patterns import pattern
from vit_rsst.recipe.schema import Recipe
from vit_rsst.training import switches

EXAMPLE = "accelerate_configs/gpu_8x_fsdp2.yaml"
WAYS_OUT = {
    "fsdp_offload_params": "leave it out, or use more processes",
    "fsdp_activation_checkpointing": "set train.grad_checkpointing=true in the recipe instead",
    "fsdp_ignored_modules": "leave it out; pruning.protect keeps weights from being pruned",
    "fsdp_transformer_layer_cls_to_wrap": "leave it out; the model's blocks are found by themselves",
}
"""Options of an Accelerate configuration that a run does not support → what to do."""


def is_asked() -> bool:
    """Whether the launcher asks for FSDP2.

    Raises:
        InputError: it asks for FSDP1, or sets an option that is not supported.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise InputError(
            f"the launcher requests FSDP with fsdp_version: {version}, which flattens weights, so masks cannot follow; "
            f"set fsdp_version: 2, as in {EXAMPLE}."
        )
    for option, way_out in WAYS_OUT.items():
        variable = option.upper().replace("_LAYER", "")
        if os.environ.get(variable, "false").lower() not in ("false", "none", ""):
            raise InputError(f"the launcher sets {option}, which is not supported with pruning; {way_out}.")
    return True


def make_plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin:
    """How Accelerate shards; gradients are summed in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy()
    if mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=policy,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=[],  # until the model is known
        cpu_ram_efficient_loading=False,  # every rank builds the same weights, from the seed or a file
    )


def shard_with_(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Turns FSDP2 on. Accelerate does so by itself on accelerators, and ignores it on CPUs, where all of it works."""
    for state in (PartialState(), accelerator.state):  # each new AcceleratorState copies the first
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def is_on(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def check(recipe: Recipe, net: nn.Module) -> None:
    """Refuses what does not work on sharded weights.

    Raises:
        InputError: names the field and the way out.
    """
    method, way_out = recipe.pruning.method, "or use DDP, such as accelerate_configs/gpu_8x_bf16.yaml"
    if recipe.optim.name == "sgd":
        raise InputError(f"optim.name: torch has no fused sgd for sharded weights; use adamw or adam, {way_out}.")
    if isinstance(recipe.train.compile, str):
        raise InputError(
            f"train.compile: {recipe.train.compile} records CUDA graphs, whose weights must not move, and sharded ones "
            f"are gathered anew in each pass; use default, {way_out}."
        )
    if recipe.pruning.compensate:
        raise InputError(
            f"pruning.compensate: {recipe.pruning.compensate} fits whole weights, not sharded ones; omit it, {way_out}."
        )
    if CRITERIA[recipe.pruning.criterion].needs == "moments" and method.prunes:
        raise InputError(
            f"pruning.criterion: {recipe.pruning.criterion} scores whole weights, not sharded ones; use activation_l2, "
            f"{way_out}."
        )
    if hasattr(net, "auxiliary_loss"):
        raise InputError(
            f"model.name: {recipe.model.name} computes a loss of its own outside of its forward pass, when sharded "
            f"weights are not at hand; use another model, {way_out}."
        )
    if hasattr(method, "growth") and pattern(recipe.pruning.granularity):
        raise InputError(
            f"pruning.granularity: {recipe.pruning.method_name} does not move sharded weights within windows; use "
            f"element, {way_out}."
        )


@dataclass(frozen=True)
class Units:
    """What FSDP2 gathers at a time: each of the model's blocks alone, and the rest together; sizes in parameters."""

    names: tuple[str, ...]
    blocks: tuple[int, ...]
    rest: int

    @classmethod
    def of(cls, net: nn.Module) -> "Units":
        names = tuple(sorted({type(block).__name__ for block in switches.blocks_of(net)}))
        alike = [module for module in net.modules() if type(module).__name__ in names]
        blocks = tuple(sum(p.numel() for p in block.parameters()) for block in alike)
        return cls(names, blocks, sum(p.numel() for p in net.parameters()) - sum(blocks))

    def text(self, num_processes: int) -> str:
        share = self.rest / (self.rest + sum(self.blocks))
        alone = f"{len(self.blocks)} × {' and '.join(self.names)} one at a time" if self.names else "no blocks found"
        return (
            f"weights sharded over {num_processes} processes (FSDP2): {alone}, the other {self.rest:,} parameters "
            f"({share:.1%}) together"
        )

    def num_bytes(self, width: int, learns: bool = True) -> int:
        """Gathered at once: the rest, a block and the next one, and the gradients of the rest and of a block, which are
        reduced in fp32.

        Args:
            width: bytes of a number in a forward pass.
            learns: False: there is no backward pass, and no gradient.
        """
        largest = max(self.blocks, default=0)
        return width * (2 * self.rest + 3 * largest) + (4 * max(largest, self.rest) if learns else 0)


def name_blocks_(accelerator: Accelerator, units: Units) -> None:
    """Tells FSDP2 the model's blocks."""
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list(units.names)


def shard_(accelerator: Accelerator, net: nn.Module) -> nn.Module:
    """Shards a network without an optimizer, such as a teacher, as Accelerate shards the model of a run.

    Its parts move to the device one at a time, as they are divided.
    """
    name_blocks_(accelerator, Units.of(net))
    return fsdp2_prepare_model(accelerator, net)


def sharded(parts: Parts) -> Parts:
    """The parts once FSDP2 has replaced the model's parameters by shards."""
    weights = {name: parts.net.get_parameter(name) for name in parts.weights}
    assert all(map(shards.is_divided_by_rows, weights.values())), "weights are divided in another way"
    mask = MaskSet({name: shards.placed(mask, weights[name]) for name, mask in parts.mask.masks.items()})
    return replace(parts, weights=weights, mask=mask)
