"""Pretrained weights: finding the file, reading it, and recording what was loaded.

Only safetensors files are read; nothing is unpickled.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vit_rsst import reach
from vit_rsst.errors import Damaged, InputError, MissingRequirement, first_line

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"
"""Index of sharded weights: which file holds which tensor."""
PREFIXES = ("_orig_mod.", "module.")
"""Name prefixes added by torch.compile and DistributedDataParallel."""
CHECKPOINTS = ("model", "state_dict", "model_state_dict", "module", "net")
"""Keys under which trainers store weights in a checkpoint."""
PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt", ".tar")
OTHERWISE = "or set model.pretrained=false to train from random weights"


@dataclass(frozen=True)
class Loaded:
    """Record of weights loaded into a network, stored as its attribute `loaded`.

    Attributes:
        file: source of the weights.
        sha256: of the file, in hexadecimal.
        num_tensors: number of loaded tensors, including resampled ones.
        resampled: tensors whose shape differs in the file.
        new: tensors missing from the file and therefore random: those of a new classifier.
        left_out: tensors of the file that the network does not have: those of the old classifier.
        classifier: a sentence on what happened to the classifier.
    """

    file: str
    sha256: str
    num_tensors: int
    resampled: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]
    classifier: str = ""

    def text(self) -> str:
        parts = {"resampled": self.resampled, "new and random": self.new, "left out": self.left_out}
        listed = "".join(f"; {what}: {_shortened(names)}" for what, names in parts.items() if names)
        classifier = f"; {self.classifier}" if self.classifier else ""
        return f"{self.num_tensors} tensors of {self.file} (sha256 {self.sha256[:16]}){listed}{classifier}"

    def record(self) -> dict:
        return asdict(self)


def _shortened(names: tuple[str, ...]) -> str:
    modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in names))
    return ", ".join(modules[:5]) + (f" and {len(modules) - 5} more" if len(modules) > 5 else "")


def is_path(source: bool | str) -> bool:
    """Whether a recipe's `model.pretrained` is a file or folder rather than a timm tag."""
    if isinstance(source, bool):
        return False
    path = Path(source).expanduser()
    return os.sep in source or source[:1] in ".~" or path.suffix in (".safetensors", *PICKLES) or path.exists()


@dataclass(frozen=True)
class Classes:
    """Classes of pretrained weights and of the data.

    Attributes:
        theirs, ours: names by label, of the weights and of the data; empty if unknown.
    """

    theirs: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()

    @property
    def rows(self) -> list[int] | None:
        """Row of their classifier for each of our classes; None: it predicts other classes."""
        if not self.theirs or not self.ours:
            return list(range(len(self.ours)))
        numbers = {name: number for number, name in enumerate(self.theirs)}
        if len(numbers) != len(self.theirs) or numbers.keys() != set(self.ours):
            return None
        return [numbers[name] for name in self.ours]

    def text(self, num_theirs: int, num_ours: int) -> str:
        """What happens to the classifier."""
        if num_theirs != num_ours:
            return ""  # evident from its size
        if not self.ours:
            return "" if not self.theirs else f"classifier for the classes {shortened(self.theirs)}"
        if not self.theirs:
            return "classifier kept unchecked: the file does not name its classes"
        if self.rows is None:
            return f"new classifier: the file's classes are {shortened(self.theirs)}"
        in_order = self.theirs == self.ours
        return "classifier kept: same classes" if in_order else "classifier kept, its rows reordered by class name"


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, as text."""
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


def class_names(config: Path) -> tuple[str, ...]:
    """Class names by label from a `config.json` of timm or transformers; empty if it has none."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        names = found.get("label_names") or (found.get("pretrained_cfg") or {}).get("label_names")
        if not names:
            by_number = {int(number): name for number, name in (found.get("id2label") or {}).items()}
            names = [by_number[number] for number in sorted(by_number)]
    except (OSError, ValueError, AttributeError):
        return ()
    placeholders = [f"LABEL_{number}" for number in range(len(names))]  # of transformers
    return () if list(names) == placeholders else tuple(map(str, names))


@torch.no_grad()
def reorder_(net: nn.Module, classifiers: Iterable[str], rows: Sequence[int]) -> None:
    """Reorders classifier rows: class i gets row `rows[i]`."""
    for name in classifiers:
        for parameter in net.get_submodule(name).parameters():
            if len(parameter) == len(rows):
                parameter.copy_(parameter[list(rows)])


