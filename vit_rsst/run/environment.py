"""Where a run was made: versions, commit, machine and data, and what has changed since."""

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "transformers",
    "datasets",
    "evaluate",
    "safetensors",
    "numpy",
)


DATA_IDENTITY = ("rows", "files", "sha256")
"""Fields of the dataset's description that identify it; the others say where it lies and how it was read."""


def environment(num_processes: int, device: str, data_identity: dict) -> dict:
    """What a reader of the results needs to know about where they were produced."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in ("vit-rsst", *PACKAGES)}},
        "commit": _commit(),
        "command": sys.argv,
        "processes": num_processes,
        "device": device,
        "host": socket.gethostname(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "data": data_identity,
    }


def drift(then: Mapping, now: Mapping) -> dict[str, tuple[object, object]]:
    """Differences between two environments that may change a result: dotted name → (then, now)."""
    flat = [
        {
            **{f"versions.{name}": version for name, version in part.get("versions", {}).items()},
            **{f"data.{name}": value for name, value in part.get("data", {}).items()},
            **{name: part.get(name) for name in ("commit", "device", "processes", "threads", "teacher")},
        }
        for part in (then, now)
    ]
    keys = sorted(flat[0].keys() | flat[1].keys())
    return {key: (flat[0].get(key), flat[1].get(key)) for key in keys if flat[0].get(key) != flat[1].get(key)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout the package runs from, with `+` if files have changed since.

    None if the package is installed inside the tree of another repository.
    """
    package = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        top = Path(git("rev-parse", "--show-toplevel"))
        if top != package.parent or "name = vit-rsst\n" not in (top / "setup.cfg").read_text(encoding="utf-8"):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
