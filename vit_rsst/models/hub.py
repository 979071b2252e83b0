"""Image classifiers of transformers: `hf:vit` builds one from a configuration, `hf:ID` or `hf:FOLDER` reads it there.

They answer with logits, as timm's models do, and keep transformers' own parameter names.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_rsst import reach
from vit_rsst.errors import EnvironmentLacks, InputError

PREFIX = "hf:"
PLACE = "name_or_path"
"""Key of the arguments that says where published weights lie; the configuration itself does not hold it."""


def describe(name: str, args: dict, num_classes: int) -> tuple[str, dict]:
    """`hf:TYPE` and the fields of its configuration, complete enough to build the model without the source.

    Raises:
        InputError: transformers has no image classifier of that type, or does not take the arguments.
        EnvironmentLacks: the configuration can be neither found here nor had from the Hub.
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
            if not folder.is_dir():
                reach.prefer_cache()
            config = AutoConfig.from_pretrained(place[PLACE], trust_remote_code=False, **fields)
    except (OSError, ValueError) as error:
        if source in CONFIG_MAPPING:
            raise InputError(f"model.args: {name} cannot be configured with {args}: {error}.") from error
        raise EnvironmentLacks(
            f"model.name: {source!r} is neither a type of transformers (such as hf:vit), nor a folder with a "
            f"config.json, nor to be had from the Hub ({_first_line(error)})."
        ) from error
    except (TypeError, AttributeError) as error:
        raise InputError(f"model.args: {name} cannot be configured with {args}: {error}.") from error
    unknown = [key for key in args if not hasattr(type(config)(), key)]
    if unknown:
        raise InputError(f"model.args: {name} has no field {unknown[0]!r} in its configuration.")
    kept = {key: value for key, value in config.to_diff_dict().items() if key not in ("model_type", "architectures")}
    kept = {key: value for key, value in kept.items() if key not in ("transformers_version", "id2label", "label2id")}
    return f"{PREFIX}{config.model_type}", {**kept, **place, "num_labels": num_classes}


def configuration(architecture: str, args: dict) -> Any:
    """transformers' configuration of what `describe` gave."""
    from transformers import AutoConfig

    fields = {key: value for key, value in args.items() if key != PLACE}
    return AutoConfig.for_model(architecture.removeprefix(PREFIX), **fields)


def create(architecture: str, args: dict, pretrained: bool = False, device: str | None = None) -> nn.Module:
    """Builds the classifier that `describe` described; its forward pass gives logits.

    Raises:
        InputError: transformers has no image classifier of that type, or it cannot be built so.
        EnvironmentLacks: the weights cannot be had.
    """
    from transformers import AutoModelForImageClassification

    config = configuration(architecture, args)
    if pretrained:
        if PLACE not in args:
            raise InputError(
                f"model.pretrained: {architecture} names a type, which has no weights; name a repository or a folder."
            )
        net = _with_weights(args[PLACE], config)
    else:
        context = torch.device(device) if device else contextlib.nullcontext()
        try:
            with context:
                net = AutoModelForImageClassification.from_config(config)
        except (ValueError, TypeError, AssertionError) as error:
            raise InputError(f"model.args: {architecture} cannot be built: {_first_line(error)}") from error
    net.pretrained_cfg = _ends(net)
    net.register_forward_hook(logits_of)
    return net


def logits_of(module: nn.Module, args: tuple, output: Any) -> Tensor:
    """Forward hook: the logits of transformers' output."""
    return getattr(output, "logits", output)


def _with_weights(place: str, config: Any) -> nn.Module:
    from transformers import AutoModelForImageClassification

    try:
        net, report = AutoModelForImageClassification.from_pretrained(
            place,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,  # pickles are never read
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentLacks(
            f"model.pretrained: the weights of {place!r} could not be loaded ({_first_line(error)}). Check the network "
            "or the folder, or set model.pretrained=false to train from random weights."
        ) from error
    replaced = [key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]]
    lost = [*report["missing_keys"], *report["unexpected_keys"], *replaced]
    wrong = [key for key in lost if not key.startswith(("classifier.", "head."))]
    if wrong:
        raise InputError(
            f"model.pretrained: the weights of {place} do not fit this network in {len(wrong)} places "
            f"({', '.join(wrong[:5])}); leave out model.args, or set model.pretrained=false."
        )
    return net


def _ends(net: nn.Module) -> dict[str, str]:
    """Names of the first layer and the classifier, as timm's `pretrained_cfg` has them."""
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    return {"first_conv": convs[0] if convs else "", "classifier": linear[-1]}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
