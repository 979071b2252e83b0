"""The architectures of this package against independent implementations, and the defining property of each."""

import math

import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_rsst.errors import InputError
from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_weights, unit_groups
from vit_rsst.models.complexity import flops

TINY = {"embed_dim": 24, "depth": 4, "num_heads": 3, "patch_size": 8}
NUMBERS = (64, 256, 1024)
"""Of patches of 4 px."""
GATED = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}


def build(name: str, device: str | None = None, **args: object) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create(*zoo.describe(name, args, 10), device=device)


def images(count: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def unsettle_(net: nn.Module) -> nn.Module:
    """Adds noise to everything initialized to 0 or 1, in float64 and evaluation mode."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return net.double().eval()


# -- the gated ViT


def gated_logits(state: dict[str, Tensor], x: Tensor, heads: int, pooling: str) -> Tensor:
    """As documented: norm, projection, norm; blocks; norm; pooling; norm; classifier."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    weight = state["patch_embed.proj.weight"]
    size = weight.shape[-1]
    patches = F.unfold(x, size, stride=size).transpose(1, 2)  # (batch, patches, 3 · size²)
    x = norm("patch_embed.pixel_norm", patches) @ weight.flatten(1).T + state["patch_embed.proj.bias"]
    x = norm("patch_embed.norm", x)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for b in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        part = {name.removeprefix(f"blocks.{b}."): t for name, t in state.items() if name.startswith(f"blocks.{b}.")}
        q, k, v = (norm(f"blocks.{b}.norm1", x) @ part["attn.qkv.weight"].T).chunk(3, -1)
        seen = []
        for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            seen.append((q_h @ k_h.transpose(1, 2) / math.sqrt(q_h.shape[-1])).softmax(-1) @ v_h)
        x = x + torch.cat(seen, -1) @ part["attn.proj.weight"].T + part["attn.proj.bias"]
        y = norm(f"blocks.{b}.norm2", x)
        hidden = F.silu(y @ part["mlp.fc1_g.weight"].T) * (y @ part["mlp.fc1_x.weight"].T)
        x = x + hidden @ part["mlp.fc2.weight"].T
    x = norm("norm", x)
    x = x.mean(1) if pooling == "avg" else x[:, 0]
    return norm("fc_norm", x) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("pooling", ["token", "avg"])
@torch.no_grad()
def test_a_gated_vit_computes_what_its_description_says(pooling):
    net = unsettle_(build("vit_t16", **GATED, global_pool=pooling))
    expected = gated_logits(net.state_dict(), images().double(), 3, pooling)
    assert (net(images().double()) - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize(("name", "parameters"), [("vit_t16", 3_041_320), ("vit_m16", 5_701_288)])
def test_the_gated_vits_have_the_published_sizes_with_either_pooling(name, parameters, pooling):
    architecture, args = zoo.describe(name, {"global_pool": pooling}, 1000)
    assert sum(p.numel() for p in zoo.create(architecture, args, device="meta").parameters()) == parameters


# -- the lightweight ViT


@torch.no_grad()
def test_linear_attention_attends_to_mixtures_of_keys_and_values():
    net = build("lightweight_vit", **TINY, rank=5)
    attention = unsettle_(net).blocks[0].attn
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
    heads = []
    for h in range(3):
        part = slice(8 * h, 8 * h + 8)
        keys, values = attention.key_mix @ k[..., part], attention.value_mix @ v[..., part]  # (batch, 5, 8)
        heads.append((q[..., part] @ keys.transpose(1, 2) / math.sqrt(8)).softmax(-1) @ values)
    expected = F.linear(torch.cat(heads, -1), attention.proj.weight, attention.proj.bias)
    assert torch.allclose(attention(x), expected, atol=1e-12)


def test_the_cost_of_the_lightweight_vit_grows_in_proportion_to_the_tokens():
    cost = {n: flops(build("lightweight_vit", "meta", img_size=4 * math.isqrt(n)), 4 * math.isqrt(n)) for n in NUMBERS}
    assert cost[1024] <= 4.1 * cost[256] <= 4.1 * 4.1 * cost[64]
    plain = {n: flops(build("cifar_vit_base", "meta", img_size=4 * math.isqrt(n)), 4 * math.isqrt(n)) for n in NUMBERS}
    assert plain[1024] > 4.5 * plain[256]


# -- the dynamic ViT


def tokens_seen(net: nn.Module, x: Tensor) -> list[int]:
    """Tokens that enter each block."""
    seen: list[int] = []
    handles = [block.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1])) for block in net.blocks]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return seen


