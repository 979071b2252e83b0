"""Models: the catalogue's sizes, what is prunable, and that asked weights are loaded or refused, never replaced."""

from unittest import mock

import huggingface_hub.constants
import pytest
import timm
import tiny
import torch

from vit_rsst.errors import EnvironmentLacks, InputError
from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_weights
from vit_rsst.models.catalog import CATALOG, stock

SIZES = {
    "vit_tiny": (2_697_610, 2_654_208, 9),
    "vit_small": (21_342_346, 21_233_664, 12),
    "vit_base": (85_152_010, 84_934_656, 12),
    "resnet20": (269_722, 267_264, 9),  # 6 · 16² · 9 + 16 · 32 · 9 + 5 · 32² · 9 + 32 · 64 · 9 + 5 · 64² · 9
}


def on_meta(name: str, num_classes: int = 10, **args: object) -> torch.nn.Module:
    return zoo.create(*zoo.describe(name, args, num_classes), device="meta")


def count(tensors: object) -> int:
    return sum(t.numel() for t in tensors)


# -- the catalogue


@pytest.mark.parametrize("name", SIZES)
def test_a_catalogue_model_has_the_published_number_of_parameters(name):
    parameters, prunable, depth = SIZES[name]
    net = on_meta(name)
    weights = prunable_weights(net)
    assert count(net.parameters()) == parameters
    assert count(weights.values()) == prunable
    kinds = ("conv1", "conv2") if name == "resnet20" else ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(weights) == [f"blocks.{b}.{kind}.weight" for b in range(depth) for kind in kinds]


def test_every_catalogue_model_is_counted_here():
    assert set(SIZES) == set(CATALOG)


@pytest.mark.parametrize("name", SIZES)
def test_a_catalogue_model_gives_logits_of_cifar_images(name):
    net = on_meta(name, num_classes=100)
    assert net(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 100)


@pytest.mark.parametrize("name", SIZES)
def test_a_catalogue_name_is_one_of_timms(name):
    assert timm.is_model(name)
    with torch.device("meta"):
        from_timm = timm.create_model(name, num_classes=10)
    expected = {k: v.shape for k, v in on_meta(name).state_dict().items()}
    assert {k: v.shape for k, v in from_timm.state_dict().items()} == expected


@pytest.mark.parametrize("name", [name for name in SIZES if CATALOG[name].is_stock])
def test_a_catalogue_model_is_described_as_a_stock_model_of_timm(name):
    architecture, args = zoo.describe(name, {"drop_path_rate": 0.1}, 10)
    assert architecture not in CATALOG
    assert args["drop_path_rate"] == 0.1
    assert args["num_classes"] == 10
    with torch.device("meta"):
        plain = timm.create_model(architecture, **args)
    assert count(plain.parameters()) == SIZES[name][0]


def test_arguments_of_the_recipe_win_over_those_of_the_catalogue():
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


def test_a_name_that_nobody_knows_suggests_near_ones():
    with pytest.raises(InputError, match="vit_tiny, vit_small, vit_base, resnet20 or a name of timm") as caught:
        on_meta("vit_tinny")
    assert "Did you mean 'vit_tiny'" in str(caught.value)


def test_arguments_that_a_model_does_not_take_are_an_error():
    with pytest.raises(InputError, match=r"model\.args.*no_such_argument"):
        on_meta("vit_tiny", no_such_argument=1)


@pytest.mark.parametrize(
    "args", [{"embed_dim": 25}, {"num_heads": 5}, {"img_size": "large"}, {"depth": -1}, {"depth": "2"}]
)
def test_arguments_that_make_no_model_are_an_error_and_no_traceback(args):
    with pytest.raises(InputError, match="model"):
        on_meta("vit_tiny", **args)


# -- pretrained


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_weights_that_cannot_be_fetched_are_an_error_and_no_random_start(offline):
    with pytest.raises(EnvironmentLacks, match=r"model\.pretrained.*model\.pretrained=false") as caught:
        zoo.create(*zoo.describe("vit_small", {}, 10), pretrained=True)
    assert caught.value.exit_code == 3


def test_the_command_ends_with_3_when_weights_cannot_be_fetched(offline, tmp_path, capsys):
    recipe = tiny.write_recipe(tmp_path, "name: tiny\nmodel: {name: vit_small, pretrained: true}\n")
    assert tiny.command("train", recipe) == 3
    assert "model.pretrained" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small_patch16_224.no_such_tag"])
def test_a_model_without_published_weights_is_refused(name):
    with pytest.raises(InputError, match=r"model\.pretrained"):
        zoo.create(name, {"num_classes": 10}, pretrained=True)


