"""Optimizers: which parameters decay, single steps calculated by hand, and the state edits that pruning needs."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vit_rsst.errors import InputError
from vit_rsst.models import zoo
from vit_rsst.training import optim

ALL = ("sgd", "adam", "adamw")


def make(model: nn.Module, name: str, lr: float = 0.1, weight_decay: float = 0.05) -> torch.optim.Optimizer:
    return optim.create_optimizer(model, name, lr=lr, weight_decay=weight_decay, momentum=0.9, betas=(0.9, 0.999))


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_matrices_decay_and_norms_biases_tokens_and_positions_do_not():
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, num_classes=2)
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = optim.param_groups(model, 0.05)
    names = {group["weight_decay"]: {name_of[id(p)] for p in group["params"]} for group in groups}
    assert names[0.05] == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
    }
    assert names[0.05] | names[0.0] == {name for name, _ in model.named_parameters()}
    assert not names[0.05] & names[0.0]
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= names[0.0]


def test_without_decay_every_parameter_is_still_optimized_once():
    model = linear()
    assert sum(len(group["params"]) for group in optim.param_groups(model, 0.0)) == 2


def test_a_frozen_parameter_is_left_out():
    model = linear()
    model.bias.requires_grad_(False)
    assert sum(len(group["params"]) for group in optim.param_groups(model, 0.1)) == 1


def one_weight(name: str, weight_decay: float) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    return model.weight, make(model, name, weight_decay=weight_decay)


def test_sgd_has_plain_momentum_calculated_by_hand():
    weight, optimizer = one_weight("sgd", 0.0)
    seen = []
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        seen.append(weight.item())
    # velocities 1, 1.9, 2.71; Nesterov would begin with 1.9
    assert seen == pytest.approx([0.9, 0.71, 0.439], abs=1e-6)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sgd", 1 - 0.1 * (2 + 0.05)),  # the decay is part of the gradient
        ("adam", 1 - 0.1),  # likewise, and Adam divides it away: the first step is lr whatever the gradient
        ("adamw", 1 * (1 - 0.1 * 0.05) - 0.1),
    ],
)
def test_the_first_step_with_decay_by_hand(name, expected):
    weight, optimizer = one_weight(name, 0.05)
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    assert weight.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name, expected", [("sgd", (1.0, 0.05)), ("adam", (1.0, 0.05)), ("adamw", (0.995, 0.0))])
def test_decay_rates_predict_one_step_of_decay(name, expected):
    model = linear()
    rates = optim.decay_rates(make(model, name), {"w": model.weight, "b": model.bias})
    assert rates == {"w": pytest.approx(expected), "b": (1.0, 0.0)}


def test_decay_rates_follow_the_learning_rate():
    model = linear()
    optimizer = make(model, "adamw")
    optim.set_lr_(optimizer, 0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.4]
    assert optim.decay_rates(optimizer, {"w": model.weight})["w"] == pytest.approx((0.98, 0.0))


@pytest.mark.parametrize("name", ALL)
def test_after_a_reset_the_same_object_steps_as_a_new_optimizer_does(name):
    model, other = linear(), linear()
    used = make(model, name)
    train(model, used, 5)
    optim.reset_state_(used)
    other.load_state_dict(model.state_dict())
    train(model, used, 3, first=5)
    train(other, make(other, name), 3, first=5)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


@pytest.mark.parametrize("name, moments", [("sgd", 1), ("adam", 2), ("adamw", 2)])
def test_cleared_moments_are_zero_where_asked_and_untouched_elsewhere(name, moments):
    model = linear()
    optimizer = make(model, name)
    train(model, optimizer, 3)
    before = {key: value.clone() for key, value in optimizer.state[model.weight].items()}
    where = torch.tensor([[True, False, False], [False, False, True]])
    optim.clear_moments_(optimizer, {"w": model.weight}, {"w": where})
    after = optimizer.state[model.weight]
    assert len(set(after) - {"step"}) == moments
    for key in set(after) - {"step"}:
        assert torch.equal(after[key], torch.where(where, 0.0, before[key]))
        assert before[key].all()
    if "step" in after:
        assert after["step"] == before["step"] == 3


def test_clearing_moments_before_the_first_step_creates_no_state():
    model = linear()
    optimizer = make(model, "adamw")
    optim.clear_moments_(optimizer, {"w": model.weight}, {"w": torch.ones(2, 3, dtype=torch.bool)})
    assert len(optimizer.state) == 0
    train(model, optimizer, 1)


@pytest.mark.parametrize("name", ALL)
def test_state_tensors_loaded_into_a_fresh_optimizer_give_the_same_next_steps(name):
    model = linear()
    optimizer = make(model, name)
    train(model, optimizer, 4)
    names = {id(p): n for n, p in model.named_parameters()}
    saved = {path: value.clone() for path, value in optim.state_tensors(optimizer, names).items()}
    other = linear(seed=1)
    other.load_state_dict(model.state_dict())
    fresh = make(other, name)
    optim.load_state_tensors_(fresh, saved, dict(other.named_parameters()))
    train(model, optimizer, 3, first=4)
    train(other, fresh, 3, first=4)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_moments_are_loaded_in_the_memory_format_of_their_weight():
    """A fused step on a GPU rejects moments of another layout, and safetensors does not store layouts."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer, saved = torch.optim.AdamW([weight], fused=True), torch.randn(4, 3, 2, 2)
    optim.load_state_tensors_(optimizer, {"w/exp_avg": saved, "w/step": torch.tensor(3.0)}, {"w": weight})
    state = optimizer.state[weight]
    assert state["exp_avg"].stride() == weight.stride() != saved.stride()
    assert torch.equal(state["exp_avg"], saved)
    assert state["step"] == 3


