"""Criteria against a slow reference: one image at a time, float64, a loop over every unit and token."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import CLASSES, SIZE, vit

from vit_rsst.errors import InputError
from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.models.resnet import CifarResNet
from vit_rsst.pruning.calibration import collect
from vit_rsst.pruning.criteria import CRITERIA, Evidence
from vit_rsst.pruning.granularity import expand, pool
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.units import UnitGroup


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(7, 3, SIZE, SIZE, generator=generator), torch.randint(0, CLASSES, (7,), generator=generator)


def network(make: Callable[[], nn.Module] = vit) -> nn.Module:
    """Trained for a few steps, so that no score is a special case."""
    torch.manual_seed(3)
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(4):
        images, labels = data()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = data()
    return list(zip(images.split(list(sizes)), labels.split(list(sizes)), strict=True))


def parts(net: nn.Module, granularity: str) -> tuple[dict, list[UnitGroup], MaskSet]:
    """With the first unit of every group that has more than two dead, as in a later round."""
    weights, groups = prunable_parts(net, granularity)
    kept = [torch.arange(group.units) > (0 if group.units > 2 else -1) for group in groups]
    mask = expand(groups, kept, weights)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(mask[name])
    return weights, groups, mask


def images_one_by_one(net: nn.Module, module: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(A, ∂L/∂A) of each image at a module's input, in float64: (tokens, features)."""
    exact = copy.deepcopy(net).double().eval()
    seen: list[Tensor] = []
    exact.get_submodule(module).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for image, label in zip(*data(), strict=True):
        seen.clear()
        loss = F.cross_entropy(exact(image[None].double()), label[None])
        [gradient] = torch.autograd.grad(loss, seen)
        tokens_last = [t if t.dim() == 3 else t.flatten(2).transpose(1, 2) for t in (seen[0], gradient)]
        yield tuple(t[0].detach() for t in tokens_last)


def slow_unit_scores(net: nn.Module, group: UnitGroup, criterion: str) -> Tensor:
    scores = [0.0] * group.units
    passes = list(images_one_by_one(net, group.site.module))
    for unit in range(group.units):
        features = group.site.index[unit].tolist()
        total, count = 0.0, 0
        for activation, gradient in passes:
            gate = 0.0
            for token in range(len(activation)):
                for feature in features:
                    a, g = float(activation[token, feature]), float(gradient[token, feature])
                    total += {"activation_l1": abs(a), "activation_l2": a * a, "saliency": abs(a * g)}.get(criterion, 0)
                    gate += a * g
                    count += 1
            if criterion == "taylor" or (criterion == "saliency" and group.kind == "head"):
                scores[unit] += abs(gate) / len(passes)
        if criterion != "taylor" and not (criterion == "saliency" and group.kind == "head"):
            scores[unit] = (total / count) ** (0.5 if criterion == "activation_l2" else 1)
    return torch.tensor(scores, dtype=torch.float64)


NETS = {
    "head+neuron": vit,
    "channel": lambda: CifarResNet(CLASSES, depth=8, width=4),
    "head+neuron of transformers": lambda: zoo.create(
        "hf:vit",
        dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=10, image_size=SIZE,
             patch_size=4, num_labels=CLASSES),
    ),
}  # fmt: skip


