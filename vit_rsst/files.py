"""Files that are there whole or not at all: atomic writes, fsync, readable modes, hashes."""

import csv
import errno
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from vit_rsst.errors import InputError, MissingRequirement

_UMASK = os.umask(0)
os.umask(_UMASK)


def check_writable(path: Path) -> None:
    """Looks whether `write_text` could write there; changes nothing.

    Raises:
        OSError: it could not.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if path.is_file() or not path.exists():
        tempfile.TemporaryFile(dir=path.resolve().parent).close()


def _descriptor(path: Path) -> int | None:
    """Number of the open file of this process that a path means, such as /dev/stdout."""
    for _ in range(40):  # links
        if str(path.parent.resolve()) == f"/proc/{os.getpid()}/fd" and path.name.isdigit():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically, behind a link that which the link means; writes to devices, pipes and open files."""
    number = _descriptor(path)
    if number is not None or (path.exists() and not path.is_file()):
        with open(path if number is None else os.dup(number), "w", encoding="utf-8") as file:
            file.write(text)
        return
    path = path.resolve()
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")  # a name has 255 bytes at most
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict:
    """A JSON object; empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def write_json(path: Path, value: Mapping) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Replaces a CSV file atomically; None is an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())


def settle(path: Path) -> None:
    """Flushes a file to disk with the mode the umask asks for; safetensors 0.8 leaves 0600 (safetensors#782)."""
    os.chmod(path, 0o666 & ~_UMASK)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def settle_folder(path: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def output_file(name: str | None, suffix: str = "") -> Path | None:
    """Where a result is to go; None where none was asked for.

    Raises:
        InputError: nothing can be written there, or the name has another suffix.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    try:
        check_writable(path)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{name}: it cannot be written ({why}); name a file in a folder that exists.") from error
    if suffix and path.suffix.lower() != suffix:
        raise InputError(f"{name}: it would hold {suffix[1:].upper()}; name a file that ends in {suffix}.")
    return path


def leave(path: Path | None, write: Callable[[Path, object], None], result: object) -> None:
    """Writes a result where one was asked for; before it is printed, since a reader such as `head` ends the program.

    Raises:
        MissingRequirement: the disk is full, or lost.
    """
    if path is None:
        return
    try:
        write(path, result)
    except OSError as error:
        raise MissingRequirement(f"{path}: it could not be written ({error.strerror or error}).") from error
