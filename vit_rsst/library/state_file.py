"""The state of a `Pruner` as one safetensors file: tensors as such, the rest as JSON in its header."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vit_rsst import files
from vit_rsst.errors import Damaged

FILE = "pruner.safetensors"
"""Name of the file in a checkpoint folder."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes what `Pruner.state_dict` returned."""
    numbers = {key: value for key, value in state.items() if key != "tensors"}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state["tensors"].items()}
    save_file(tensors, path, metadata={"pruner": json.dumps(numbers)})
    files.settle(path)


def read(path: Path) -> dict[str, Any]:
    """Inverse of `write`.

    Raises:
        Damaged: there is no such file, or it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            return json.loads(file.metadata()["pruner"]) | {"tensors": tensors}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise Damaged(
            f"{path}: not a readable state of a Pruner ({error}); resume from a checkpoint written with pruning."
        ) from error
