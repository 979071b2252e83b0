"""Resume points: atomic, verified, free of pickle. A visible point is complete; a damaged one is set aside.

A point is a folder of safetensors files, one JSON file and a manifest of hashes. The loop is held only while tensors
are copied to host memory; hashing, writing and renaming happen in a thread.
"""

import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vit_rsst import files
from vit_rsst.errors import Damaged, Diverged, MissingRequirement
from vit_rsst.tickets.stored import Stored, stored

FORMAT = "vit_rsst.resume/1"
PATIENCE = 3
"""Consecutive failed saves that end the run; the ones before are warnings."""
BUSY_SECONDS = 2.0
"""How long a save may hold the loop for the one before it, which a disk is still writing."""
SHARED_SECONDS = 30.0
"""How long a file may take to show on another machine of a shared file system."""


@dataclass(frozen=True)
class ResumePoint:
    """The state a run resumes from.

    Attributes:
        step: global optimizer step.
        tensors: file stem → tensors by name; read when they are used, if the point comes from a folder.
        numbers: plain JSON: progress, controller, meters, recipe fingerprint.
        name: of its folder, once it has been read from there.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor | Stored]]
    numbers: Mapping
    name: str = ""


@dataclass
class Checkpointer:
    """Writes and finds the resume points of one run; used on the main process alone.

    Attributes:
        folder: `checkpoints/` of the run.
        keep: number of verified points to keep.
        warn: shows a warning to the user.
    """

    folder: Path
    keep: int = 2
    warn: Callable[[str], None] = warnings.warn
    _pending: Future | None = None
    _failures: int = 0
    _step: int = -1

    def save(self, point: ResumePoint, is_own: bool = False) -> None:
        """Copies the tensors to host memory and writes them in the background; `settle` comes first.

        Args:
            is_own: they are in host memory, and nobody else's: there is no need to copy them.
        """
        self.settle()
        copied = {
            stem: {name: tensor.detach().to("cpu", copy=not is_own).contiguous() for name, tensor in tensors.items()}
            for stem, tensors in point.tensors.items()
        }
        self._step = point.step
        # The thread ends with the save: as long as a second one that has used OpenMP lives, GNU's runtime counts more
        # threads than cores and sends idle ones to sleep between loops: 5 % of a training step on two cores.
        pool = ThreadPoolExecutor(1)
        self._pending = pool.submit(self._write, ResumePoint(point.step, copied, point.numbers))
        pool.shutdown(wait=False)

    def has_room(self, step: int) -> bool:
        """Whether the point before has been written; if not, warns that this step's is skipped. Never waits long."""
        if self._pending is not None:
            wait_for([self._pending], BUSY_SECONDS)
        if self.is_busy:
            self.warn(
                f"the resume point of step {self._step} is still being written to {self.folder}; skipping that of step "
                f"{step}. Where disks are slow, save less often (train.save_every_steps)."
            )
        return not self.is_busy

    def lacks(self, step: int) -> bool:
        """Whether this step is neither saved nor being saved."""
        return self._step != step or self._pending is None

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written."""
        return self._pending is not None and not self._pending.done()

    def settle(self) -> None:
        """Waits for the save in progress; a failure is a warning, since a full disk may have room at the next one.

        Raises:
            MissingRequirement: `PATIENCE` saves in a row have failed.
            Diverged: the point holds a non-finite number; older points are untouched.
        """
        try:
            self.wait()
        except MissingRequirement as error:
            self._failures += 1
            if self._failures >= PATIENCE:
                raise
            self.warn(
                f"{error} Training continues; {self._failures} of at most {PATIENCE} consecutive saves have failed."
            )

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
            MissingRequirement: it failed; older points are untouched.
            Diverged: the point holds a non-finite number; older points are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
            self._failures = 0
        except (OSError, SafetensorError) as error:
            raise MissingRequirement(
                f"the resume point could not be written to {self.folder} ({error}); earlier ones are untouched. "
                "Free some space there, then run the same command to resume from the last point."
            ) from error

    def load(self) -> ResumePoint | None:
        """The newest point whose files match its manifest; None if there are no points.

        A damaged one is renamed to `.bad-…` with a warning, and the one before it is tried.

        Raises:
            Damaged: there are points, but none is intact.
        """
        points = self._points()
        for path in reversed(points):
            try:
                return _read(path)
            except (Damaged, OSError) as error:
                self.warn(f"{error}; setting it aside as .bad-{path.name} and trying the one before it")
                os.replace(path, path.with_name(f".bad-{path.name}-{uuid.uuid4().hex[:6]}"))
        if points:
            raise Damaged(f"no intact resume point is left in {self.folder}; use --restart to start over.")
        return None

    def read(self, name: str) -> ResumePoint:
        """The point of this name, which another process has verified: sizes are compared, nothing is hashed.

        Raises:
            Damaged: it cannot be read, even after a while.
        """
        deadline = time.monotonic() + SHARED_SECONDS
        while True:
            try:
                return _read(self.folder / name, is_verified=True)
            except (Damaged, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _points(self) -> list[Path]:
        """This run's points, oldest first; links to elsewhere do not count."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir() and not path.is_symlink())

    def _write(self, point: ResumePoint) -> None:
        _check_finite(point)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep(".tmp-*", ".*.tmp")
        final = self.folder / f"step-{point.step:08d}"
        temporary = self.folder / f".tmp-{point.step:08d}-{uuid.uuid4().hex[:8]}"
        try:
            _write_files(temporary, point)
            self._show(temporary, final)
        except (OSError, SafetensorError):
            shutil.rmtree(temporary, ignore_errors=True)  # half-written files take up room on a full disk
            raise
        for old in self._points()[: -self.keep]:
            self._hide(old)
        self._sweep(".tmp-old-*")

    def _show(self, temporary: Path, final: Path) -> None:
        """Gives a complete point its name."""
        if final.exists():  # saved again after a resume: the new one stays beside the old until that is gone
            beside = final.with_name(f"{final.name}-again")
            os.replace(temporary, beside)
            self._hide(final)
            os.replace(beside, final)
        else:
            os.replace(temporary, final)
        files.write_text(self.folder / "LATEST", final.name + "\n")
        files.settle_folder(self.folder)

    def _hide(self, path: Path) -> None:
        """Hides a point in one rename, so a deletion never leaves half of a visible one."""
        os.replace(path, self.folder / f".tmp-old-{uuid.uuid4().hex[:8]}")

    def _sweep(self, *patterns: str) -> None:
        for left_over in (path for pattern in patterns for path in self.folder.glob(pattern)):
            if left_over.is_dir() and not left_over.is_symlink():
                shutil.rmtree(left_over)
            else:
                left_over.unlink()


