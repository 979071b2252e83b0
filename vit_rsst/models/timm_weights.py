"""Weights for models of timm: where they lie, and that they are loaded whole.

timm itself adapts them to the network that it builds: it resamples patch and position embeddings, renames old tensors
and drops the classifier where the classes differ. What it would leave random beside that, with a line in a log, is
refused.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from vit_rsst.errors import Damaged, InputError, first_line
from vit_rsst.models import weights


def load(build: Callable[..., nn.Module], architecture: str, pretrained: bool | str) -> nn.Module:
    """Builds a network with weights: the published ones, those of a tag of timm's, or those of a file or folder.

    Args:
        build: `timm.create_model` of the architecture, to which arguments can be added.

    Raises:
        InputError: timm has no weights for this model, or no such tag, or they are of another width or depth.
        MissingRequirement: they cannot be had.
        Damaged: the file is damaged, or of another model.
    """
    file, is_published = weights_file(architecture, pretrained), not weights.is_path(pretrained)
    tensors, sha256 = weights.read(file)
    with _checked_loads(architecture, file, is_published) as found:
        net = build(pretrained=True, pretrained_cfg_overlay=_overlay(architecture, tensors))
    weights.refuse(_other_heads(net, file), str(file), architecture, is_published)
    [(given, new, left_out)] = found
    changed = tuple(name for name in sorted(given) if name in tensors and given[name].shape != tensors[name].shape)
    lost = tuple(name for name in sorted(tensors) if name.startswith(_free_modules(net)) and name not in given)
    net.loaded = weights.Loaded(str(file), sha256, len(given) - len(left_out), changed, new, left_out + lost)
    return net


def weights_file(architecture: str, pretrained: bool | str) -> Path:
    """Where the weights that a recipe asks for lie: a local file, or timm's on the Hub, fetched into the cache.

    Raises:
        InputError: timm has no weights for this model, or no such tag.
        MissingRequirement: they cannot be had.
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
            f"model.pretrained: {name} is not published as safetensors, the only format that is read; name another "
            f"tag, {weights.OTHERWISE}."
        )
    return weights.hub_file(published.hf_hub_id, file)


def _other_heads(net: nn.Module, file: Path) -> list[str]:
    """Attention of other heads in the model that a `config.json` beside the file describes, which no shape shows."""
    config = file.with_name("config.json")
    if not config.is_file():
        return []
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(f"model.pretrained: {config} is not readable ({error}); copy or fetch it again.") from error
    name = described.get("architecture") if isinstance(described, dict) else None
    if not isinstance(name, str) or not timm.is_model(name):
        return []
    try:
        with torch.device("meta"):
            theirs = dict(timm.create_model(name, **described.get("model_args", {})).named_modules())
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise Damaged(
            f"model.pretrained: {config} describes no {name} ({first_line(error)}); fetch it again."
        ) from error
    ours = {name: module.num_heads for name, module in net.named_modules() if hasattr(module, "num_heads")}
    found = {name: getattr(theirs.get(name), "num_heads", asked) for name, asked in ours.items()}
    return [f"{name} of {found[name]} heads, not {ours[name]}" for name in ours if found[name] != ours[name]]


def _overlay(architecture: str, tensors: dict[str, Tensor]) -> dict:
    """What tells timm to load these tensors, and of how many classes they are."""
    published = timm.get_pretrained_cfg(architecture)
    classifier = (published.classifier if published else None) or "head"
    first = classifier if isinstance(classifier, str) else classifier[0]
    rows = tensors.get(f"{first}.weight")
    return {"state_dict": tensors, "num_classes": len(rows) if rows is not None else 0}


def _free_modules(net: nn.Module) -> tuple[str, ...]:
    """Prefixes of what weights from elsewhere need not give: the classifier, and what decides beside it."""
    classifier = net.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in (*names, *getattr(net, "task_modules", ())))


@contextlib.contextmanager
def _checked_loads(architecture: str, file: Path | None, is_published: bool) -> Iterator[list[tuple]]:
    """Looks at every state dict that timm would load meanwhile, which by itself only logs what it leaves random.

    Yields:
        a list of (state dict, what stays random, what is left out), one for each.
    """
    found, original = [], nn.Module.load_state_dict

    def load_state_dict(self: nn.Module, state: Mapping[str, Tensor], *args: object, **kwargs: object) -> object:
        own = self.state_dict()
        wrong, new, left_out = weights.misfits(own, dict(state), _free_modules(self))
        weights.refuse(wrong, str(file), architecture, is_published)
        weights.refuse_infinite({name: state[name] for name in own if name in state}, file)
        found.append((state, new, left_out))
        has_memory = next(self.parameters()).device.type != "meta"
        return original(self, state if has_memory else {}, strict=False)

    nn.Module.load_state_dict = load_state_dict
    try:
        yield found
    finally:
        nn.Module.load_state_dict = original
