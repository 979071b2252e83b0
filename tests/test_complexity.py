"""FLOPs calculated by hand, and savings of units against models built without them."""

import pytest
import torch

from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_parts, unit_groups
from vit_rsst.models.complexity import (
    effective_flops,
    flops,
    flops_by_module,
    own_flops,
    unit_costs,
)
from vit_rsst.models.slim import shrink_
from vit_rsst.pruning.granularity import expand
from vit_rsst.pruning.masks import MaskSet

HUB_VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
HUB_VIT["intermediate_size"] = 96


def build(name: str, num_classes: int = 10, device: str = "meta", **args: object) -> torch.nn.Module:
    return zoo.create(*zoo.describe(name, args, num_classes), device=device)


@pytest.mark.parametrize(
    ("name", "million_macs"), [("vit_tiny", 187.7), ("vit_small", 1420.3), ("vit_base", 5601.0), ("resnet20", 40.55)]
)
def test_the_catalogue_costs_its_published_macs_at_32_px(name, million_macs):
    assert flops(build(name), 32) / 2e6 == pytest.approx(million_macs, rel=3e-4)


def test_flops_of_vit_tiny_match_the_formula():
    tokens, width, hidden, depth = 65, 192, 384, 9  # 64 patches and the class token
    patches = 64 * width * 3 * 4 * 4
    block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width
    macs = patches + depth * block + width * 10
    assert flops(build("vit_tiny"), 32) == 2 * macs
    assert flops(build("vit_tiny"), 32, batch=3) == 6 * macs


def test_the_counted_flops_do_not_depend_on_where_the_weights_lie_nor_change_the_model():
    net = build("vit_tiny", device="cpu", depth=2).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert flops(net, 32) == flops(build("vit_tiny", depth=2), 32)
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(("name", "args"), [("vit_tiny", {"depth": 2}), ("hf:vit", HUB_VIT), ("resnet20", {})])
def test_the_modules_own_flops_add_up_to_the_whole(name, args):
    net = build(name, **args)
    by_module = flops_by_module(net, 32)
    own = own_flops(by_module)
    assert all(count >= 0 for count in own.values())
    assert sum(own.values()) == by_module[""]


def test_savings_of_a_head_and_a_neuron_match_the_formula():
    net = build("vit_tiny", depth=1)
    spent, size = unit_costs(net, unit_groups(net), 32)
    tokens, width, dim = 65, 192, 64
    assert spent["blocks.0.attn"] == 2 * (4 * tokens * width * dim + 2 * tokens * tokens * dim)
    assert size["blocks.0.attn"] == 4 * width * dim + 3 * dim  # the bias of the projection stays
    assert spent["blocks.0.mlp"] == 2 * (2 * tokens * width)
    assert size["blocks.0.mlp"] == 2 * width + 1


def test_removed_neurons_and_channels_save_exactly_their_costs():
    narrow, wide = build("vit_tiny", depth=3, mlp_ratio=1.0), build("vit_tiny", depth=3)
    spent, size = unit_costs(wide, unit_groups(wide, ["neuron"]), 32)
    assert flops(wide, 32) - flops(narrow, 32) == 192 * sum(spent.values())
    assert parameters(wide) - parameters(narrow) == 192 * sum(size.values())


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny", {"depth": 2}),
        ("hf:vit", HUB_VIT),
        ("resnet20", {}),
        ("lightweight_vit", {"depth": 2}),
        ("dynamic_vit", {"depth": 2, "stages": [1]}),
        ("vit_t16", {"depth": 2, "img_size": 32, "patch_size": 4}),
    ],
)
def test_unit_costs_equal_the_savings_of_the_smaller_model(name, args):
    net = build(name, **args)
    groups = unit_groups(net)
    spent, size = unit_costs(net, groups, 32)
    kept = {group.name: torch.arange(group.units)[1 + number % 2 :] for number, group in enumerate(groups)}
    gone = {group.name: group.units - len(kept[group.name]) for group in groups}
    flops_left = flops(net, 32) - sum(gone[group] * spent[group] for group in gone)
    parameters_left = parameters(net) - sum(gone[group] * size[group] for group in gone)
    shrink_(net, kept)
    assert flops(net, 32) == flops_left
    assert parameters(net) == parameters_left


def test_channels_between_two_pruned_sides_save_less_than_the_sum():
    net = build("resnet50")
    groups = [group for group in unit_groups(net) if group.name.startswith("layer1.0.")]
    _, size = unit_costs(net, groups, 64)
    sum_of_both = sum(group.units // 2 * size[group.name] for group in groups)
    before = parameters(net)
    shrink_(net, {group.name: torch.arange(group.units // 2) for group in groups})
    assert before - parameters(net) == sum_of_both - 9 * 32 * 32  # the block where they cross, counted twice


def test_gated_neurons_include_both_of_their_rows():
    net = build("eva02_tiny_patch14_224", img_size=28, depth=1)
    spent, size = unit_costs(net, unit_groups(net, ["neuron"]), 28)
    [name] = spent
    assert size[name] == 3 * 192 + 2
    assert spent[name] == 2 * 3 * 5 * 192  # 5 tokens


def test_effective_flops_of_a_full_mask_are_dense_and_of_dropped_units_are_those_left():
    net = build("vit_tiny", depth=2)
    weights, groups = prunable_parts(net, "head+neuron")
    on_cpu = {name: torch.empty(weight.shape) for name, weight in weights.items()}
    dense = flops(net, 32)
    assert effective_flops(net, MaskSet.full(on_cpu), groups, 32) == dense
    kept = [torch.arange(group.units) >= group.units // 3 for group in groups]  # a third of each group leaves
    spent, _ = unit_costs(net, groups, 32)
    saved = sum(spent[group.name] * int((~keep).sum()) for group, keep in zip(groups, kept, strict=True))
    assert effective_flops(net, expand(groups, kept, on_cpu), groups, 32) == pytest.approx(dense - saved, rel=1e-6)


def test_effective_flops_of_scattered_zeros_follow_the_density_of_each_weight():
    net = build("vit_tiny", depth=1)
    mask = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in prunable_parts(net, "element")[0].items()}
    mask["blocks.0.mlp.fc1.weight"][:, ::2] = False
    spared = 2 * 65 * 192 * 384 / 2
    assert effective_flops(net, MaskSet(mask), unit_groups(net), 32) == flops(net, 32) - spared


def parameters(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
