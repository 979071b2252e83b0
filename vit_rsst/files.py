"""Files that exist whole or not at all: atomic writes, fsync, readable modes, hashes."""

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vit_rsst.errors import InputError, MissingRequirement

_UMASK = os.umask(0)
os.umask(_UMASK)


def check_writable(path: Path) -> None:
    """Checks that `write_text` could write there; changes nothing.

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
    """The descriptor of this process that a path refers to, such as /dev/stdout; None for ordinary files."""
    for _ in range(40):  # links
        if str(path.parent.resolve()) == f"/proc/{os.getpid()}/fd" and path.name.isdigit():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically, following links; writes directly to devices, pipes and open files."""
    number = _descriptor(path)
    if number is not None or (path.exists() and not path.is_file()):
        with open(path if number is None else os.dup(number), "w", encoding="utf-8") as file:
            file.write(text)
        return
    path = path.resolve()
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")  # names have at most 255 bytes
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
    """A JSON object; empty if the file is missing or unreadable."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def write_json(path: Path, value: Mapping) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Replaces a CSV file atomically; None becomes an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to on the same file system, which takes the place of `folder` once everything is written.

    An exception or SIGTERM removes it; `folder` is new or empty, and its parents are made at the end.
    """
    parent = folder.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    temporary = parent / f".{folder.name}.{os.getpid()}.tmp"
    with _unwound_by_sigterm():
        try:
            temporary.mkdir()
            yield temporary
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """SIGTERM, where it would end the process at once, ends it by an exception, with the exit code of the signal."""
    try:
        is_ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number)) if is_ours else None
    except ValueError:  # not in the main thread
        before = None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def settle(path: Path) -> None:
    """Flushes a file to disk and gives it the mode of the umask; safetensors 0.8 leaves 0600 (safetensors#782)."""
    os.chmod(path, 0o666 & ~_UMASK)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def settle_folder(path: Path) -> None:
    """Flushes a folder's entries to disk, so a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def output_file(name: str | None, suffix: str = "") -> Path | None:
    """Where to write a result; None if no file was given.

    Raises:
        InputError: the file cannot be written, or has the wrong suffix.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    try:
        check_writable(path)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{name}: cannot be written ({why}); choose a file in an existing folder.") from error
    if suffix and path.suffix.lower() != suffix:
        raise InputError(f"{name}: the output is {suffix[1:].upper()}; choose a file name ending in {suffix}.")
    return path


def write_result(path: Path | None, write: Callable[[Path, object], None], result: object) -> None:
    """Writes a result if a file was given; before printing, since a reader such as `head` may end the program.

    Raises:
        MissingRequirement: the disk is full or gone.
    """
    if path is None:
        return
    try:
        write(path, result)
    except OSError as error:
        raise MissingRequirement(f"{path}: could not be written ({error.strerror or error}).") from error
