"""Removing dead units does not change the logits: masked against slim, for every kind of unit."""

import json

import pytest
import torch
from torch import nn

from vit_rsst.analysis.counts import num_parameters
from vit_rsst.errors import Damaged
from vit_rsst.models import slim, zoo
from vit_rsst.models.anatomy import prunable_weights, unit_groups
from vit_rsst.pruning.granularity import expand
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.patterns import UNIT_KINDS

VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
HF_VIT = {
    "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 48,
}  # fmt: skip
SWIN = {"img_size": 32, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
HF_SWIN = {"image_size": 32, "patch_size": 4} | {key: SWIN[key] for key in SWIN if key != "img_size"}
VIT_KINDS = ["head", "neuron", "head+neuron"]
NETS = [
    *(("vit_tiny", {}, kind) for kind in VIT_KINDS),
    *(("vit_small", {"depth": 2}, kind) for kind in VIT_KINDS),
    *(("hf:vit", HF_VIT, kind) for kind in VIT_KINDS),
    *(("dynamic_vit", VIT | {"stages": [1]}, kind) for kind in VIT_KINDS),
    *(("lightweight_vit", VIT | {"rank": 4}, kind) for kind in VIT_KINDS),
    *(("vit_t16", VIT, kind) for kind in VIT_KINDS),
    *((name, {}, "channel") for name in ("resnet20", "resnet18", "resnet26", "seresnet18", "resnetblur18")),
    ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}, "neuron"),
    ("vit_small_patch16_dinov3", VIT, "head+neuron"),
    ("beit_base_patch16_224", VIT, "head+neuron"),
    ("swin_tiny_patch4_window7_224", SWIN, "head+neuron"),
    ("pvt_v2_b0", {}, "neuron"),  # a depthwise convolution over the neurons
    ("efficientvit_m0", {}, "neuron"),  # 1 × 1 convolutions with batch norm
    ("hf:swinv2", HF_SWIN, "head+neuron"),
    ("hf:swin", HF_SWIN, "head+neuron"),
    ("hf:beit", HF_VIT | {"use_relative_position_bias": True}, "head+neuron"),
    ("hf:convnext", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}, "neuron"),
    ("mobilenetv2_035", {}, "channel"),
]