def test_the_dynamic_vit_actually_drops_tokens_in_evaluation():
    net = build("dynamic_vit", embed_dim=24, num_heads=3)
    assert tokens_seen(net.eval(), images()) == [65, 45, 32, 32, 22, 22]  # ⌊64 · 0.7ⁿ⌋ patches and the class token
    assert tokens_seen(net.train(), images()) == [65] * 6
    meta = build("dynamic_vit", "meta")
    assert flops(meta, 32) < 0.62 * flops(build("cifar_vit_base", "meta"), 32)


@torch.no_grad()
def test_the_dynamic_vit_that_keeps_everything_is_the_plain_vit():
    args = {key: value for key, value in TINY.items() if key != "depth"} | {"depth": 5}
    plain, dynamic = build("vit_tiny", **args, mlp_ratio=4.0), build("dynamic_vit", **args, keep_ratio=1.0)
    dynamic.load_state_dict(plain.state_dict())
    assert torch.equal(dynamic.eval()(images()), plain.eval()(images()))
    cut = build("dynamic_vit", **args)
    cut.load_state_dict(plain.state_dict(), strict=False)
    cut.keep_ratio = 1.0
    assert torch.equal(cut.eval()(images()), plain(images()))
    cut.keep_ratio = 0.7
    assert not torch.equal(cut(images()), plain(images()))


def test_kept_tokens_are_unaffected_by_dropped_ones():
    net = unsettle_(build("dynamic_vit", **TINY, stages=[1]))
    x, alive = torch.randn(1, 17, 24, dtype=torch.float64), torch.ones(1, 17, 1)
    alive[0, [2, 5, 11]] = 0.0
    left = alive[0, :, 0].bool()
    with torch.no_grad():
        masked, cut = net.blocks[1](x, attn_mask=alive)[:, left], net.blocks[1](x[:, left])
    assert torch.allclose(masked, cut, atol=1e-5)  # 10⁻⁶ stands in the denominator
    x.requires_grad_()
    net.blocks[1](x, attn_mask=alive)[:, left].sum().backward()
    assert not x.grad[:, ~left].any()


def test_the_best_patches_stay_in_their_order_and_the_class_token_always():
    net = build("dynamic_vit", **TINY, stages=[1], keep_ratio=0.5).eval()

    class ByFirst(nn.Module):
        def forward(self, tokens: Tensor, alive: Tensor) -> Tensor:
            return torch.stack([tokens[..., 0], torch.zeros_like(tokens[..., 0])], -1)

    net.predictors[0] = ByFirst()
    before, after = [], []
    net.blocks[0].register_forward_hook(lambda m, args, output: before.append(output))
    net.blocks[1].register_forward_pre_hook(lambda m, args: after.append(args[0]))
    with torch.no_grad():
        net(images())
    for x, y in zip(before[0], after[0], strict=True):
        expected = [0, *sorted(1 + i for i in x[1:, 0].argsort(descending=True)[:8].tolist())]
        assert torch.equal(y, x[expected])


def test_the_ratio_loss_is_the_squared_distance_from_the_share_and_reaches_every_predictor():
    net = build("dynamic_vit", **TINY, stages=[1, 3], keep_ratio=0.5).train()
    masks = []
    net.blocks[1].register_forward_pre_hook(lambda m, a, kw: masks.append(kw["attn_mask"]), with_kwargs=True)
    net.blocks[3].register_forward_pre_hook(lambda m, a, kw: masks.append(kw["attn_mask"]), with_kwargs=True)
    logits = net(images(5))
    shares = [mask[:, 1:, 0].mean(1) for mask in masks]
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} and mask[:, 0].all() for mask in masks)
    assert (masks[1] <= masks[0]).all()
    expected = 2.0 * ((shares[0] - 0.5).square().mean() + (shares[1] - 0.25).square().mean()) / 2
    assert float(net.auxiliary_loss().detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    net.auxiliary_loss().backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.predictors.parameters())
    net.zero_grad()
    logits.square().sum().backward()  # the task alone reaches them too
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.predictors[0].decide.parameters())


