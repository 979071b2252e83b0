"""Slim folders: a small model as plain tensors in `model.safetensors`, and how to build it in `config.json`.

The configuration holds the strings of the ticket's header, with `model_args`, `data` and `widths` as objects. A slim
folder is therefore accepted wherever a ticket is: for scoring, further training and export. So is a dense folder, which
has no `widths`.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vit_rsst import files
from vit_rsst.errors import Damaged
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.tickets import ticket_file
from vit_rsst.tickets.ticket_file import Ticket

SLIM, DENSE = "vit_rsst.slim/1", "vit_rsst.dense/2"
"""Formats."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
OBJECTS = ("model_args", "data", "widths")
"""Ticket header entries that hold JSON."""


def write(folder: Path, ticket: Ticket, format: str = SLIM) -> None:
    """Writes a model into an existing folder; the header of a slim one has its `widths`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in ticket.state.items()}
    config = {**as_config(ticket.metadata), "format": format, "prunable": list(ticket.mask)}
    config["sha256"] = ticket_file.digest(tensors, as_header(config))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    files.settle(folder / WEIGHTS)
    files.write_json(folder / CONFIG, config)


def read(folder: Path) -> Ticket:
    """Reads a slim or dense folder as a ticket: zeros in its prunable weights are dead.

    Raises:
        Damaged: neither kind, another format, truncated, or a hash mismatch.
    """
    config = _config(folder)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{folder / WEIGHTS}: not a readable safetensors file ({error}); export it again.") from error
    expected = config.pop("sha256", None)
    header = as_header(config)
    if ticket_file.digest(tensors, header) != expected:
        raise Damaged(f"{folder}: the content does not match the hash in {CONFIG}; copy or export it again.")
    mask = MaskSet({name: tensors[name] != 0 for name in config["prunable"]})
    return Ticket(tensors, mask, {key: value for key, value in header.items() if key not in ("format", "prunable")})


def as_config(header: dict[str, str]) -> dict:
    """A ticket's header as nested JSON, for humans and other tools."""
    return {key: json.loads(header[key]) if key in OBJECTS else header[key] for key in sorted(header)}


def as_header(config: dict) -> dict[str, str]:
    """Inverse of `as_config`: strings only."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}


def _config(folder: Path) -> dict:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: not a readable configuration ({error}); export the ticket again.") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found not in (SLIM, DENSE):
        raise Damaged(
            f"{path}: the format is {'not given' if found is None else repr(found)}, neither {SLIM!r} nor {DENSE!r}; "
            "expected a folder that `vit-rsst export --to slim` or `--to dense` of this version wrote (a recipe takes "
            "weights of timm and transformers in model.pretrained)."
        )
    return config