def make(name: str, args: dict, device: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create(*zoo.describe(name, args, 10), device=device)


def images(net: nn.Module, count: int = 3) -> torch.Tensor:
    side = getattr(getattr(net, "config", None), "image_size", 64)
    size = getattr(getattr(net, "patch_embed", None), "img_size", None) or (side, side)
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def unsettle_(net: nn.Module) -> None:
    """Statistics, biases and norms that are not 0 or 1: some steps of batch norm, and noise on every vector."""
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(images(net, 8))
        for name, p in net.named_parameters():
            if p.dim() == 1 or "bias_table" in name or "logit_scale" in name:
                p.add_(torch.randn_like(p), alpha=0.3)
    net.eval()


def some_dead(net: nn.Module, kind: str, share: float = 0.5) -> MaskSet:
    """A mask of whole units of one granularity, drawn at random; in the first group all but none is left."""
    generator = torch.Generator().manual_seed(2)
    groups = unit_groups(net, UNIT_KINDS[kind])
    kept = [torch.rand(group.units, generator=generator) > share for group in groups]
    kept[0][:] = False
    return expand(groups, kept, prunable_weights(net))


def apply_(net: nn.Module, mask: MaskSet) -> None:
    with torch.no_grad():
        for name in mask:
            net.get_parameter(name).mul_(mask[name])


@pytest.mark.parametrize(("name", "args", "kind"), NETS)
@torch.no_grad()
def test_a_slim_network_has_the_logits_of_the_masked_one(name, args, kind):
    net = make(name, args)
    unsettle_(net)
    mask = some_dead(net, kind)
    apply_(net, mask)
    smaller = make(name, args)
    smaller.load_state_dict(net.state_dict())
    smaller.eval()
    slim.shrink_(smaller, slim.kept_units(net, mask))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in net.parameters())
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        x = images(net).to(dtype)
        expected, got = net.to(dtype)(x), smaller.to(dtype)(x)
        assert (got - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(("name", "args", "kind"), NETS)
def test_widths_shape_a_new_network_for_the_state_dict_on_any_device(name, args, kind):
    net = make(name, args)
    kept = slim.kept_units(net, some_dead(net, kind))
    slim.shrink_(net, kept)
    for device in (None, "meta"):
        fresh = make(name, args, device)
        slim.shape_like_(fresh, slim.widths(kept), "there")
        assert {n: t.shape for n, t in fresh.state_dict().items()} == {n: t.shape for n, t in net.state_dict().items()}


def test_one_unit_is_kept_if_all_are_dead():
    net = make("vit_tiny", VIT)
    kept = slim.kept_units(net, some_dead(net, "head+neuron", share=1.1))
    assert set(slim.widths(kept).values()) == {1}
    slim.shrink_(net, kept)
    assert net(images(net)).shape == (3, 10)
    assert net.blocks[0].attn.num_heads == 1
    assert net.blocks[0].attn.head_dim == 8


def test_widths_are_rounded_up_for_neurons_and_not_for_heads():
    net = make("vit_tiny", VIT | {"mlp_ratio": 2.0})
    mask = some_dead(net, "head+neuron")
    exact, rounded = (slim.widths(slim.kept_units(net, mask, n)) for n in (1, 8))
    for name, width in exact.items():
        assert rounded[name] == (width if name.endswith("attn") else min(48, -(-width // 8) * 8))
    assert any(width % 8 for name, width in exact.items() if name.endswith("mlp"))


def test_a_slim_form_is_a_smaller_copy_or_the_network_itself():
    net = make("vit_tiny", VIT)
    whole = num_parameters(net)
    form = slim.SlimForm(net, some_dead(net, "head+neuron"))
    assert form.is_narrower
    assert num_parameters(form.net) < num_parameters(net) == whole
    assert json.loads(form.header["widths"]) == {name: len(units) for name, units in form.kept.items()}
    full = slim.SlimForm(net, MaskSet.full(prunable_weights(net)))
    assert not full.is_narrower
    assert full.net is net


def test_a_rounded_network_keeps_every_live_unit():
    net = make("vit_tiny", VIT)
    mask = some_dead(net, "neuron")
    exact, rounded = (slim.kept_units(net, mask, n) for n in (1, 16))
    live = exact["blocks.1.mlp"]
    assert set(live.tolist()) <= set(rounded["blocks.1.mlp"].tolist())
    assert rounded["blocks.1.mlp"].tolist() == sorted(rounded["blocks.1.mlp"].tolist())


def test_a_unit_is_removed_if_its_consumer_is_dead_but_not_if_only_its_rows_are():
    net = make("vit_tiny", VIT)
    mask = MaskSet.full(prunable_weights(net))
    mask["blocks.0.mlp.fc1.weight"][5] = False  # its bias still acts through fc2
    mask["blocks.0.mlp.fc2.weight"][:, 7] = False
    kept = slim.kept_units(net, mask)["blocks.0.mlp"].tolist()
    assert 5 in kept
    assert 7 not in kept
    assert len(kept) == net.blocks[0].mlp.fc1.out_features - 1


def test_a_weight_without_a_mask_is_alive():
    net = make("vit_tiny", VIT)
    mask = some_dead(net, "neuron", share=1.1)
    spared = MaskSet({n: mask[n] for n in mask if not n.startswith("blocks.1")})
    found = slim.widths(slim.kept_units(net, spared))
    assert found["blocks.0.mlp"] == 1
    assert found["blocks.1.mlp"] == net.blocks[1].mlp.fc1.out_features


@pytest.mark.parametrize(("name", "args", "kind"), NETS)
def test_a_slim_network_trains(name, args, kind):
    net = make(name, args)
    slim.shrink_(net, slim.kept_units(net, some_dead(net, kind)))
    net.train()
    net(images(net)).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


@pytest.mark.parametrize("widths", [{"blocks.9.mlp": 3}, {"blocks.0.mlp": 10_000}, {"blocks.0.attn": 0}])
def test_widths_of_another_model_are_rejected_in_one_sentence(widths):
    with pytest.raises(Damaged, match=r"there: blocks\.\d\.\w+ has \d+ units"):
        slim.shape_like_(make("vit_tiny", VIT), widths, "there")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnetv2_18", set()),  # its norms precede the convolutions
        ("resnet50_gn", set()),  # groups of channels are normalised together
        ("davit_tiny", {"neuron"}),  # its attention requires as many output as input features
        ("convnextv2_atto", set()),  # a norm over the neurons
        ("nf_resnet26", set()),  # kernels are standardised
        ("vit_small_patch16_rope_mixed_224", {"neuron"}),  # frequencies by head
        ("vit_relpos_small_patch16_224", {"neuron"}),  # position biases by head
        ("vit_srelpos_small_patch16_224", {"neuron"}),
    ],
)
def test_units_entangled_with_other_tensors_are_not_removable(name, kinds):
    assert {group.kind for group in unit_groups(make(name, {}, "meta"))} == kinds
