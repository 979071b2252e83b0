"""transformers image classifiers: `hf:vit` builds one from its default configuration, `hf:ID` or `hf:FOLDER` reads one.

They return logits, as timm's models do, and keep transformers' parameter names.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_rsst.errors import OF_A_LIBRARY, InputError, MissingRequirement, first_line
from vit_rsst.models import weights

PREFIX = "hf:"
PLACE = "name_or_path"
"""Argument that holds the location of published weights; not a configuration field."""


def describe(name: str, args: dict, num_classes: int) -> tuple[str, dict]:
    """`hf:TYPE` and the fields of its configuration, complete enough to build the model without the source.

    Raises:
        InputError: transformers has no image classifier of that type, or rejects the arguments.
        MissingRequirement: the configuration is neither available locally nor on the Hub.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    source = name.removeprefix(PREFIX)
    fields = {**args, "num_labels": num_classes}
    try:
        if source in CONFIG_MAPPING:
            config, place = AutoConfig.for_model(source, **fields), {}
        else:
            folder = Path(source).expanduser()
            place = {PLACE: str(folder.resolve()) if folder.is_dir() else source}
            file = _config_file(source, folder)
            config = AutoConfig.from_pretrained(file, trust_remote_code=False, **fields)
    except (OSError, ValueError) as error:
        if source in CONFIG_MAPPING:
            raise InputError(f"model.args: {name} cannot be configured with {args}: {error}.") from error
        raise MissingRequirement(
            f"model.name: {source!r} is neither a type of transformers (such as hf:vit) nor a folder with a "
            f"config.json, and cannot be downloaded from the Hub ({first_line(error)})."
        ) from error
    except (TypeError, AttributeError) as error:
        raise InputError(f"model.args: {name} cannot be configured with {args}: {error}.") from error
    unknown = [key for key in args if not hasattr(type(config)(), key)]
    if unknown:
        raise InputError(f"model.args: {name} has no field {unknown[0]!r} in its configuration.")
    kept = {key: value for key, value in config.to_diff_dict().items() if key not in OF_A_FILE}
    return f"{PREFIX}{config.model_type}", {**kept, **_class_of(config), **place, "num_labels": num_classes}


OF_A_FILE = ("model_type", "architectures", "transformers_version", "id2label", "label2id")
"""Configuration fields that do not affect what is built."""


