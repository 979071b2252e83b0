"""Files that are there whole or not at all: atomic writes, fsync, readable modes, hashes."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

_UMASK = os.umask(0)
os.umask(_UMASK)


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


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