def _check_finite(point: ResumePoint) -> None:
    """Refuses a point that training cannot continue from.

    Raises:
        Diverged: a number is infinite or NaN.
    """
    for stem, tensors in point.tensors.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise Diverged(
                    f"step {point.step}: {name} of the {stem} is not finite, so no resume point was written; the "
                    "last one is intact. Lower optim.lr or set optim.clip_grad_norm, under another name (name=…) or "
                    "with --restart."
                )


def _write_files(folder: Path, point: ResumePoint) -> None:
    """Writes a point's files, then its manifest, all flushed to disk."""
    folder.mkdir()
    for stem, tensors in point.tensors.items():
        save_file(dict(tensors), folder / f"{stem}.safetensors")
    files.write_json(folder / "state.json", {"step": point.step, **point.numbers})
    listed = sorted(folder.iterdir())
    for path in listed:
        files.settle(path)
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in listed}
    files.write_json(folder / "manifest.json", {"format": FORMAT, "files": manifest})
    files.settle_folder(folder)


def _read(path: Path, is_verified: bool = False) -> ResumePoint:
    """Reads a point, comparing size and, unless it is verified, hash of every file with the manifest.

    Raises:
        Damaged: something does not match.
    """
    try:
        return _read_as_listed(path, is_verified)
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise Damaged(f"the resume point {path.name} is damaged: {type(error).__name__} {error}") from error


def _read_as_listed(path: Path, is_verified: bool) -> ResumePoint:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(f"the resume point {path.name} has no readable manifest ({error})") from error
    if manifest.get("format") != FORMAT:
        raise Damaged(f"the resume point {path.name} has the format {manifest.get('format')!r}, not {FORMAT!r}")
    for name, expected in manifest["files"].items():
        file = path / Path(name).name  # a manifest never leads out of its folder
        if (
            file.is_symlink()
            or not file.is_file()
            or file.stat().st_size != expected["bytes"]
            or not (is_verified or files.sha256(file) == expected["sha256"])
        ):
            raise Damaged(f"the resume point {path.name} is damaged: {name} does not match its manifest")
    numbers = json.loads((path / "state.json").read_text(encoding="utf-8"))
    files_of_tensors = [path / Path(name).name for name in manifest["files"] if name.endswith(".safetensors")]
    tensors = {file.stem: stored(file)[0] for file in files_of_tensors}
    return ResumePoint(numbers.pop("step"), tensors, numbers, path.name)
