"""The run folder: what lies where, who may write there, and whether a run may go on in it."""

import datetime
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from vit_rsst import files
from vit_rsst.errors import InputError, MissingRequirement
from vit_rsst.recipe import strict_yaml
from vit_rsst.recipe.schema import Recipe, deciding

HOLDER = ".lock.json"
"""Which process holds, or last held, the lock."""


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
        return files.read_json(self.path / "status.json")

    def write_status(self, state: str, exit_code: int | None = None, reason: str = "", **where: int) -> None:
        """running, finished, stopped or failed, with where it stands."""
        self.path.mkdir(parents=True, exist_ok=True)
        found = {key: value for key, value in self.status().items() if key in ("round", "epoch", "step")}
        status = {"state": state, **(found | where), "exit_code": exit_code, "reason": reason, "updated": _now()}
        files.write_json(self.path / "status.json", status)

    def set_aside(self) -> Path | None:
        """Renames an existing folder to `<name>.old-N` and says which; None when there is none.

        Raises:
            MissingRequirement: another process runs there.
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
        old = deciding(strict_yaml.parse(saved.read_text(encoding="utf-8", errors="replace")).tree)
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

    def check_place(self) -> None:
        """Looks, before anything is started, whether the folder can be made; creates nothing.

        Raises:
            InputError: it is a link to elsewhere.
            MissingRequirement: it cannot be written.
        """
        try:
            if self.path.resolve() != self.path.parent.resolve() / self.path.name:
                raise InputError(
                    f"name: {self.path} is a link to {self.path.resolve()}; a run stays within its output_dir: set "
                    "output_dir to the folder that is meant, or give this run another name (name=…)."
                )
            nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        except UnicodeEncodeError as error:
            raise MissingRequirement(
                f"output_dir: {str(self.path)!a} has characters that the locale of this process does not know "
                f"({error.encoding}); set PYTHONUTF8=1, or LC_ALL=C.UTF-8."
            ) from error
        except (OSError, RuntimeError) as error:  # a loop of links
            raise MissingRequirement(f"output_dir: {self.path} cannot be made ({error}); set another one.") from error
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            why = "cannot be written" if nearest.is_dir() else "is no folder"
            raise MissingRequirement(f"output_dir: {self.path} cannot be made, since {nearest} {why}; set another one.")

    def _lock(self) -> FileLock:
        """Takes the lock of this folder; its holder stands in a file beside it, for those who come later."""
        lock, holder = FileLock(self.path / ".lock"), files.read_json(self.path / HOLDER)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            who = "process {pid} on {host}, since {since}".format_map({"pid": "?", "host": "?", "since": "?"} | holder)
            raise MissingRequirement(
                f"{self.path}: another process is running there ({who}); wait for it, or give this run another name "
                "(name=…)."
            ) from error
        return lock

    def open(self) -> FileLock:
        """Creates the folder and takes its lock; what an earlier run left there stays as it is.

        Raises:
            MissingRequirement: another process runs here, or the folder cannot be written.
        """
        try:
            for folder in (self.path, self.checkpoints, self.tickets, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            lock = self._lock()
            for left_over in self.path.rglob(".*.tmp"):  # of a process that was killed
                left_over.unlink()
            files.write_json(self.path / HOLDER, {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()})
        except OSError as error:
            raise MissingRequirement(
                f"output_dir: {self.path} cannot be written ({error}); set another output_dir."
            ) from error
        return lock

    def record(self, recipe: Recipe, environment: dict) -> None:
        """Recipe and environment of the run that begins here now, or goes on."""
        files.write_text(self.path / "recipe.yaml", strict_yaml.dump(recipe.tree()))
        files.write_json(self.path / "environment.json", environment)
        self.write_status("running")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
