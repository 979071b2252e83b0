"""Exact counts of a subject, without running it: parameters, FLOPs, zeros, units, bytes."""

import re
from pathlib import Path

from torch import nn

from vit_rsst.analysis.subject import Subject
from vit_rsst.models import footprint
from vit_rsst.models.complexity import effective_flops, flops
from vit_rsst.models.published import Published


def count(subject: Subject, takes_images: bool = True) -> dict:
    """All counts, as plain data.

    Args:
        takes_images: False: leave out what takes a pass over images.

    Returns:
        `parameters`, `flops` (per image; two per MAC), `bytes`, `training`; by kind of layer and by layer the weights
        alive and their share of all weights alive; `units` left per group.
    """
    net, mask, size = subject.net, subject.mask, subject.image_size
    alive, found = mask.num_alive, mask.layers()
    in_order = [name for name, _ in net.named_parameters() if name in found]  # those of a ticket are sorted by name
    layers = {name: found[name] | {"share": found[name]["alive"] / max(alive, 1)} for name in in_order}
    return {
        "what": subject.label,
        "kind": subject.kind,
        "architecture": subject.header["architecture"],
        "image_size": size if takes_images else None,
        "parameters": {
            "total": num_parameters(net),
            "prunable": mask.num_elements,
            "alive": alive,
            "density": mask.density,
            "slim": num_parameters(subject.slim.net),
        },
        **(passes(subject) if takes_images else {}),
        "bytes": {
            "file": _file_bytes(subject),
            "dense_fp32": state_bytes(net),
            "slim_fp32": state_bytes(subject.slim.net),
        },
        "kinds": _by_kind(layers),
        "layers": layers,
        "units": [
            {"name": g.name, "kind": g.kind, "block": g.depth, "units": g.units, "left": len(subject.slim.kept[g.name])}
            for g in subject.groups
        ],
    }


def count_file(path: Path, found: Published) -> dict:
    """What an ONNX or `.pt2` file says of itself, in the form of `count`: its weights, and its bytes."""
    total, nonzero = found.net.num_parameters or (None, None)
    files = path.parent.glob(f"{path.name}*")  # large weights lie beside the file
    return {
        "what": f"{path.parent.name}/{path.name}",
        "kind": "file",
        "architecture": path.suffix.removeprefix("."),
        "image_size": found.image_size,
        "parameters": {"total": total, "nonzero": nonzero},
        "bytes": {"file": sum(file.stat().st_size for file in files)},
        "kinds": {},
        "layers": {},
        "units": [],
    }


def passes(subject: Subject) -> dict:
    """What a pass over images tells: `flops` and `training`."""
    net, size = subject.net, subject.image_size
    return {
        "flops": {
            "dense": flops(net, size),
            "effective": round(effective_flops(net, subject.mask, subject.groups, size)),
            "slim": flops(subject.slim.net, size),
        },
        "training": {"batch": subject.batch, "computed_bytes": training_bytes(subject)},
    }


def num_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def state_bytes(net: nn.Module) -> int:
    """Bytes of the tensors of the state dict, without the header of a file (a few KiB)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())


def training_bytes(subject: Subject) -> int:
    """Weights, gradients, optimizer moments and activations in fp32, for the batch of one device."""
    state = 4 * num_parameters(subject.net) * (1 + subject.moments)
    return state + footprint.training_bytes(subject.net, subject.image_size, subject.batch)


def kind_of(weight: str) -> str:
    """`attn.qkv` of `blocks.3.attn.qkv.weight`: the layer, without its block."""
    return re.sub(r"^.*\.\d+\.", "", weight.removesuffix(".weight"))


def block_of(weight: str) -> str:
    """`blocks.3` of `blocks.3.attn.qkv.weight`."""
    return weight.removesuffix(".weight").removesuffix(kind_of(weight)).rstrip(".")


def _by_kind(layers: dict[str, dict]) -> dict[str, dict]:
    kinds: dict[str, dict] = {}
    for name, row in layers.items():
        total = kinds.setdefault(kind_of(name), {"elements": 0, "alive": 0, "density": 0.0, "share": 0.0})
        for key in ("elements", "alive", "share"):
            total[key] += row[key]
        total["density"] = total["alive"] / total["elements"]
    return kinds


def _file_bytes(subject: Subject) -> int | None:
    if subject.file is None:
        return None
    files = [subject.file] if subject.file.is_file() else list(subject.file.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)
