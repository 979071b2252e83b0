"""Files that a command leaves its result in: looked at before any work, written before the result is shown."""

from collections.abc import Callable
from pathlib import Path

from vit_rsst import files
from vit_rsst.errors import EnvironmentLacks, InputError


def output_file(name: str | None, suffix: str = "") -> Path | None:
    """Where a result is to go; None where none was asked for.

    Raises:
        InputError: nothing can be written there, or the name has another suffix.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    try:
        files.check_writable(path)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{name}: it cannot be written ({why}); name a file in a folder that exists.") from error
    if suffix and path.suffix.lower() != suffix:
        raise InputError(f"{name}: it would hold {suffix[1:].upper()}; name a file that ends in {suffix}.")
    return path


def leave(path: Path | None, write: Callable[[Path, object], None], result: object) -> None:
    """Writes a result where one was asked for; before it is printed, since a reader such as `head` ends the program.

    Raises:
        EnvironmentLacks: the disk is full, or lost.
    """
    if path is None:
        return
    try:
        write(path, result)
    except OSError as error:
        raise EnvironmentLacks(f"{path}: it could not be written ({error.strerror or error}).") from error
