"""Tickets: the sparse weights of one round in one safetensors file, with everything needed to rebuild the model.

For each pruned weight NAME: `NAME.values` (the kept values, row-major), `NAME.mask` (packed bits, most significant
first) and `NAME.shape`; every other tensor under its own name. The header names the architecture and its arguments, and
holds a hash of all tensors.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vit_rsst import files, shards
from vit_rsst.errors import Damaged, MissingRequirement
from vit_rsst.pruning.masks import MaskSet, pack_bits, unpack_bits
from vit_rsst.shards import Source
from vit_rsst.tickets.stored import Packed, Stored, stored

FORMAT = "vit_rsst.ticket/1"
PARTS = ("values", "mask", "shape")


@dataclass(frozen=True)
class Ticket:
    """A loaded ticket.

    Attributes:
        state: the dense state dict, zero where masked.
        mask: of the prunable weights.
        metadata: strings of the header; `model_args`, `data` and, for a slim model, `widths` are JSON.
    """

    state: dict[str, Tensor]
    mask: MaskSet
    metadata: dict[str, str]

    @property
    def model_args(self) -> dict:
        return json.loads(self.metadata["model_args"])


def save(path: Path, state: Mapping[str, Tensor], mask: MaskSet, metadata: Mapping[str, str]) -> int:
    """Writes a ticket atomically; returns its size in bytes.

    Raises:
        MissingRequirement: the disk is full.
    """
    tensors = _pack(state, mask)
    header = {"format": FORMAT, **metadata}
    header["sha256"] = digest(tensors, header)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata=header)
        sort_metadata_(temporary)
        files.settle(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise MissingRequirement(f"{path}: cannot write the ticket ({error}); free some disk space.") from error
    finally:
        temporary.unlink(missing_ok=True)
    files.settle_folder(path.parent)
    return path.stat().st_size


def sort_metadata_(path: Path) -> None:
    """Sorts the metadata of a safetensors file, which its library writes in another order each time, so that equal
    tickets are equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")  # of the JSON that follows, padded with spaces
        listed = json.loads(file.read(size))
        listed["__metadata__"] = dict(sorted(listed["__metadata__"].items()))
        text = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "a header in another spelling"
        file.seek(8)
        file.write(text.ljust(size))


def load(path: Path) -> Ticket:
    """Reads a ticket back into dense tensors.

    Raises:
        Damaged: no such file, not a ticket, another format, truncated, or a hash mismatch.
    """
    found, metadata = _opened(path)
    tensors = {name: shards.in_memory(tensor) for name, tensor in found.items()}
    metadata = _checked(path, tensors, metadata)
    state = _state(tensors)
    masks = {n: unpack_bits(packed.bits, packed.shape) for n, packed in state.items() if isinstance(packed, Packed)}
    return Ticket({name: shards.in_memory(source) for name, source in state.items()}, MaskSet(masks), metadata)


def check(path: Path) -> None:
    """Reads a ticket, a tensor at a time.

    Raises:
        Damaged: see `load`.
    """
    _checked(path, *_opened(path))


def read_into_(model: nn.Module, path: Path) -> None:
    """Copies a ticket that has been checked into a model, a tensor at a time; of sharded weights, each rank reads the
    rows that it holds.

    Raises:
        Damaged: as `load_state_`; or it cannot be read.
    """
    load_state_(model, _state(_opened(path)[0]), str(path))


def _opened(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the header of a ticket."""
    if not path.is_file():
        raise Damaged(f"{path}: no such ticket; check the path, or train its run first.")
    try:
        found, metadata = stored(path)
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path}: not a readable safetensors file ({error}); copy or train the ticket again.") from error
    if metadata.get("format") != FORMAT:
        raise Damaged(
            f"{path}: the format is {metadata.get('format', 'not given')!r}, not {FORMAT!r}; expected a ticket written "
            "by a run of this version (for an export, give the folder)."
        )
    return found, metadata


def _checked(path: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> dict[str, str]:
    """The header without the hash, which the tensors match."""
    header = {key: value for key, value in metadata.items() if key != "sha256"}
    if digest(tensors, header) != metadata.get("sha256"):
        raise Damaged(f"{path}: the content does not match the hash in its header; copy or train the ticket again.")
    return header


def load_into_(model: nn.Module, ticket: Ticket, place: str) -> None:
    """Copies a ticket's tensors into a model; see `load_state_`."""
    load_state_(model, ticket.state, place)


def load_state_(model: nn.Module, state: Mapping[str, Source], place: str) -> None:
    """Copies a state dict into a model, all or nothing.

    Raises:
        Damaged: names or shapes differ; lists the first five differences and leaves the model unchanged.
    """
    check_shapes(shapes(model.state_dict()), shapes(state), place)
    shards.load_state_(model, state)


def shapes(tensors: Mapping[str, Source]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(expected: Mapping[str, tuple], found: Mapping[str, tuple], place: str) -> None:
    """Checks names and shapes of tensors.

    Raises:
        Damaged: some differ; lists the first five.
    """
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if wrong:
        listed = "; ".join(
            f"{n}: {expected.get(n, 'missing')} in the model, {found.get(n, 'missing')} in the file" for n in wrong[:5]
        )
        raise Damaged(f"{place}: does not match this model in {len(wrong)} tensors ({listed}).")


def _pack(state: Mapping[str, Tensor], mask: MaskSet) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        if name in mask.masks:
            alive = mask[name].cpu()
            values = tensor[alive]
            tensors[f"{name}.values"] = values + torch.zeros((), dtype=values.dtype)  # −0 becomes +0
            tensors[f"{name}.mask"] = pack_bits(alive)
            tensors[f"{name}.shape"] = torch.tensor(tensor.shape, dtype=torch.int64)
        else:
            tensors[name] = tensor.contiguous().clone()
    return tensors


def _state(tensors: Mapping[str, Source]) -> dict[str, Source]:
    """The state dict that tensors of a ticket hold, pruned weights first."""
    names = [
        name.removesuffix(".mask") for name in tensors if name.endswith(".mask") and f"{name[:-5]}.values" in tensors
    ]
    state: dict[str, Source] = {}
    for name in names:
        values, bits, shape = (tensors[f"{name}.{part}"] for part in PARTS)
        state[name] = Packed(values, bits, tuple(shards.in_memory(shape).tolist()))
    packed = {f"{name}.{part}" for name in names for part in PARTS}
    return state | {name: tensor for name, tensor in tensors.items() if name not in packed}


def digest(tensors: Mapping[str, Source], header: Mapping[str, str]) -> str:
    """Hexadecimal sha256 of the header and of the names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = shards.in_memory(tensors[name]).contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
