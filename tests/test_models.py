"""Models: sizes and costs of the catalogue, and which weights are prunable."""

import pytest
import timm
import tiny
import torch

from vit_rsst.errors import InputError
from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_weights
from vit_rsst.models.catalog import CATALOG, stock
from vit_rsst.models.complexity import flops, size_of


def vit(width: int, depth: int, hidden: int, px: int, patch: int, classes: int) -> tuple[int, int]:
    """(parameters, prunable ones) of a plain ViT: patches, positions and class token, blocks, norm and classifier."""
    tokens, area = (px // patch) ** 2 + 1, 3 * patch**2
    weights = depth * (4 * width**2 + 2 * width * hidden)
    vectors = depth * (3 * width + width + hidden + width + 4 * width)  # biases of the four matrices, two norms
    ends = (area + 1) * width + (tokens + 1) * width + 2 * width + (width + 1) * classes
    return weights + vectors + ends, weights


def predictor(width: int) -> int:
    shapes = [(width, width), (width, width // 2), (width // 2, width // 4), (width // 4, 2)]
    return 2 * width + sum((a + 1) * b for a, b in shapes)


def gated(depth: int, classes: int) -> tuple[int, int]:
    """Width 192 with gated MLPs of 512."""
    weights = depth * (4 * 192**2 + 3 * 192 * 512)
    ends = 2 * 768 + 769 * 192 + 2 * 192 + 198 * 192 + 2 * 2 * 192 + 193 * classes
    return weights + depth * (192 + 4 * 192) + ends, weights


PLAIN = {
    "vit_tiny": (192, 9, 384, 32, 4),
    "vit_small": (384, 12, 1536, 32, 4),
    "vit_base": (768, 12, 3072, 32, 4),
    "vit_small_imagenet": (384, 12, 1536, 224, 16),
    "vit_base_imagenet": (768, 12, 3072, 224, 16),
    "vit_large_imagenet": (1024, 24, 4096, 224, 16),
    "cifar_vit_small": (384, 6, 1536, 32, 4),
    "cifar_vit_base": (512, 6, 2048, 32, 4),
    "vit_p8_tiny": (128, 4, 512, 32, 8),
    "vit_p8_small": (256, 6, 1024, 32, 8),
    "vit_p8_base": (512, 6, 2048, 32, 8),
}
"""Width, depth, hidden neurons, px of the images and of a patch: the published shapes."""


def expected_sizes(name: str, classes: int) -> tuple[int, int]:
    """(parameters, prunable ones), by formula."""
    if name in PLAIN:
        return vit(*PLAIN[name], classes)
    parameters, weights = vit(*PLAIN["cifar_vit_base"], classes)
    return {
        "dynamic_vit": (parameters + 3 * predictor(512), weights),
        "lightweight_vit": (parameters + 6 * 2 * 32 * 65, weights),
        "vit_t16": gated(6, classes),
        "vit_m16": gated(12, classes),
        # 6 · 16² · 9 + 16 · 32 · 9 + 5 · 32² · 9 + 32 · 64 · 9 + 5 · 64² · 9
        "resnet20": (269_722 + 65 * (classes - 10), 267_264),
    }[name]


PUBLISHED = {
    ("vit_tiny", 10): 2_697_610,
    ("vit_tiny", 100): 2_714_980,
    ("vit_small", 10): 21_342_346,
    ("vit_small", 100): 21_376_996,
    ("vit_base", 10): 85_152_010,
    ("vit_base", 100): 85_221_220,
    ("vit_t16", 1000): 3_041_320,
    ("vit_m16", 1000): 5_701_288,
}
"""(model, classes) → the exact number of parameters that is given for it."""


def on_meta(name: str, num_classes: int = 10, **args: object) -> torch.nn.Module:
    return zoo.create(*zoo.describe(name, args, num_classes), device="meta")


def count(tensors: object) -> int:
    return sum(t.numel() for t in tensors)


# -- the catalogue


@pytest.mark.parametrize("name", CATALOG)
def test_a_catalogue_model_has_the_parameter_count_of_its_shape(name):
    net = on_meta(name, 100)
    weights = prunable_weights(net)
    assert (count(net.parameters()), count(weights.values())) == expected_sizes(name, 100)
    mlp = ("fc1_g", "fc1_x") if name in ("vit_t16", "vit_m16") else ("fc1",)
    kinds = (
        ("conv1", "conv2") if name == "resnet20" else ("attn.qkv", "attn.proj", *(f"mlp.{k}" for k in (*mlp, "fc2")))
    )
    assert list(weights) == [f"blocks.{b}.{kind}.weight" for b in range(len(net.blocks)) for kind in kinds]


@pytest.mark.parametrize(("name", "classes"), PUBLISHED)
def test_a_model_has_exactly_the_published_parameter_count(name, classes):
    assert count(on_meta(name, classes).parameters()) == PUBLISHED[name, classes]


@pytest.mark.parametrize("name", CATALOG)
def test_a_catalogue_model_returns_logits_for_its_image_size(name):
    net = on_meta(name, num_classes=100)
    size = 224 if name.endswith(("imagenet", "16")) else 32
    assert size_of(net) == size
    assert net(torch.empty(2, 3, size, size, device="meta")).shape == (2, 100)


@pytest.mark.parametrize("name", PLAIN)
def test_the_flops_of_a_plain_vit_match_the_formula(name):
    width, depth, hidden, px, patch = PLAIN[name]
    tokens = (px // patch) ** 2 + 1
    block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens**2 * width
    macs = (tokens - 1) * width * 3 * patch**2 + depth * block + width * 10
    assert flops(on_meta(name), px) == 2 * macs


@pytest.mark.parametrize("name", CATALOG)
def test_catalogue_names_are_registered_with_timm(name):
    assert timm.is_model(name)
    with torch.device("meta"):
        from_timm = timm.create_model(name, num_classes=10)
    expected = {k: v.shape for k, v in on_meta(name).state_dict().items()}
    assert {k: v.shape for k, v in from_timm.state_dict().items()} == expected


@pytest.mark.parametrize("name", [name for name in CATALOG if CATALOG[name].is_stock])
def test_a_catalogue_model_is_described_as_a_stock_model_of_timm(name):
    architecture, args = zoo.describe(name, {"drop_path_rate": 0.1}, 10)
    assert architecture not in CATALOG
    assert args["drop_path_rate"] == 0.1
    assert args["num_classes"] == 10
    with torch.device("meta"):
        plain = timm.create_model(architecture, **args)
    assert count(plain.parameters()) == expected_sizes(name, 10)[0]


def test_the_command_lists_every_model_with_its_parameters_and_flops(capsys):
    assert tiny.command("models") == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    for name in CATALOG:
        assert lines[name][1] == f"{expected_sizes(name, 10)[0]:,}"
    assert lines["vit_tiny"][3] == "375"
    assert lines["resnet20"][3:6] == ["81", "32", "none"]


def test_recipe_arguments_override_the_catalogue():
    net = on_meta("vit_tiny", **tiny.MODEL_ARGS)
    assert count(prunable_weights(net).values()) == tiny.NUM_PRUNABLE
    assert (len(net.blocks), net.embed_dim) == (1, 24)
    assert CATALOG["vit_tiny"].args["depth"] == 9


def test_two_models_of_one_seed_are_equal():
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(zoo.create(*zoo.describe("vit_tiny", tiny.MODEL_ARGS, 10)).state_dict())
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])
    assert not all(torch.equal(nets[0][k], nets[2][k]) for k in nets[0])


# -- any model of timm


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "resnet18", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"]
)
def test_any_name_of_timm_is_a_model(name):
    net = on_meta(name)
    assert stock(name).architecture == name
    assert net.get_classifier().out_features == 10
    prunable = count(prunable_weights(net).values())
    assert 0.5 < prunable / count(net.parameters()) < 1


def test_an_unknown_name_suggests_close_matches():
    with pytest.raises(InputError, match=", ".join(CATALOG) + " or a model of timm") as caught:
        on_meta("vit_tinny")
    assert "Did you mean 'vit_tiny'" in str(caught.value)


def test_unsupported_arguments_are_an_error():
    with pytest.raises(InputError, match=r"model\.args.*no_such_argument"):
        on_meta("vit_tiny", no_such_argument=1)


@pytest.mark.parametrize(
    "args", [{"embed_dim": 25}, {"num_heads": 5}, {"img_size": "large"}, {"depth": -1}, {"depth": "2"}]
)
def test_invalid_arguments_are_an_error_without_traceback(args):
    with pytest.raises(InputError, match="model"):
        on_meta("vit_tiny", **args)


# -- what can be pruned


def names(net: torch.nn.Module, **globs: object) -> set[str]:
    return set(prunable_weights(net, **globs))


def test_first_layer_and_classifier_are_pruned_when_they_are_included():
    net = on_meta("vit_tiny", **tiny.MODEL_ARGS)
    base = {f"blocks.0.{kind}.weight" for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert names(net) == base
    assert names(net, include=["patch_embed.*"]) == base | {"patch_embed.proj.weight"}
    assert names(net, include=["head.*"]) == base | {"head.weight"}
    assert names(net, include=["*"]) == base | {"patch_embed.proj.weight", "head.weight"}


def test_protect_takes_precedence_over_include():
    net = on_meta("vit_tiny", **tiny.MODEL_ARGS | {"depth": 3})
    assert len(names(net)) == 12
    assert names(net, protect=["blocks.0.*"]) == {n for n in names(net) if not n.startswith("blocks.0.")}
    assert names(net, protect=["*.fc[12].weight"]) == {n for n in names(net) if "attn" in n}
    assert "head.weight" not in names(net, include=["head.*"], protect=["head.weight"])


def test_globs_are_case_sensitive_and_match_the_whole_name():
    net = on_meta("vit_tiny", **tiny.MODEL_ARGS)
    for glob in ("Blocks.*", "blocks.0", "qkv"):
        with pytest.raises(InputError, match="matches no prunable weight"):
            names(net, protect=[glob])


def test_a_glob_that_matches_nothing_is_an_error_with_examples():
    net = on_meta("vit_tiny", **tiny.MODEL_ARGS)
    with pytest.raises(InputError, match=r"pruning\.include: 'pos_embed' matches no.*blocks\.0\.attn\.qkv"):
        names(net, include=["pos_embed"])
    with pytest.raises(InputError, match=r"pruning\.protect: 'norm\.weight' matches no prunable weight"):
        names(net, protect=["norm.weight"])


def test_nothing_left_to_prune_is_an_error():
    with pytest.raises(InputError, match="no prunable weight is left"):
        names(on_meta("vit_tiny", **tiny.MODEL_ARGS), protect=["blocks.*"])


def test_in_a_resnet_everything_but_first_convolution_and_classifier_is_prunable():
    net = on_meta("resnet18")
    convolutions = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert "conv1.weight" in convolutions
    assert len(convolutions) == 20
    assert names(net) == convolutions - {"conv1.weight"}
    assert names(net, include=["fc.weight"]) == names(net) | {"fc.weight"}


def test_both_classifiers_of_a_distilled_model_are_not_prunable():
    net = on_meta("deit_tiny_distilled_patch16_224")
    assert {"head.weight", "head_dist.weight", "patch_embed.proj.weight"} <= set(net.state_dict())
    assert not any(not name.startswith("blocks.") for name in names(net))


def test_the_weights_are_those_of_the_model_itself():
    net = zoo.create(*zoo.describe("vit_tiny", tiny.MODEL_ARGS, 10))
    parameters = dict(net.named_parameters())
    assert all(parameters[name] is weight for name, weight in prunable_weights(net).items())
