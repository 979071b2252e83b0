"""Pretrained weights of timm models: finds them, and checks that all of them are loaded.

timm adapts them to the network: it resamples patch and position embeddings, renames old tensors and drops the
classifier if the number of classes differs. Any other tensor that it would leave random, and only log, is an error.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from vit_rsst.errors import Damaged, InputError, first_line
from vit_rsst.models import weights


def load(
    build: Callable[..., nn.Module], architecture: str, pretrained: bool | str, classes: Sequence[str] = ()
) -> nn.Module:
    """Builds a network with weights: the published ones, those of a timm tag, or those of a file or folder.

    Args:
        build: `timm.create_model` of the architecture; takes more arguments, and `device`.
        classes: of the data, by label; empty if unknown. A classifier of the same classes is kept and its rows
            reordered; for other classes it is replaced.

    Raises:
        InputError: timm has no weights for this model, or no such tag, or their width or depth differs.
        MissingRequirement: they cannot be found or downloaded.
        Damaged: the file is damaged, or belongs to another model.
    """
    file, is_published = weights_file(architecture, pretrained), not weights.is_path(pretrained)
    tensors, sha256 = weights.read(file)
    theirs = () if is_published else weights.class_names(file.with_name("config.json"))
    known = weights.Classes(theirs, tuple(classes))
    overlay = _overlay(architecture, tensors)
    num_theirs = overlay["num_classes"]
    if known.rows is None:
        overlay["num_classes"] = 0  # makes timm drop the classifier
    with _checked_loads(type(build(device="meta")), architecture, file, is_published) as found:
        net = build(pretrained=True, pretrained_cfg_overlay=overlay)
    weights.refuse(_other_heads(net, file), str(file), architecture, is_published)
    [(given, new, left_out)] = found
    if known.rows and num_theirs == net.num_classes:
        weights.reorder_(net, _classifiers(net), known.rows)
    changed = tuple(name for name in sorted(given) if name in tensors and given[name].shape != tensors[name].shape)
    lost = tuple(name for name in sorted(tensors) if name.startswith(_free_modules(net)) and name not in given)
    num_loaded, text = len(given) - len(left_out), known.text(num_theirs, net.num_classes)
    net.loaded = weights.Loaded(str(file), sha256, num_loaded, changed, new, left_out + lost, text)
    return net


def weights_file(architecture: str, pretrained: bool | str) -> Path:
    """Path of the weights that a recipe asks for: a local file, or timm's from the Hub, in the cache.

    Raises:
        InputError: timm has no weights for this model, or no such tag.
        MissingRequirement: they are not available.
    """
    if weights.is_path(pretrained):
        return weights.local_file(pretrained)
    plain = architecture.split(".")[0]
    name = architecture if pretrained is True else f"{plain}.{pretrained.removeprefix(f'{plain}.')}"
    if not timm.is_model_pretrained(name):
        tags = [tagged.removeprefix(f"{plain}.") for tagged in timm.list_pretrained(f"{plain}.*")]
        choices = f"its tags are {', '.join(tags)}; name one, " if tags else "name "
        raise InputError(
            f"model.pretrained: timm has no weights for {name!r}; {choices}a file or a folder, {weights.OTHERWISE}."
        )
    published = timm.get_pretrained_cfg(name)
    file = (published.hf_hub_filename or weights.FILE).replace("pytorch_model.bin", weights.FILE)
    if not published.hf_hub_id or not file.endswith(".safetensors") or published.custom_load == "hf":
        raise InputError(
            f"model.pretrained: {name} is not published as safetensors, the only supported format; name another tag, "
            f"{weights.OTHERWISE}."
        )
    return weights.hub_file(published.hf_hub_id, file)


def _other_heads(net: nn.Module, file: Path) -> list[str]:
    """Differences in the number of heads, which shapes do not show, from the `config.json` next to the file."""
    config = file.with_name("config.json")
    if not config.is_file():
        return []
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(f"model.pretrained: {config} is not readable ({error}); copy or download it again.") from error
    name = described.get("architecture") if isinstance(described, dict) else None
    if not isinstance(name, str) or not timm.is_model(name):
        return []
    try:
        with torch.device("meta"):
            theirs = dict(timm.create_model(name, **described.get("model_args", {})).named_modules())
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise Damaged(
            f"model.pretrained: {config} does not describe a valid {name} ({first_line(error)}); download it again."
        ) from error
    ours = {name: module.num_heads for name, module in net.named_modules() if hasattr(module, "num_heads")}
    found = {name: getattr(theirs.get(name), "num_heads", asked) for name, asked in ours.items()}
    return [f"{name} has {found[name]} heads, not {ours[name]}" for name in ours if found[name] != ours[name]]


def _overlay(architecture: str, tensors: dict[str, Tensor]) -> dict:
    """Config overlay that makes timm load these tensors, with their number of classes."""
    published = timm.get_pretrained_cfg(architecture)
    classifier = (published.classifier if published else None) or "head"
    first = classifier if isinstance(classifier, str) else classifier[0]
    rows = tensors.get(f"{first}.weight")
    return {"state_dict": tensors, "num_classes": len(rows) if rows is not None else 0}


def _classifiers(net: nn.Module) -> tuple[str, ...]:
    names = net.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _free_modules(net: nn.Module) -> tuple[str, ...]:
    """Prefixes of modules that a file may lack: the classifiers and `task_modules`."""
    return tuple(f"{name}." for name in (*_classifiers(net), *getattr(net, "task_modules", ())))


@contextlib.contextmanager
def _checked_loads(kind: type[nn.Module], architecture: str, file: Path, is_published: bool) -> Iterator[list[tuple]]:
    """Checks what timm loads into networks of one class inside the context; timm only logs what it leaves random.

    Yields:
        a list with (state dict, tensors left random, tensors left out) for each load.
    """
    found: list[tuple] = []

    def load_state_dict(self: nn.Module, state: Mapping[str, Tensor], *args: object, **kwargs: object) -> object:
        own = self.state_dict()
        wrong, new, left_out = weights.misfits(own, dict(state), _free_modules(self))
        weights.refuse(wrong, str(file), architecture, is_published)
        weights.refuse_infinite({name: state[name] for name in own if name in state}, file)
        found.append((state, new, left_out))
        has_memory = next(self.parameters()).device.type != "meta"
        return original(self, state if has_memory else {}, strict=False)

    original, is_own = kind.load_state_dict, "load_state_dict" in vars(kind)
    kind.load_state_dict = load_state_dict
    try:
        yield found
    finally:
        if is_own:
            kind.load_state_dict = original
        else:
            del kind.load_state_dict
