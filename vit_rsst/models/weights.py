"""Weights from elsewhere: finding the file, reading it, and what came of it.

A file is safetensors or it is not read: nothing here unpickles.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vit_rsst import reach
from vit_rsst.errors import Damaged, InputError, MissingRequirement, first_line

FILE = "model.safetensors"
PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt", ".tar")
OTHERWISE = "or set model.pretrained=false to train from random weights"


@dataclass(frozen=True)
class Loaded:
    """What a network was given, kept as its attribute `loaded`.

    Attributes:
        file: where it was read from.
        sha256: of the file, in hexadecimal.
        num_tensors: loaded, those that were resampled among them.
        resampled: tensors whose shape is another in the file.
        new: tensors that the file does not give and that are random: those of a new classifier.
        left_out: tensors of the file that the network has no place for: those of the old classifier.
    """

    file: str
    sha256: str
    num_tensors: int
    resampled: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]

    def text(self) -> str:
        parts = {"resampled": self.resampled, "new and random": self.new, "left out": self.left_out}
        listed = "".join(f"; {what}: {_shortened(names)}" for what, names in parts.items() if names)
        return f"{self.num_tensors} tensors of {self.file} (sha256 {self.sha256[:16]}){listed}"

    def record(self) -> dict:
        return asdict(self)


def _shortened(names: tuple[str, ...]) -> str:
    modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in names))
    return ", ".join(modules[:5]) + (f" and {len(modules) - 5} more" if len(modules) > 5 else "")


def is_path(source: bool | str) -> bool:
    """Whether a recipe's `model.pretrained` names a file or a folder, and not a tag of timm."""
    if isinstance(source, bool):
        return False
    path = Path(source).expanduser()
    return os.sep in source or source[:1] in ".~" or path.suffix in (".safetensors", *PICKLES) or path.exists()


def local_file(source: str) -> Path:
    """The file that a path means: itself, or `model.safetensors` of a folder of timm or transformers.

    Raises:
        InputError: a folder of this package, which another field takes.
        MissingRequirement: there is none.
        Damaged: a pickle.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        _refuse_own_kinds(path)
        _refuse_pickles(path, () if (path / FILE).is_file() else sorted(path.iterdir()))
        path = path / FILE
    _refuse_pickles(path, [path])
    if not path.is_file():
        beside = sorted(file.name for file in path.parent.glob("*.safetensors"))
        there = f" ({', '.join(beside[:3])}{' …' if len(beside) > 3 else ''} beside it)" if beside else ""
        raise MissingRequirement(f"model.pretrained: {path} does not exist{there}; name the file itself, {OTHERWISE}.")
    return path


def _refuse_own_kinds(folder: Path) -> None:
    config, kind = folder / "config.json", ""
    if (folder / "tickets").is_dir() and not config.exists():
        kind = "a run folder"
    elif config.is_file() and '"vit_rsst.slim' in config.read_text(encoding="utf-8", errors="replace"):
        kind = "a slim folder"
    if kind:
        raise InputError(f"model.pretrained: {folder} is {kind}; name it in model.start_from instead.")


def _refuse_pickles(place: Path, files: Iterable[Path]) -> None:
    for file in files:
        if file.suffix in PICKLES:
            raise Damaged(
                f"model.pretrained: {file} is a pickle, which can run code when it is read; convert it where you trust "
                f"it, by safetensors.torch.save_file(torch.load({file.name!r}, weights_only=True), {FILE!r}), and name "
                f"the {FILE}."
            )


def hub_file(repository: str, name: str, field: str = "model.pretrained", otherwise: str = OTHERWISE) -> Path:
    """A file of a repository of the Hub: from the cache, else fetched.

    Args:
        field: of the recipe, which asks for it.
        otherwise: what to do without it.

    Raises:
        MissingRequirement: it is not in the cache and the Hub cannot be reached, within seconds, or does not give it.
    """
    try:
        return Path(hf_hub_download(repository, name, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except (OSError, HFValidationError) as error:
        raise MissingRequirement(f"{field}: no repository {repository!r} on the Hub ({first_line(error)}).") from error
    try:
        if why := "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else reach.unreachable(constants.ENDPOINT):
            raise OSError(why)
        return Path(hf_hub_download(repository, name))
    except (OSError, EntryNotFoundError, HfHubHTTPError) as error:
        raise MissingRequirement(
            f"{field}: {name} of {repository!r} is not in the cache and cannot be had from the Hub "
            f"({first_line(error)}); check the network, name a local file or folder, {otherwise}."
        ) from error


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors and sha256 of a safetensors file.

    Raises:
        Damaged: it is truncated, empty or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            if str((file.metadata() or {}).get("format")).startswith("vit_rsst.ticket"):
                raise Damaged(f"model.pretrained: {path} is a ticket; name it in model.start_from instead.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        if not tensors:
            raise Damaged(f"model.pretrained: {path} holds no tensors; name another file, {OTHERWISE}.")
        with path.open("rb") as file:
            return tensors, hashlib.file_digest(file, "sha256").hexdigest()
    except (SafetensorError, OSError) as error:
        raise Damaged(
            f"model.pretrained: {path} is not a readable safetensors file ({first_line(error)}); copy or fetch it "
            "again."
        ) from error


def refuse_infinite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises:
    Damaged: a tensor, of those that a network takes from the file, is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Damaged(f"model.pretrained: {name} of {path} is not finite; copy or fetch it again, {OTHERWISE}.")


def misfits(
    own: dict[str, Tensor], given: dict[str, Tensor], free: tuple[str, ...]
) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """What hinders loading, in words; what would stay random and what be left out, of the modules `free` to differ."""
    missing, strange = own.keys() - given.keys(), given.keys() - own.keys()
    bound = [name for name in (*own, *strange) if not name.startswith(free)]
    wrong = [f"no {name}" for name in bound if name in missing]
    wrong += [f"{name} besides" for name in bound if name in strange]
    wrong += [
        f"{name} of {tuple(given[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    wrong += [
        f"{name} of {given[name].dtype}, not {own[name].dtype}"
        for name in own
        if name in given and own[name].is_floating_point() and not given[name].is_floating_point()
    ]
    return wrong, tuple(sorted(missing)), tuple(sorted(strange))


def refuse(wrong: list[str], place: str, architecture: str, is_published: bool) -> None:
    """Raises:
    InputError: published weights of the architecture do not fit, so that the recipe's arguments are others.
    Damaged: a file does not fit.
    """
    if not wrong:
        return
    listed = "; ".join(wrong[:3]) + ("; …" if len(wrong) > 3 else "")
    sentence = f"model.pretrained: {place} does not fit this {architecture} in {len(wrong)} places ({listed}); "
    if is_published:
        raise InputError(f"{sentence}leave its width, depth and heads out of model.args, {OTHERWISE}.")
    raise Damaged(f"{sentence}name weights of the same model, {OTHERWISE}.")