def _class_of(config: Any) -> dict[str, list[str]]:
    """The field that selects the class, for types with several classifiers: the named one, else the first."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type, "")
    if isinstance(classes, str):
        return {}
    named = [name for name in config.architectures or () if name in classes]
    return {"architectures": [*named, classes[0]][:1]}


def _config_file(source: str, folder: Path) -> Path:
    if folder.is_dir():
        return folder / "config.json"
    return weights.hub_file(source, "config.json", "model.name", "or a type of transformers, such as hf:vit")


def configuration(architecture: str, args: dict) -> Any:
    """transformers configuration of an architecture from `describe`."""
    from transformers import AutoConfig

    fields = {key: value for key, value in args.items() if key != PLACE}
    return AutoConfig.for_model(architecture.removeprefix(PREFIX), **fields)


def create(
    architecture: str,
    args: dict,
    pretrained: bool | str = False,
    device: str | None = None,
    classes: Sequence[str] = (),
) -> nn.Module:
    """Builds a classifier from `describe`; its forward pass returns logits.

    Args:
        pretrained: load weights from the location in the name, or from a file or folder; recorded in the network's
            attribute `loaded`.
        classes: of the data, by label; see `zoo.create`.

    Raises:
        InputError: transformers has no image classifier of that type, or cannot build it with these arguments.
        MissingRequirement: the weights are not available.
        Damaged: the file is damaged, or belongs to another model.
    """
    from transformers import AutoModelForImageClassification

    config = configuration(architecture, args)
    if pretrained:
        file = weights_file(architecture, args, pretrained)
        net = _with_weights(file, config, pretrained is True, tuple(classes))
    else:
        context = torch.device(device) if device else contextlib.nullcontext()
        try:
            with context:
                net = AutoModelForImageClassification.from_config(config)
        except OF_A_LIBRARY as error:
            raise InputError(f"model.args: {architecture} cannot be built: {first_line(error)}") from error
    net.pretrained_cfg = _ends(net)
    net.register_forward_hook(logits_of)
    return net


def logits_of(module: nn.Module, args: tuple, output: Any) -> Tensor:
    """Forward hook that unwraps the logits from a transformers output."""
    return getattr(output, "logits", output)


def weights_file(architecture: str, args: dict, pretrained: bool | str) -> Path:
    """Path of the weights that a recipe asks for.

    Raises:
        InputError: the model is named by type, which has no weights, or a tag is given, which only timm has.
        MissingRequirement: they are not available.
    """
    source = args.get(PLACE) if pretrained is True else pretrained
    if source is None:
        raise InputError(
            f"model.pretrained: {architecture} is a model type, which has no weights; name a repository or a folder."
        )
    if weights.is_path(source) and (pretrained is not True or Path(source).is_dir()):
        return weights.local_file(source)
    if pretrained is not True:
        raise InputError(
            f"model.pretrained: {pretrained!r} is not a file or folder, and only timm models have tags; name a "
            "transformers repository in model.name, as hf:OWNER/NAME."
        )
    return weights.hub_file(source, weights.FILE)


def _with_weights(file: Path, config: Any, is_published: bool, classes: tuple[str, ...]) -> nn.Module:
    """The classifier with the weights of a file; transformers maps the names."""
    from transformers import AutoModelForImageClassification

    tensors, sha256 = weights.read(file)
    with torch.device("meta"):
        empty = AutoModelForImageClassification.from_config(config)
    kind, names = type(empty), _ends(empty)["classifier"]
    classifiers = tuple(f"{name}." for name in names)
    known = weights.Classes(weights.class_names(file.with_name("config.json")), classes)
    num_theirs = next((len(t) for n, t in tensors.items() if n.startswith(classifiers)), 0)
    dropped = tuple(n for n in tensors if known.rows is None and n.startswith(classifiers))
    with quiet():
        net, report = kind.from_pretrained(
            None, config=config, state_dict={n: t for n, t in tensors.items() if n not in dropped},
            output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32,
        )  # fmt: skip
    others = {name: (theirs, ours) for name, theirs, ours in report["mismatched_keys"]}
    wrong = [f"no {n}" for n in sorted(report["missing_keys"]) if not n.startswith(classifiers)]
    wrong += [f"extra {n}" for n in sorted(report["unexpected_keys"]) if not n.startswith(classifiers)]
    wrong += [
        f"{n} has shape {tuple(o[0])}, not {tuple(o[1])}" for n, o in others.items() if not n.startswith(classifiers)
    ]
    weights.refuse(wrong, str(file), config.model_type, is_published)
    weights.refuse_infinite(net.state_dict(), file)
    if known.rows and num_theirs == config.num_labels:
        weights.reorder_(net, names, known.rows)
    new = tuple(sorted({*report["missing_keys"], *others}))
    left_out = tuple(sorted({*report["unexpected_keys"], *others, *dropped}))
    num_loaded, text = len(net.state_dict()) - len(new), known.text(num_theirs, config.num_labels)
    net.loaded = weights.Loaded(str(file), sha256, num_loaded, (), new, left_out, text)
    return net


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and load reports; this package reports them itself."""
    from transformers.utils import logging

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _ends(net: nn.Module) -> dict[str, str | tuple[str, ...]]:
    """Names of the first layer and of the classifiers, in the form of timm's `pretrained_cfg`.

    Distilled models have a second classifier; all are outside of transformers' base model.
    """
    linear = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    body = f"{net.base_model_prefix}."
    last = [n for n, m in linear.items() if not n.startswith(body) and m.out_features == net.config.num_labels]
    return {"first_conv": convs[0] if convs else "", "classifier": tuple(last) or (list(linear)[-1],)}