def test_every_timm_model_without_weights_is_refused():
    without = [name for name in timm.list_models() if not timm.is_model_pretrained(name)]
    assert len(without) > 20
    for name in without:
        with (
            mock.patch.object(timm, "create_model", side_effect=AssertionError("built")),
            pytest.raises(InputError, match=r"model\.pretrained"),
        ):
            zoo.create(name, {}, pretrained=True)


def test_vit_tiny_has_no_weights_by_timms_own_door_either():
    with pytest.raises(ValueError, match="no published weights"):
        timm.create_model("vit_tiny", pretrained=True)


def test_the_catalogue_says_truly_whether_weights_exist():
    for name, model in CATALOG.items():
        if model.has_weights:
            assert timm.is_model_pretrained(model.architecture), name


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A state dict as the Hub would hand it out: 224 px, patch 16, 1000 classes."""
    return zoo.create("vit_small_patch16_224", {}).state_dict()


def test_published_weights_reach_every_block(published):
    with mock.patch("timm.models._builder.load_state_dict_from_hf", return_value=dict(published)) as fetch:
        net = zoo.create(*zoo.describe("vit_small", {}, 10), pretrained=True)
    assert fetch.called
    weights = prunable_weights(net)
    assert len(weights) == 48
    for name, weight in weights.items():
        assert torch.equal(weight, published[name]), name
    assert net.pos_embed.shape == (1, 65, 384)


@pytest.mark.parametrize("args", [{"embed_dim": 192}, {"mlp_ratio": 2.0}, {"depth": 14}, {"depth": 6}])
def test_weights_that_do_not_fit_are_an_error_and_no_half_random_start(published, args):
    """With another classifier timm loads what it finds, and only warns in its log of the blocks that it left random."""
    with (
        mock.patch("timm.models._builder.load_state_dict_from_hf", return_value=dict(published)),
        pytest.raises((InputError, EnvironmentLacks), match=r"model\.(pretrained|args)"),
    ):
        zoo.create(*zoo.describe("vit_small", args, 10), pretrained=True)


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


def test_protected_weights_stay_whole_even_when_they_are_included():
    net = on_meta("vit_tiny", **tiny.MODEL_ARGS | {"depth": 3})
    assert len(names(net)) == 12
    assert names(net, protect=["blocks.0.*"]) == {n for n in names(net) if not n.startswith("blocks.0.")}
    assert names(net, protect=["*.fc[12].weight"]) == {n for n in names(net) if "attn" in n}
    assert "head.weight" not in names(net, include=["head.*"], protect=["head.weight"])


def test_globs_tell_case_and_match_the_whole_name():
    net = on_meta("vit_tiny", **tiny.MODEL_ARGS)
    for glob in ("Blocks.*", "blocks.0", "qkv"):
        with pytest.raises(InputError, match="matches no weight"):
            names(net, protect=[glob])


def test_a_glob_that_matches_nothing_is_an_error_with_examples():
    net = on_meta("vit_tiny", **tiny.MODEL_ARGS)
    with pytest.raises(InputError, match=r"pruning\.include: 'pos_embed' matches no weight.*blocks\.0\.attn\.qkv"):
        names(net, include=["pos_embed"])
    with pytest.raises(InputError, match=r"pruning\.protect: 'norm\.weight' matches no weight"):
        names(net, protect=["norm.weight"])


def test_nothing_left_to_prune_is_an_error():
    with pytest.raises(InputError, match="nothing is left to prune"):
        names(on_meta("vit_tiny", **tiny.MODEL_ARGS), protect=["blocks.*"])


def test_of_a_resnet_all_but_first_convolution_and_classifier_is_prunable():
    net = on_meta("resnet18")
    convolutions = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert "conv1.weight" in convolutions
    assert len(convolutions) == 20
    assert names(net) == convolutions - {"conv1.weight"}
    assert names(net, include=["fc.weight"]) == names(net) | {"fc.weight"}


def test_both_classifiers_of_a_distilled_model_are_kept_whole():
    net = on_meta("deit_tiny_distilled_patch16_224")
    assert {"head.weight", "head_dist.weight", "patch_embed.proj.weight"} <= set(net.state_dict())
    assert not any(not name.startswith("blocks.") for name in names(net))


def test_the_weights_are_those_of_the_model_itself():
    net = zoo.create(*zoo.describe("vit_tiny", tiny.MODEL_ARGS, 10))
    parameters = dict(net.named_parameters())
    assert all(parameters[name] is weight for name, weight in prunable_weights(net).items())
