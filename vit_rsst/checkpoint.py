"""Resume points: atomic, verified, without pickle. A visible point is complete; a damaged one is set aside.

A point is a folder of safetensors files, one JSON file and a manifest of hashes. The loop is held only while tensors
are copied to host memory; hashing, writing and renaming run in a thread that the next save and the end wait for.
"""

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vit_rsst import files
from vit_rsst.errors import Damaged, EnvironmentLacks

FORMAT = "vit_rsst.resume/1"


@dataclass(frozen=True)
class ResumePoint:
    """What a run goes on from.

    Attributes:
        step: global optimizer step.
        tensors: file stem → tensors by name.
        numbers: plain JSON: progress, controller, meters, identity of the recipe.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    numbers: Mapping


@dataclass
class Checkpointer:
    """Writes and finds the resume points of one run; used on the main process alone.

    Attributes:
        folder: `checkpoints/` of the run.
        keep: how many verified points stay.
    """

    folder: Path
    keep: int = 2
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), repr=False)
    _pending: Future | None = None

    def save(self, point: ResumePoint) -> None:
        """Copies the tensors to host memory and writes them in the background."""
        self.wait()
        copied = {
            stem: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
            for stem, tensors in point.tensors.items()
        }
        self._pending = self._pool.submit(self._write, ResumePoint(point.step, copied, point.numbers))

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
            EnvironmentLacks: it failed; older points are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, SafetensorError) as error:
            raise EnvironmentLacks(
                f"the resume point could not be written to {self.folder} ({error}); the earlier ones are untouched. "
                "Free some space there, or set output_dir to another disk, and start the same command again."
            ) from error

    def load(self) -> ResumePoint | None:
        """The newest point whose files are what its manifest says; None when there is none.

        A damaged one is renamed to `.bad-…` with a warning, and the next older is tried.

        Raises:
            Damaged: there are points, and none is sound.
        """
        points = self._points()
        for path in reversed(points):
            try:
                return _read(path)
            except (Damaged, OSError) as error:
                warnings.warn(f"{error}; set aside as .bad-{path.name}, trying the one before it", stacklevel=2)
                os.replace(path, path.with_name(f".bad-{path.name}-{uuid.uuid4().hex[:6]}"))
        if points:
            raise Damaged(f"no sound resume point is left in {self.folder}; start again with --restart.")
        return None

    def _points(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _write(self, point: ResumePoint) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob(".tmp-*"):
            shutil.rmtree(left_over)
        final = self.folder / f"step-{point.step:08d}"
        temporary = self.folder / f".tmp-{point.step:08d}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        for stem, tensors in point.tensors.items():
            save_file(dict(tensors), temporary / f"{stem}.safetensors")
        files.write_json(temporary / "state.json", {"step": point.step, **point.numbers})
        listed = sorted(temporary.iterdir())
        for path in listed:
            files.settle(path)
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in listed}
        files.write_json(temporary / "manifest.json", {"format": FORMAT, "files": manifest})
        files.settle_folder(temporary)
        if final.exists():  # the same step, saved again after a resume: the new one stands beside it until it is gone
            beside = final.with_name(f"{final.name}-again")
            os.replace(temporary, beside)
            self._hide(final)
            os.replace(beside, final)
        else:
            os.replace(temporary, final)
        files.write_text(self.folder / "LATEST", final.name + "\n")
        files.settle_folder(self.folder)
        for old in self._points()[: -self.keep]:
            self._hide(old)
        for left_over in self.folder.glob(".tmp-old-*"):
            shutil.rmtree(left_over)

    def _hide(self, path: Path) -> None:
        """Takes a point out of sight in one rename, so that no deletion leaves half of a visible one."""
        os.replace(path, self.folder / f".tmp-old-{uuid.uuid4().hex[:8]}")


def _read(path: Path) -> ResumePoint:
    """Reads a point, comparing size and hash of every file with the manifest.

    Raises:
        Damaged: anything is not what it should be.
    """
    try:
        return _read_as_listed(path)
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise Damaged(f"the resume point {path.name} is damaged: {type(error).__name__} {error}") from error


def _read_as_listed(path: Path) -> ResumePoint:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(f"the resume point {path.name} has no readable manifest ({error})") from error
    if manifest.get("format") != FORMAT:
        raise Damaged(f"the resume point {path.name} has the format {manifest.get('format')!r}, not {FORMAT!r}")
    for name, expected in manifest["files"].items():
        file = path / Path(name).name  # a manifest never leads out of its folder
        if not file.is_file() or file.stat().st_size != expected["bytes"] or files.sha256(file) != expected["sha256"]:
            raise Damaged(f"the resume point {path.name} is damaged: {name} is not what its manifest says")
    numbers = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = {Path(n).stem: load_file(path / Path(n).name) for n in manifest["files"] if n.endswith(".safetensors")}
    return ResumePoint(numbers.pop("step"), tensors, numbers)
