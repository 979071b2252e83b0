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


DATA_IDENTITY = ("rows", "content", "validation")
"""Fields of the dataset's description that identify it: training rows before they are divided, a digest of each split,
and whether the validation images are a split of their own; the others say where the dataset lies."""


def environment(num_processes: int, device: str, data_identity: dict, layout: str = "", exact: bool = False) -> dict:
    """What a reader of the results needs to know about where they were produced.

    Args:
        layout: how the global batch is divided.
        exact: whether deterministic kernels were asked for; on a CPU all are.
    """
    kind = device.partition(":")[0]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in ("vit-rsst", *PACKAGES)}},
        "commit": _commit(),
        "command": sys.argv,
        "processes": num_processes,
        "nodes": num_processes // max(int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)), 1) or 1,
        "layout": layout,
        "device": device,
        "gpu": gpu() if kind == "cuda" else None,
        "deterministic": exact or kind == "cpu",
        "host": socket.gethostname(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "data": data_identity,
    }


def drift(then: Mapping, now: Mapping) -> dict[str, tuple[object, object]]:
    """Differences between two environments that may change a result: dotted name → (then, now)."""
    described = ("source", "revision", *DATA_IDENTITY)
    # Version 0.1 recorded no content, and held validation images out of train whatever splits there were.
    if "content" not in then.get("data", {}):
        described = tuple(name for name in described if name != "content")
    flat = [
        {
            **{f"versions.{name}": version for name, version in part.get("versions", {}).items()},
            **{
                f"data.{name}": value
                for name, value in ({"validation": "train"} | part.get("data", {})).items()
                if name in described
            },
            **{f"gpu.{name}": value for name, value in (part.get("gpu") or {}).items()},
            **{name: part.get(name) for name in ("commit", "device", "processes", "threads", "teacher", "sharding")},
            **{name: part[name] for name in ("layout", "nodes", "deterministic") if name in then and name in now},
        }
        for part in (then, now)
    ]
    keys = sorted(flat[0].keys() | flat[1].keys())
    return {key: (flat[0].get(key), flat[1].get(key)) for key in keys if flat[0].get(key) != flat[1].get(key)}


EXACT = (
    "versions.",
    "gpu.",
    "device",
    "processes",
    "layout",
    "nodes",
    "threads",
    "deterministic",
    "teacher",
    "sharding",
)
"""Beginnings of what must not have changed for a run to resume to the last bit."""


def inexact_because(now: Mapping, drift: Mapping[str, tuple[object, object]]) -> str:
    """Why a run that resumes here may differ from an undisturbed one in the last bits; empty if it cannot.

    Args:
        now: the environment.
        drift: what has changed since the run started, see `drift`.
    """
    changed = [f"{key} {then} → {new}" for key, (then, new) in drift.items() if key.startswith(EXACT)]
    if not now.get("deterministic", True):
        kind = str(now.get("device")).partition(":")[0]
        changed.append(f"kernels on {kind} add in no fixed order (train.deterministic: true)")
    return "; ".join(changed)


def gpu() -> dict | None:
    """Model and memory of this process's GPU, driver, CUDA, cuDNN and NCCL; None where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    return {
        "model": found.name,
        "memory": found.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl)) or None,
    }


def _driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


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
