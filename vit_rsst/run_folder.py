"""The run folder: what lies where, who may write there, and whether a run may go on in it."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from vit_rsst import files, strict_yaml
from vit_rsst.errors import EnvironmentLacks, InputError
from vit_rsst.recipe import Recipe, deciding

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


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; nothing is created before `open`."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tickets(self) -> Path:
        return self.path / "tickets"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def status(self) -> dict:
        """The last state written; empty for a folder without one."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        return {}

    def write_status(self, state: str, exit_code: int | None = None, reason: str = "", **where: int) -> None:
        """running, finished, stopped or failed, with where it stands."""
        self.path.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        found = {key: value for key, value in self.status().items() if key in ("round", "epoch", "step")}
        status = {"state": state, **(found | where), "exit_code": exit_code, "reason": reason, "updated": now}
        files.write_json(self.path / "status.json", status)

    def set_aside(self) -> Path | None:
        """Renames an existing folder to `<name>.old-N` and says which; None when there is none.

        Raises:
            EnvironmentLacks: another process runs there.
        """
        if not self.path.exists():
            return None
        self._lock().release()
        number = 1
        while (old := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        os.replace(self.path, old)
        return old

    def check(self, recipe: Recipe) -> None:
        """Refuses a folder that holds a run of another recipe.

        Raises:
            InputError: with every field that differs.
        """
        saved = self.path / "recipe.yaml"
        if not saved.exists():
            return
        old = deciding(strict_yaml.parse(saved.read_text(encoding="utf-8")).tree)
        new = deciding(recipe.tree())
        differences = [
            f"  {key}: {old.get(key, 'not there')!r} there, {new.get(key, 'not there')!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if differences:
            raise InputError(
                "\n".join(
                    [
                        f"{self.path} holds a run of another recipe; {len(differences)} fields differ:",
                        *differences,
                        "Give this run another name (name=…), or begin anew with --restart; the old folder is kept.",
                    ]
                )
            )

    def _lock(self) -> FileLock:
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise EnvironmentLacks(
                f"{self.path}: another process is running there; wait for it, or give this run another name (name=…)."
            ) from error
        return lock

    def open(self, recipe: Recipe, environment: dict) -> FileLock:
        """Creates the folder, takes its lock and records recipe and environment.

        Raises:
            EnvironmentLacks: another process runs here, or the folder cannot be written.
        """
        try:
            for folder in (self.path, self.checkpoints, self.tickets, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            lock = self._lock()
            files.write_text(self.path / "recipe.yaml", strict_yaml.dump(recipe.tree()))
            files.write_json(self.path / "environment.json", environment)
        except OSError as error:
            raise EnvironmentLacks(
                f"output_dir: {self.path} cannot be written ({error}); set another output_dir."
            ) from error
        return lock


def environment(num_processes: int, device: str, data_identity: dict) -> dict:
    """What a reader of the results needs to know of where they were made."""
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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, with `+` when files have changed since."""

    def git(*args: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