@pytest.mark.parametrize("criterion", ["activation_l1", "activation_l2", "saliency", "taylor"])
@pytest.mark.parametrize("kind", NETS)
def test_scores_of_units_are_those_of_one_image_at_a_time(kind, criterion):
    net = network(NETS[kind])
    weights, groups, mask = parts(net, kind.split()[0])
    statistics = collect(net, batches(4, 3), weights, groups, "gradients")
    for group in groups:
        found = CRITERIA[criterion].units(Evidence(weights, mask, 0, statistics), group)
        torch.testing.assert_close(found.double(), slow_unit_scores(net, group, criterion), rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("criterion", ["activation_l1", "activation_l2", "saliency"])
@pytest.mark.parametrize("make", [vit, NETS["channel"]], ids=["vit", "resnet"])
def test_scores_of_elements_are_weights_times_inputs_or_gradients(make, criterion):
    net = network(make)
    weights, _, mask = parts(net, "element")
    statistics = collect(net, batches(5, 2), weights, [], "gradients")
    scores = CRITERIA[criterion].elements(Evidence(weights, mask, 0, statistics))
    exact = copy.deepcopy(net).double().eval()
    losses = [F.cross_entropy(exact(i[None].double()), y[None]) for i, y in zip(*data(), strict=True)]
    gradients = [torch.autograd.grad(loss, [exact.get_parameter(name) for name in weights]) for loss in losses]
    for position, (name, weight) in enumerate(weights.items()):
        size = weight.detach().double().abs()
        if criterion == "saliency":
            expected = size * sum(g[position] for g in gradients).abs() / len(losses)
        else:
            inputs = torch.cat([a for a, _ in images_one_by_one(net, name.removesuffix(".weight"))])  # (tokens, in)
            mean = inputs.abs().mean(0) if criterion == "activation_l1" else inputs.square().mean(0).sqrt()
            expected = size * mean.view(1, -1, *[1] * (weight.dim() - 2))
        torch.testing.assert_close(scores[name].double(), expected, rtol=2e-4, atol=1e-6 * float(expected.max()))


class Grouped(nn.Module):
    """A convolution of two groups, a depthwise one, and a matrix that is used without calling its layer."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"first_conv": "stem", "classifier": "head"}
        self.stem = nn.Conv2d(3, 4, 1)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.uncalled = nn.Linear(6, 5, bias=False)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.grouped(self.stem(x))).mean((2, 3))
        return self.head(F.linear(x, self.uncalled.weight).tanh())


@pytest.mark.parametrize("criterion", ["activation_l1", "activation_l2", "saliency"])
def test_inputs_are_scored_by_group_and_where_a_weight_is_used(criterion):
    torch.manual_seed(0)
    net = Grouped()
    weights, _, mask = parts(net, "element")
    assert list(weights) == ["grouped.weight", "depthwise.weight", "uncalled.weight"]
    statistics = collect(net, batches(5, 2), weights, [], "gradients")
    scores = CRITERIA[criterion].elements(Evidence(weights, mask, 0, statistics))
    assert {name: scores[name].shape for name in weights} == {name: weight.shape for name, weight in weights.items()}
    if criterion == "saliency":
        return
    images, power = data()[0], {"activation_l1": 1, "activation_l2": 2}[criterion]
    with torch.no_grad():
        first = net.stem(images)
        inputs = {"grouped.weight": first, "depthwise.weight": net.grouped(first)}
        for name, x in inputs.items():
            mean = x.abs().pow(power).mean((0, 2, 3)) ** (1 / power)  # one number a channel
            weight = weights[name]
            for o in range(len(weight)):
                for i in range(weight.shape[1]):
                    channel = o // (len(weight) * weight.shape[1] // len(mean)) * weight.shape[1] + i
                    torch.testing.assert_close(scores[name][o, i], weight[o, i].abs() * mean[channel])


def test_statistics_do_not_depend_on_the_batch_size():
    net = network()
    weights, groups, _ = parts(net, "head+neuron")
    one, many = (collect(net, batches(*sizes), weights, groups, "gradients") for sizes in ((7,), (1, 3, 2, 1)))
    for group in groups:
        for key in ("absolute", "square", "saliency", "gate"):
            a, b = (getattr(s.sites[group.name], key) for s in (one, many))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-10)


def test_calibration_leaves_the_model_as_it_was():
    net = network().train()
    net.blocks[0].mlp.drop1.p = 0.5
    weights, groups, _ = parts(net, "head+neuron")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first, again = (collect(net, batches(4, 3), weights, groups, "gradients") for _ in range(2))
    assert torch.equal(first.sites["blocks.0.mlp"].gate, again.sites["blocks.0.mlp"].gate)  # no dropout
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_calibration_without_images_is_an_error():
    net = network()
    weights, groups, _ = parts(net, "head")
    with pytest.raises(InputError, match=r"pruning\.calibration_images: the criterion needs calibration images"):
        collect(net, [], weights, groups, "activations")


def test_units_with_large_weights_outrank_units_with_small_ones():
    net = network()
    weights, groups, mask = parts(net, "neuron")
    with torch.no_grad():
        net.blocks[0].mlp.fc1.weight[5] = 9.0
    scores = pool(groups[0], CRITERIA["magnitude"].elements(Evidence(weights, mask, 0)))
    assert scores.argmax() == 5
    assert scores[0] == 0  # dead
    by_hand = (9.0 * 16 + float(net.blocks[0].mlp.fc2.weight[:, 5].detach().abs().sum())) / 32
    assert float(scores[5]) == pytest.approx(by_hand)


def test_survivors_are_the_surviving_fraction_of_a_unit():
    net = network()
    weights, groups, mask = parts(net, "neuron")
    left = MaskSet({name: torch.zeros_like(mask[name]) for name in mask})
    left["blocks.0.mlp.fc1.weight"][3, :8] = True  # 8 of its 16 + 16
    scores = CRITERIA["survivors"].units(Evidence(weights, mask, 0, survivors=left), groups[0])
    assert scores.tolist() == [0.25 if unit == 3 else 0.0 for unit in range(32)]


def test_random_unit_scores_differ_by_seed_and_group():
    net = network()
    weights, groups, mask = parts(net, "neuron")
    draw = CRITERIA["random"].units
    first, again, other = (draw(Evidence(weights, mask, seed), groups[0]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, draw(Evidence(weights, mask, 1), groups[1]))
