"""transformers: a folder that AutoModelForImageClassification and AutoImageProcessor load, without this package.

transformers models are saved as they are; a plain timm ViT becomes a ViTForImageClassification, tensor by tensor.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image
from torch import Tensor, nn

from vit_rsst import files
from vit_rsst.data.decoding import resized_side
from vit_rsst.errors import InputError
from vit_rsst.export.work import Target, Work
from vit_rsst.models import hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USAGE = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(".").eval()  # "." is this folder
processor = AutoImageProcessor.from_pretrained(".")
image = Image.open("image.png").convert("RGB")
with torch.no_grad():
    probabilities = model(**processor(image, return_tensors="pt")).logits.softmax(1)[0]
print(model.config.id2label[int(probabilities.argmax())], float(probabilities.max()))
"""

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}
"""timm activation class → its name in transformers."""


def check(work: Work) -> None:
    """Raises:
    InputError: transformers has no equivalent of this model, with the reason.
    """
    if what := work.lacks_stock:
        raise InputError(f"--to transformers: transformers has no model of {what}; use --to slim, onnx or dense.")
    if not work.is_hub and (reason := next(_obstacles(work.net), None)):
        raise InputError(
            f"--to transformers: {work.architecture} has no equivalent in transformers: {reason}; use --to timm."
        )


def write(work: Work, folder: Path) -> None:
    """Model, configuration and image processor, in transformers' own files."""
    from transformers import ViTImageProcessor

    trained, classes, size = work.trained, work.trained.classes, work.trained.data.size
    net = cast("PreTrainedModel", work.net) if work.is_hub else converted(work.net)
    net.config.id2label = dict(enumerate(classes))
    net.config.label2id = {name: number for number, name in enumerate(classes)}
    with hub.quiet():
        net.save_pretrained(folder)
    processor = ViTImageProcessor(
        # The run's preprocessing: shorter side resized, centre cropped.
        do_resize=True,
        size={"shortest_edge": resized_side(size, trained.data.crop_share)},
        resample=Image.Resampling[trained.data.resampling.upper()],
        do_center_crop=True,
        crop_size={"height": size, "width": size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(trained.mean),
        image_std=list(trained.std),
    )
    processor.save_pretrained(folder)
    for path in folder.iterdir():
        files.settle(path)


@torch.no_grad()
def logits(folder: Path, images: Tensor) -> Tensor:
    """Logits of the folder, loaded as a user would."""
    from transformers import AutoModelForImageClassification

    with hub.quiet():
        net = AutoModelForImageClassification.from_pretrained(folder)
    return net.eval()(images).logits


def converted(net: nn.Module) -> "PreTrainedModel":
    """Converts a plain timm ViT to transformers' ViTForImageClassification.

    Raises:
        InputError: the model has no equivalent.
    """
    from transformers import ViTConfig, ViTForImageClassification

    if reason := next(_obstacles(net), None):
        raise InputError(f"--to transformers: this model has no equivalent in transformers: {reason}; use --to timm.")
    block, patch = net.blocks[0], net.patch_embed
    config = ViTConfig(
        hidden_size=net.embed_dim,
        num_hidden_layers=len(net.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act=ACTIVATIONS[type(block.mlp.act).__name__],
        layer_norm_eps=net.norm.eps,
        image_size=patch.img_size[0],
        patch_size=patch.patch_size[0],
        num_channels=patch.proj.in_channels,
        qkv_bias=block.attn.qkv.bias is not None,
    )
    config.num_labels = net.num_classes
    twin = ViTForImageClassification(config).to(net.head.weight.dtype)
    twin.load_state_dict(dict(_renamed(net.state_dict())))
    return twin.eval()


def _obstacles(net: nn.Module) -> Iterator[str]:
    """Reasons why transformers' ViT is not equivalent to this network; none if it is."""
    if type(net).__name__ != "VisionTransformer" or not hasattr(net, "blocks"):
        yield f"it is a {type(net).__name__}"
        return
    if not net.has_class_token or net.global_pool != "token":
        yield f"it pools with {net.global_pool!r}, not with a class token"
    if len(set(net.patch_embed.img_size)) != 1 or len(set(net.patch_embed.patch_size)) != 1:
        yield "its images or patches are not square"
    expected, found = _expected_names(net), set(net.state_dict())
    if strange := sorted(found - expected):
        yield f"it has an extra {strange[0]}"
    if missing := sorted(name for name in expected - found if not name.endswith("qkv.bias")):
        yield f"it has no {missing[0]}"
    if net.pos_embed is not None and net.pos_embed.shape[1] != net.patch_embed.num_patches + 1:
        yield "its class token has no position embedding"
    norms = {(type(m).__name__, m.eps) for m in net.modules() if isinstance(m, nn.LayerNorm)}
    if len(norms) != 1:
        yield f"its norms differ: {sorted(norms)}"
    if (act := type(net.blocks[0].mlp.act).__name__) not in ACTIVATIONS:
        yield f"its activation is {act}"


BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Layer of timm's block → layer of transformers'; qkv is split as well."""

OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
}
"""Tensor of timm's ViT outside of its blocks → tensor of transformers'."""


def _expected_names(net: nn.Module) -> set[str]:
    layers = (*BLOCK, "attn.qkv")
    parts = {f"blocks.{i}.{layer}.{p}" for i in range(len(net.blocks)) for layer in layers for p in ("weight", "bias")}
    return parts | set(OUTSIDE)


def _renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """timm's state dict with transformers' names; qkv, (3 · width, …), is split in three."""
    for name, tensor in state.items():
        if name in OUTSIDE:
            yield OUTSIDE[name], tensor
            continue
        _, number, rest = name.split(".", 2)
        layer, _, leaf = rest.rpartition(".")
        place = f"vit.layers.{number}"
        if layer == "attn.qkv":
            for key, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{place}.attention.{key}_proj.{leaf}", part
        else:
            yield f"{place}.{BLOCK[layer]}.{leaf}", tensor


TARGET = Target("transformers", check, write, logits, lambda work: USAGE)