def test_loading_replaces_the_whole_state():
    model = linear()
    optimizer = make(model, "adamw")
    train(model, optimizer, 2)
    saved = {"weight/exp_avg": torch.ones(2, 3)}
    optim.load_state_tensors_(optimizer, saved, dict(model.named_parameters()))
    assert optim.state_tensors(optimizer, {id(model.weight): "weight", id(model.bias): "bias"}).keys() == saved.keys()


def test_state_of_an_unknown_parameter_is_rejected():
    model = linear()
    with pytest.raises(KeyError, match="ghost"):
        optim.load_state_tensors_(make(model, "sgd"), {"ghost/momentum_buffer": torch.zeros(1)}, {"w": model.weight})


# -- layer-wise decay


@pytest.mark.parametrize(
    "name", ["vit_tiny", "vit_small", "dynamic_vit", "lightweight_vit", "vit_t16", "resnet20", "resnet18"]
)
def test_layer_learning_rates_match_timm(name):
    from timm.optim import param_groups_layer_decay

    net = zoo.create(*zoo.describe(name, {}, 10), device="meta")
    name_of = {id(p): n for n, p in net.named_parameters()}
    expected = {
        name_of[id(p)]: group["lr_scale"] for group in param_groups_layer_decay(net, layer_decay=0.75)
        for p in group["params"]
    }  # fmt: skip
    assert zoo.lr_scales(net, 0.75) == pytest.approx(expected)
    groups = optim.param_groups(net, 0.05, expected)
    assert {name_of[id(p)]: group["lr_scale"] for group in groups for p in group["params"]} == expected
    assert groups[0]["lr_scale"] == 1.0
    assert sum(len(group["params"]) for group in groups) == len(expected)


def test_vit_layer_rates_decay_from_head_to_patches_calculated_by_hand():
    net = zoo.create(*zoo.describe("vit_tiny", {"depth": 2}, 10), device="meta")
    scales = zoo.lr_scales(net, 0.5)
    expected = {"head.weight": 1.0, "blocks.1.mlp.fc1.weight": 0.5, "blocks.0.attn.qkv.bias": 0.25}
    expected |= {name: 0.125 for name in ("patch_embed.proj.weight", "pos_embed", "cls_token")}
    assert {name: scales[name] for name in expected} == expected


def test_set_lr_keeps_the_scales_and_decay_follows_the_scaled_rate():
    model = nn.Sequential(linear(), linear(1))
    scales = {"0.weight": 0.25, "0.bias": 0.25, "1.weight": 1.0, "1.bias": 1.0}
    optimizer = optim.create_optimizer(
        model, "adamw", lr=0.1, weight_decay=0.05, momentum=0.9, betas=(0.9, 0.999), lr_scales=scales
    )
    optim.set_lr_(optimizer, 0.4)
    assert {group["lr"] for group in optimizer.param_groups} == {0.4, 0.1}
    assert optimizer.param_groups[0]["lr"] == 0.4
    rates = optim.decay_rates(optimizer, {"0.weight": model[0].weight, "1.weight": model[1].weight})
    assert rates["0.weight"][0] == pytest.approx(1 - 0.1 * 0.05)
    assert rates["1.weight"][0] == pytest.approx(1 - 0.4 * 0.05)


def test_a_model_that_does_not_define_its_layers_is_rejected():
    with pytest.raises(InputError, match=r"optim\.layer_decay: Sequential does not define `group_matcher`"):
        zoo.lr_scales(nn.Sequential(linear()), 0.5)


@pytest.mark.parametrize(
    ("name", "leaf", "is_decayed"),
    [
        ("vit.embeddings.position_embeddings", "position_embeddings", False),
        ("vision_model.embeddings", "position_embedding.weight", False),
        ("swin.layers.0", "relative_position_bias_table", False),
        ("swin.layers.0", "logit_scale", False),
        ("dinov2.embeddings", "register_tokens", False),
        ("net", "pos_embed1", False),
        ("blocks.0.attn", "rel_pos_h", False),
        ("blocks.0.rel_pos.mlp", "fc1.weight", True),
        ("blocks.0", "token_mixer.weight", True),
        ("blocks.0.layer_scale_mlp", "fc.weight", True),
    ],
)
def test_position_embeddings_tokens_tables_and_scales_are_not_decayed(name, leaf, is_decayed):
    class Named(nn.Module):
        def named_parameters(self, *args, **kwargs):
            yield f"{name}.{leaf}", nn.Parameter(torch.ones(3, 4, 1))

    [group] = optim.param_groups(Named(), 0.05)
    assert group["weight_decay"] == (0.05 if is_decayed else 0.0)
