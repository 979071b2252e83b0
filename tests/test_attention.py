"""Attention maps against attention computed by hand, layer by layer."""

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_rsst.models import slim, zoo
from vit_rsst.report.attention import attention, mean_of_heads, over_patches, rollout

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def images(count: int = 2, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def vit(**args: object) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", **{**ARGS, **args}).eval()
    for parameter in net.parameters():  # large enough for attention to be far from uniform
        nn.init.normal_(parameter, std=0.3)
    return net


def by_hand(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Softmax of q · k of every block, without fused attention."""
    found = []
    tokens = net._pos_embed(net.patch_embed(x))
    for block in net.blocks:
        a, y = block.attn, block.norm1(tokens)
        batch, length, _ = y.shape
        q, k, _ = a.qkv(y).reshape(batch, length, 3, a.num_heads, a.head_dim).permute(2, 0, 3, 1, 4)
        found.append((a.q_norm(q) * a.scale @ a.k_norm(k).transpose(-2, -1)).softmax(-1))
        tokens = block(tokens)
    return found


@pytest.mark.parametrize("args", [{}, {"class_token": False, "global_pool": "avg"}, {"qk_norm": True}])
@pytest.mark.parametrize("is_fused", [True, False])
def test_recorded_attention_is_that_of_an_unfused_network(args, is_fused):
    net, x = vit(**args), images()
    with torch.no_grad():
        expected, logits = by_hand(net, x), net(x)
    for block in net.blocks:
        block.attn.fused_attn = is_fused
    layers, alive, found = attention(net, x)
    assert len(layers) == len(expected) == 3
    for mine, theirs in zip(layers, expected, strict=True):
        assert float((mine - theirs).abs().max()) < 1e-5
        assert float(mine.std()) > 0.002  # not uniform
    assert torch.stack(alive).all()
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    assert [block.attn.fused_attn for block in net.blocks] == [is_fused] * 3


def test_recorded_attention_of_a_transformers_model_is_its_own():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24
    )
    net = ViTForImageClassification(config).eval()
    net.set_attn_implementation("eager")
    with torch.no_grad():
        expected = net(images(), output_attentions=True).attentions
    net.set_attn_implementation("sdpa")
    layers, _, _ = attention(net, images())
    assert len(layers) == 2
    for mine, theirs in zip(layers, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_heads_without_weights_do_not_count_and_slim_networks_agree():
    net, x = vit(), images()
    net.blocks[1].attn.qkv.weight.data[:8] = net.blocks[1].attn.qkv.weight.data[24:32] = 0  # q and k of head 0
    net.blocks[1].attn.qkv.weight.data[48:56] = 0
    net.blocks[1].attn.proj.weight.data[:, :8] = 0
    layers, alive, _ = attention(net, x)
    assert alive[1].tolist() == [[False, True, True]] * 2
    small = vit()
    small.load_state_dict(net.state_dict())
    slim.shrink_(small, {"blocks.1.attn": torch.tensor([1, 2])} | {
        g.name: torch.arange(g.units) for g in zoo_groups(small) if g.name != "blocks.1.attn"
    })  # fmt: skip
    slim_layers, slim_alive, _ = attention(small, x)
    assert slim_layers[1].shape[1] == 2
    torch.testing.assert_close(rollout(slim_layers, slim_alive), rollout(layers, alive), rtol=0, atol=1e-5)


def zoo_groups(net: nn.Module) -> list:
    from vit_rsst.models.anatomy import unit_groups

    return unit_groups(net)


def test_rollout_matches_hand_calculation():
    first = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])  # both look at token 0
    second = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])  # both look at token 1
    alive = [torch.ones(1, 1, dtype=torch.bool)] * 2
    # Halves: [[1, 0], [.5, .5]], then [[.5, .5], [0, 1]] on top of it.
    assert rollout([first, second], alive).tolist() == [[[0.75, 0.25], [0.5, 0.5]]]
    assert mean_of_heads(first, torch.zeros(1, 1, dtype=torch.bool)).tolist() == [[[1.0, 0.0], [0.0, 1.0]]]


def test_maps_are_squares_of_patches_that_sum_to_one():
    for net in (vit(), vit(class_token=False, global_pool="avg"), vit(reg_tokens=4)):
        layers, alive, _ = attention(net, images())
        maps = over_patches(rollout(layers, alive))
        assert maps.shape == (2, 4, 4)
        torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2))


def test_windowed_attention_has_no_maps():
    resnet = zoo.create("resnet20", {"num_classes": 10}).eval()
    layers, alive, logits = attention(resnet, images(size=32))
    assert (layers, alive, logits.shape) == ([], [], (2, 10))
    assert over_patches(torch.zeros(1, 24, 24)) is None
