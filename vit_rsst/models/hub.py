"""Image classifiers of transformers: `hf:vit` builds one from a configuration, `hf:ID` or `hf:FOLDER` reads it there.

They answer with logits, as timm's models do, and keep transformers' own parameter names.
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
"""Key of the arguments that says where published weights lie; the configuration itself does not hold it."""


def describe(name: str, args: dict, num_classes: int) -> tuple[str, dict]:
    """`hf:TYPE` and the fields of its configuration, complete enough to build the model without the source.

    Raises:
        InputError: transformers has no image classifier of that type, or does not take the arguments.
        MissingRequirement: the configuration can be neither found here nor had from the Hub.
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
"""Fields of a configuration that do not say what to build."""


def _class_of(config: Any) -> dict[str, list[str]]:
    """The field that says which class to build, of types that have several classifiers: as named, else the first."""
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
    """transformers' configuration of what `describe` gave."""
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
    """Builds the classifier that `describe` described; its forward pass gives logits.

    Args:
        pretrained: load the weights of the place that the name gives, or of a file or folder; what was loaded is then
            the attribute `loaded`.
        classes: of the data, by label; see `zoo.create`.

    Raises:
        InputError: transformers has no image classifier of that type, or it cannot be built so.
        MissingRequirement: the weights cannot be had.
        Damaged: the file is damaged, or of another model.
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
    """Forward hook: the logits of transformers' output."""
    return getattr(output, "logits", output)


def weights_file(architecture: str, args: dict, pretrained: bool | str) -> Path:
    """Where the weights that a recipe asks for lie.

    Raises:
        InputError: the model was named by its type, which has no weights, or a tag is asked for, which is timm's.
        MissingRequirement: they cannot be had.
    """
    source = args.get(PLACE) if pretrained is True else pretrained
    if source is None:
        raise InputError(
            f"model.pretrained: {architecture} is a type, which has no weights; name a repository or a folder."
        )
    if weights.is_path(source) and (pretrained is not True or Path(source).is_dir()):
        return weights.local_file(source)
    if pretrained is not True:
        raise InputError(
            f"model.pretrained: {pretrained!r} is not a file or folder, and only timm models have tags; name a "
            "repository of transformers in model.name, as hf:OWNER/NAME."
        )
    return weights.hub_file(source, weights.FILE)


def _with_weights(file: Path, config: Any, is_published: bool, classes: tuple[str, ...]) -> nn.Module:
    """The classifier with the weights of a file, under whichever of transformers' names they have there."""
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
    wrong += [f"{n} of {tuple(o[0])}, not {tuple(o[1])}" for n, o in others.items() if not n.startswith(classifiers)]
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
    """No progress bars and no reports of transformers; what they say is said here."""
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
    """Names of the first layer and of the classifiers, as timm's `pretrained_cfg` has them.

    Models that learn from a teacher have a second classifier; all lie outside of transformers' base model.
    """
    linear = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    body = f"{net.base_model_prefix}."
    last = [n for n, m in linear.items() if not n.startswith(body) and m.out_features == net.config.num_labels]
    return {"first_conv": convs[0] if convs else "", "classifier": tuple(last) or (list(linear)[-1],)}
