"""Opens files that another runtime runs: ONNX and programs of torch.export."""

from pathlib import Path

from vit_rsst.export import onnx_file, program_file
from vit_rsst.models.published import Published

READERS = {onnx_file.FILE: onnx_file.opened, program_file.FILE: program_file.opened}
"""File in an export folder → its reader, which takes any file of that suffix."""


def path_of(what: Path) -> Path | None:
    """The file at a path or in an export folder; None if there is none."""
    for name in READERS:
        path = what / name if what.is_dir() else what
        if path.suffix == Path(name).suffix and path.is_file():
            return path
    return None


def opened(path: Path) -> Published:
    """Opens such a file with its preprocessing.

    Raises:
        MissingRequirement: its runtime is not installed.
        Damaged: the runtime cannot load it, or it does not say how to prepare images.
    """
    return next(read for name, read in READERS.items() if path.suffix == Path(name).suffix)(path)
