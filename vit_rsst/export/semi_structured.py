"""2:4 sparsity on GPUs that have it: which layers of a ticket are 2:4, and their compressed form in torch.

Sparse tensor cores (NVIDIA Ampere and newer) multiply weights of which two of every four inputs are zero at up to twice
the speed (Mishra et al. 2021). Everywhere else the zeros save disk space alone.
"""

import torch
from torch import Tensor, nn

from vit_rsst.errors import InputError, MissingRequirement
from vit_rsst.export.work import Work

CAPABILITY = (8, 0)
"""Of the first GPUs with sparse tensor cores."""
MULTIPLES = (32, 64)
"""Rows and columns that the kernels need in float16 are multiples of these."""
BATCH = 16
"""The number of rows that they multiply is a multiple of this."""
PACKED = "packed"
"""Name of a compressed weight in its layer."""


def layers(work: Work) -> list[str]:
    """Linear layers of the slim model that are 2:4, by name."""
    pruned = {name.removesuffix(".weight") for name in work.trained.mask if not work.trained.mask[name].all()}
    modules = work.slim.net.named_modules()
    return [name for name, m in modules if name in pruned and isinstance(m, nn.Linear) and is_two_of_four(m.weight)]


def is_two_of_four(weight: Tensor) -> bool:
    """Whether no four consecutive inputs of (out, in) have more than two weights that are not zero."""
    return weight.shape[1] % 4 == 0 and bool(((weight.detach() != 0).reshape(-1, 4).sum(1) <= 2).all())


def note(work: Work) -> str:
    """What a 2:4 ticket is good for; empty for others."""
    found = layers(work)
    if not found:
        return ""
    return (
        f"{len(found)} layers are 2:4 sparse. GPUs with sparse tensor cores (NVIDIA Ampere and newer) can multiply "
        "them up to twice as fast: let TensorRT build the ONNX file with sparsity enabled. `--to torch "
        "--semi-structured` uses torch's own kernels, which were slower than dense ones on an H100 and an H200, and "
        "measures them. On other machines the zeros save disk space, not time."
    )


def check(work: Work) -> None:
    """Raises:
    InputError: no layer is 2:4, or none has a shape that the kernels take.
    MissingRequirement: torch sees no GPU with sparse tensor cores.
    """
    found = layers(work)
    if not found:
        raise InputError(
            "--semi-structured: no layer of this ticket keeps two of every four inputs; prune with "
            "pruning.granularity=2:4, or leave it out."
        )
    if not any(fits(work.slim.net.get_submodule(name)) for name in found):
        rows, columns = MULTIPLES
        raise InputError(
            f"--semi-structured: no 2:4 layer has multiples of {rows} outputs and {columns} inputs, which the GPU's "
            "kernels need; leave it out."
        )
    sees = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if sees == "none" or torch.cuda.get_device_capability() < CAPABILITY:
        raise MissingRequirement(
            f"--semi-structured: needs a GPU with sparse tensor cores (NVIDIA Ampere or newer), and torch sees {sees}; "
            "export on such a machine, or leave it out: the zeros then cost as much time as other weights."
        )


def fits(layer: nn.Linear) -> bool:
    """Whether the kernels take its shape."""
    return not any(size % multiple for size, multiple in zip(layer.weight.shape, MULTIPLES, strict=True))


class TwoOfFour(nn.Module):
    """A linear layer whose 2:4 weight (out, in) is stored compressed, for GPUs.

    It holds plain tensors, which torch.export can store; torch's own subclass for them it cannot (torch 2.11).

    Attributes:
        packed: (out, in * 9/16): the kept halves of each row and where they lie, in cuSPARSELt's form.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        self.register_buffer(PACKED, torch._cslt_compress(weight).view(len(weight), -1))
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        more = BATCH - rows.shape[0] % BATCH  # at least one, so that torch.export needs no case of none
        padded = nn.functional.pad(rows, (0, 0, 0, more))
        product = torch._cslt_sparse_mm(self.packed, padded.t(), bias=self.bias).t()[: rows.shape[0]]
        return product.reshape(*inputs.shape[:-1], product.shape[1])


def compress_(net: nn.Module, names: list[str]) -> None:
    """Replaces those layers that fit by their compressed form; the network is on the GPU in float16."""
    for name in names:
        layer = net.get_submodule(name)
        if isinstance(layer, nn.Linear) and fits(layer):
            net.set_submodule(name, TwoOfFour(layer))