def local_file(source: str) -> Path:
    """The weights file at a path: the path itself, or the weights or index in a timm or transformers folder.

    Raises:
        InputError: a run or slim folder of this package, which belongs in `model.start_from`.
        MissingRequirement: the file does not exist.
        Damaged: it is a pickle.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        _refuse_own_kinds(path)
        has_weights = (path / FILE).is_file() or (path / INDEX).is_file()
        _refuse_pickles(() if has_weights else sorted(path.iterdir()))
        path = path / (INDEX if not (path / FILE).is_file() and (path / INDEX).is_file() else FILE)
    _refuse_pickles([path])
    if not path.is_file():
        beside = sorted(file.name for file in path.parent.glob("*.safetensors"))
        there = f" (found {', '.join(beside[:3])}{' …' if len(beside) > 3 else ''})" if beside else ""
        raise MissingRequirement(f"model.pretrained: {path} does not exist{there}; name an existing file, {OTHERWISE}.")
    return path


def _refuse_own_kinds(folder: Path) -> None:
    config, kind = folder / "config.json", ""
    if (folder / "tickets").is_dir() and not config.exists():
        kind = "a run folder"
    elif config.is_file() and '"vit_rsst.slim' in config.read_text(encoding="utf-8", errors="replace"):
        kind = "a slim folder"
    if kind:
        raise InputError(f"model.pretrained: {folder} is {kind}; name it in model.start_from instead.")


def _refuse_pickles(files: Iterable[Path]) -> None:
    for file in files:
        if file.suffix in PICKLES:
            where = f"next((c[n] for n in {CHECKPOINTS} if n in c), c)"
            tensors = f"{{k: v.clone().contiguous() for k, v in {where}.items() if hasattr(v, 'shape')}}"
            load = f"torch.load({str(file)!r}, map_location='cpu', weights_only=True)"
            target = str(file.with_suffix(".safetensors"))
            raise Damaged(
                f"model.pretrained: {file} is a pickle, which can execute code when loaded. If you trust it, convert "
                f"it in Python: import torch, safetensors.torch; "
                f"safetensors.torch.save_file((lambda c: {tensors})({load}), {target!r}), and name {target}."
            )


def hub_file(repository: str, name: str, field: str = "model.pretrained", otherwise: str = OTHERWISE) -> Path:
    """A file of a Hub repository: from the cache, else downloaded.

    Args:
        field: recipe field that asks for it.
        otherwise: alternative named in the error message.

    Raises:
        MissingRequirement: it is not cached, and the Hub is unreachable or rejects the request.
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
            f"{field}: {name} of {repository!r} is not in the cache and cannot be downloaded from the Hub "
            f"({first_line(error)}); check the network, name a local file or folder, {otherwise}."
        ) from error


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors and sha256 of a safetensors file, or of the shards that an index names.

    Names lose the prefixes of torch.compile and DistributedDataParallel.

    Raises:
        Damaged: a file is truncated, empty, listed in the index but missing, or not safetensors.
    """
    found, digest = {}, hashlib.sha256()
    for file in _shards(path) if path.name.endswith(".index.json") else [path]:
        tensors, content = _read_file(file)
        found |= tensors
        digest.update(content)
    sha256 = content.hex() if path.suffix == ".safetensors" else digest.hexdigest()
    return _unprefixed(found), sha256


def _shards(index: Path) -> list[Path]:
    """Shards listed in an index."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise Damaged(
            f"model.pretrained: {index} is not a readable index of shards ({first_line(error)}); copy it again."
        ) from error
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing or not names:
        what = f"the shard {missing[0]} is missing" if missing else "it lists no shards"
        raise Damaged(f"model.pretrained: {index}: {what}; copy the folder again, {OTHERWISE}.")
    return [index.parent / name for name in sorted(names)]


def _read_file(path: Path) -> tuple[dict[str, Tensor], bytes]:
    """Tensors and hash of one file."""
    try:
        with safe_open(path, "pt") as file:
            if str((file.metadata() or {}).get("format")).startswith("vit_rsst.ticket"):
                raise Damaged(f"model.pretrained: {path} is a ticket; name it in model.start_from instead.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        if not tensors:
            raise Damaged(f"model.pretrained: {path} holds no tensors; name another file, {OTHERWISE}.")
        with path.open("rb") as file:
            return tensors, hashlib.file_digest(file, "sha256").digest()
    except (SafetensorError, OSError) as error:
        raise Damaged(
            f"model.pretrained: {path} is not a readable safetensors file ({first_line(error)}); copy or download it "
            "again."
        ) from error


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def refuse_infinite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises:
    Damaged: a tensor loaded from the file is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Damaged(f"model.pretrained: {name} in {path} is not finite; copy or download it again, {OTHERWISE}.")


def misfits(
    own: dict[str, Tensor], given: dict[str, Tensor], free: tuple[str, ...]
) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """Mismatches in words; then tensors left random and tensors left out, in the modules `free` to differ."""
    missing, strange = own.keys() - given.keys(), given.keys() - own.keys()
    bound = [name for name in (*own, *strange) if not name.startswith(free)]
    wrong = [f"no {name}" for name in bound if name in missing]
    wrong += [f"extra {name}" for name in bound if name in strange]
    wrong += [
        f"{name} has shape {tuple(given[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    wrong += [
        f"{name} has dtype {given[name].dtype}, not {own[name].dtype}"
        for name in own
        if name in given and own[name].is_floating_point() and not given[name].is_floating_point()
    ]
    return wrong, tuple(sorted(missing)), tuple(sorted(strange))


def refuse(wrong: list[str], place: str, architecture: str, is_published: bool) -> None:
    """Raises:
    InputError: published weights do not match, because of the recipe's arguments.
    Damaged: a file does not match.
    """
    if not wrong:
        return
    listed = "; ".join(wrong[:3]) + ("; …" if len(wrong) > 3 else "")
    sentence = f"model.pretrained: {place} does not match this {architecture} in {len(wrong)} places ({listed}); "
    if is_published:
        raise InputError(f"{sentence}leave its width, depth and heads out of model.args, {OTHERWISE}.")
    raise Damaged(f"{sentence}name weights of the same model, {OTHERWISE}.")
