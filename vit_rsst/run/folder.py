"""The run folder: its layout, who may write to it, and whether a run may resume in it."""

import datetime
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from vit_rsst import files
from vit_rsst.errors import InputError, MissingRequirement, Stopped
from vit_rsst.pruning.methods import METHODS
from vit_rsst.pruning.plan import Method
from vit_rsst.recipe import strict_yaml
from vit_rsst.recipe.schema import ROUNDS, Recipe, deciding, fingerprint_of_0_1

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
        """The last status written; empty if there is none."""
        return files.read_json(self.path / "status.json")

    def write_status(self, state: str, exit_code: int | None = None, reason: str = "", **where: int) -> None:
        """Writes `running`, `finished`, `stopped` or `failed`, with the position of the run."""
        self.path.mkdir(parents=True, exist_ok=True)
        found = {key: value for key, value in self.status().items() if key in ("round", "epoch", "step")}
        status = {"state": state, **(found | where), "exit_code": exit_code, "reason": reason, "updated": _now()}
        files.write_json(self.path / "status.json", status)

    def set_aside(self) -> Path | None:
        """Renames an existing folder to `<name>.old-N` and returns the new path; None if there is no folder.

        Raises:
            MissingRequirement: another process is running there.
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
        """Refuses a folder that holds a run of a different recipe.

        Raises:
            InputError: lists every field that differs.
        """
        saved = self.path / "recipe.yaml"
        if not saved.exists():
            return
        old, new = deciding(self._saved()), deciding(recipe.tree())
        differences = [
            f"  {key}: {old.get(key, 'missing')!r} there, {new.get(key, 'missing')!r} now"
            for key in differing(old, new)
        ]
        if differences:
            raise InputError(
                "\n".join(
                    [
                        f"{self.path} holds a run of a different recipe; {len(differences)} fields differ:",
                        *differences,
                        *longer(self.path, old, new),
                        *rounds_of_0_1(old, new),
                        "Give this run another name (name=…), or use --restart to start over; the old folder is kept.",
                    ]
                )
            )

    def _saved(self) -> dict:
        """The recipe that the run began with; empty if there is none."""
        saved = self.path / "recipe.yaml"
        if not saved.exists():
            return {}
        return strict_yaml.parse(saved.read_text(encoding="utf-8", errors="replace")).tree

    def fingerprints(self, recipe: Recipe) -> list[str]:
        """Those that resume points of this recipe may have: its own, and the one that version 0.1 gave it."""
        earlier, saved = files.read_json(self.path / "environment.json").get("fingerprints", []), self._saved()
        known = {recipe.fingerprint, *(earlier if recipe.fingerprint in earlier else ())}
        if saved and not differing(deciding(saved), deciding(recipe.tree())):
            known.add(fingerprint_of_0_1(saved))
        return sorted(known)

    def check_place(self) -> None:
        """Checks early that the folder can be created; creates nothing.

        Raises:
            InputError: it is a link to elsewhere.
            MissingRequirement: it cannot be written.
        """
        try:
            if self.path.resolve() != self.path.parent.resolve() / self.path.name:
                raise InputError(
                    f"name: {self.path} is a link to {self.path.resolve()}, outside its output_dir; set output_dir "
                    "to the intended folder, or give this run another name (name=…)."
                )
            nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        except UnicodeEncodeError as error:
            raise MissingRequirement(
                f"output_dir: {str(self.path)!a} has characters outside the locale of this process "
                f"({error.encoding}); set PYTHONUTF8=1 or LC_ALL=C.UTF-8."
            ) from error
        except (OSError, RuntimeError) as error:  # a loop of links
            raise MissingRequirement(f"output_dir: {self.path} cannot be created ({error}); choose another.") from error
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            why = "is not writable" if nearest.is_dir() else "is not a folder"
            raise MissingRequirement(f"output_dir: {self.path} cannot be created: {nearest} {why}; choose another.")

    def _lock(self) -> FileLock:
        """Takes the folder's lock; a file beside it names the holder to whoever comes later."""
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
        """Creates the folder and takes its lock; existing files stay as they are.

        Raises:
            MissingRequirement: another process is running here, or the folder cannot be written.
        """
        try:
            for folder in (self.path, self.checkpoints, self.tickets, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            lock = self._lock()
            for left_over in self.path.rglob(".*.tmp"):  # left by a killed process
                left_over.unlink()
            files.write_json(self.path / HOLDER, {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()})
        except OSError as error:
            raise MissingRequirement(
                f"output_dir: {self.path} cannot be written ({error}); choose another output_dir."
            ) from error
        return lock

    def record_stop(self, reason: str) -> None:
        """Records a stop before the first step, unless the folder belongs to another process or a finished run."""
        with suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = self._lock()
            except MissingRequirement:
                holder = files.read_json(self.path / HOLDER)
                if (holder.get("pid"), holder.get("host")) != (os.getpid(), socket.gethostname()):
                    return
                lock = None
            if self.status().get("state") != "finished":
                self.write_status("stopped", Stopped.exit_code, reason)
            if lock is not None:
                lock.release()

    def record(self, recipe: Recipe, environment: dict) -> None:
        """Writes recipe and environment of the run that starts or resumes here."""
        files.write_text(self.path / "recipe.yaml", strict_yaml.dump(recipe.tree()))
        files.write_json(self.path / "environment.json", environment)
        self.write_status("running")


EPOCHS = ("train.epochs", "train.round_epochs", "train.recovery_epochs")


def differing(old: Mapping, new: Mapping) -> list[str]:
    """Fields of which two recipes have different values; one that is missing is null."""
    return [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]


def longer(path: Path, old: Mapping, new: Mapping) -> list[str]:
    """How to train a run on, if more epochs are all that is asked for."""
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if not changed or not changed <= set(EPOCHS) or any((new.get(k) or 0) < (old.get(k) or 0) for k in changed):
        return []
    method = METHODS.get(str(new.get("pruning.method.name")), Method)
    kept = " pruning.method=constant" if method.prunes else ""
    return [
        "A run's epochs are fixed when it starts. To train its last ticket further, start a new run from it: "
        f"name=… model.start_from={path}{kept} train.epochs=…, with the epochs to add."
    ]


def rounds_of_0_1(old: Mapping, new: Mapping) -> list[str]:
    """How to resume a run without pruning that version 0.1 began without a schedule."""
    rounds, method = "pruning.schedule.rounds", METHODS.get(str(new.get("pruning.method.name")), Method)
    if method.prunes or method.keeps_start or (old.get(rounds), new.get(rounds)) != (ROUNDS, 0):
        return []
    return [
        f"Version 0.1 trained {new['pruning.method.name']} for the epochs of {ROUNDS} rounds when the recipe named no "
        f"schedule; set {rounds}={ROUNDS} to resume such a run."
    ]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
