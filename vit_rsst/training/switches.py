"""Device settings that trade speed against exactness: TF32, deterministic algorithms, compilation, memory format."""

import os
import sys

import torch
from torch import nn
from torch.nn.attention import SDPBackend

RECOMPILATIONS = 64
"""Variants of one compiled function before torch falls back to eager; all blocks share one function."""


def set_precision_(precision: str, deterministic: bool) -> None:
    """Sets process-wide precision and determinism; call before anything runs on a GPU.

    fp32 matrix products use TF32 only if the recipe asks for mixed precision, never for `no`: cuDNN's own default would
    round convolutions.

    Args:
        deterministic: use bit-reproducible algorithms; an operation without one raises.
    """
    has_tf32 = precision != "no"
    torch.set_float32_matmul_precision("high" if has_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = has_tf32
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid: one extra kernel per allocation
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts


def compile_(net: nn.Module, mode: bool | str) -> None:
    """Compiles in place, block by block: identical blocks share one compilation, and parameter names do not change.

    Args:
        mode: of `torch.compile`; True: its default mode; False: do not compile.
    """
    if not mode:
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
    for block in blocks_of(net) or [net]:
        block.compile(dynamic=False, mode=None if mode is True else mode)


def begin_pass() -> None:
    """Lets CUDA graphs overwrite the outputs of the last forward pass.

    torch's own function imports its compiler, which takes a second, also where nothing has been compiled.
    """
    if "torch._inductor.cudagraph_trees" in sys.modules:
        torch.compiler.cudagraph_mark_step_begin()


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The longest list of same-class modules with more than half of the parameters; empty if there is none."""
    total = sum(parameter.numel() for parameter in net.parameters())
    rows = [list(m) for m in net.modules() if isinstance(m, nn.Sequential | nn.ModuleList) and len(m) > 1]
    alike = [row for row in rows if len({type(module) for module in row}) == 1]
    large = [row for row in alike if 2 * sum(p.numel() for module in row for p in module.parameters()) > total]
    return max(large, key=len, default=[])


def memory_format(net: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels-last for convolutional networks on a GPU, the native layout of tensor cores; else contiguous."""
    parameters = list(net.parameters())
    convolved = sum(p.numel() for p in parameters if p.ndim == 4)
    is_convolutional = 2 * convolved > sum(p.numel() for p in parameters)
    return torch.channels_last if is_convolutional and device.type == "cuda" else torch.contiguous_format


def attention_backend(device: torch.device, precision: str) -> str:
    """The backend of `scaled_dot_product_attention` for a head size of 64, such as `flash_attention`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    query = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype)
    chosen = SDPBackend(torch._fused_sdp_choice(query, query, query))
    return chosen.name.lower()