def test_training_by_the_ratio_loss_moves_the_share_that_a_draw_keeps():
    net = build("dynamic_vit", **TINY, stages=[1], keep_ratio=0.25, ratio_weight=2.0).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    x, labels = images(16), torch.arange(16) % 10
    ratio_losses = []
    for _ in range(60):
        optimizer.zero_grad()
        (F.cross_entropy(net(x), labels) + net.auxiliary_loss()).backward()
        ratio_losses.append(float(net.auxiliary_loss().detach()))
        optimizer.step()
    assert sum(ratio_losses[-10:]) < 0.3 * sum(ratio_losses[:10])


def test_checkpointed_gradients_of_the_dynamic_vit_are_the_same():
    gradients = []
    for enable in (False, True):
        net = build("dynamic_vit", **TINY, stages=[1, 2]).train()
        net.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        (net(images()).square().sum() + net.auxiliary_loss()).backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_predictors_are_not_pruned():
    names = set(prunable_weights(build("dynamic_vit", **TINY, stages=[1])))
    assert names == set(prunable_weights(build("vit_tiny", **TINY)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio 0.0 is not in \(0, 1\]"),
        ({"keep_ratio": 1.5}, "keep_ratio 1.5"),
        ({"stages": [2, 1]}, "must be increasing block indices, 0 to 3"),
        ({"stages": [9]}, "must be increasing block indices, 0 to 3"),
    ],
)
def test_invalid_stages_and_ratios_are_an_error(args, message):
    with pytest.raises(InputError, match=rf"model\.args: dynamic_vit.*{message}"):
        build("dynamic_vit", **TINY, **({"stages": [1]} | args))
    with pytest.raises(InputError, match=r"model\.args: lightweight_vit.*rank 0"):
        build("lightweight_vit", **TINY, rank=0)


# -- in a run


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("dynamic_vit", {**TINY, "stages": [1, 2]}),
        ("lightweight_vit", {**TINY, "rank": 4}),
        ("vit_t16", GATED),
        ("vit_p8_tiny", {"depth": 2, "embed_dim": 24, "num_heads": 3}),
    ],
)
def test_each_family_is_trained_and_loses_units_in_bf16_with_accumulation(name, args, tmp_path):
    recipe = tiny.write_recipe(tmp_path, RUN.format(name=name, args=args))
    assert tiny.command("train", recipe) == 0
    run = tmp_path / "runs" / "tiny"
    assert tiny.status(run)["state"] == "finished"
    assert tiny.command("evaluate", run) == 0
    net = build(name, **args)
    assert {group.kind for group in unit_groups(net)} == {"head", "neuron"}


RUN = """\
name: tiny
data: {{source: digits}}
model: {{name: {name}, args: {args}}}
train: {{epochs: 1, global_batch: 32, batch_per_device: 16, steps_per_epoch: 3, precision: bf16}}
pruning:
  method: {{name: rsst, remove_at: 0.8}}
  granularity: head+neuron
  criterion: saliency
  calibration_images: 32
  schedule: {{rounds: 1, final_sparsity: 0.5}}
"""


def test_this_packages_architectures_are_registered_with_timm():
    for name in zoo.OWN:
        with torch.device("meta"):
            net = timm.create_model(name, num_classes=7)
        assert net.get_submodule(net.pretrained_cfg["classifier"]).out_features == 7


# -- blocks that split their hidden features


def test_hidden_features_that_the_forward_pass_splits_at_fixed_widths_are_no_neurons():
    net = timm.create_model("test_mambaout", num_classes=10).eval()  # fc1's output is split into (48, 32, 16)
    assert not unit_groups(net, ("neuron",))
    assert any(name.endswith("fc1.weight") for name in prunable_weights(net))


def test_tensors_that_a_block_lists_do_not_hide_its_neurons():
    net = timm.create_model("test_vit", num_classes=10)
    net.blocks[0].mlp.seen = [torch.zeros(2, 3)]
    assert next(group.name for group in unit_groups(net, ("neuron",))) == "blocks.0.mlp"
