"""`vit_rsst.prune`: one removal in place, by any granularity and criterion, with the recipe's words and sentences."""

import copy

import pytest
import torch
from torch import nn
from toys_of_others import digits, resnet, tiny_bert, tokens, vit

import vit_rsst
from vit_rsst.errors import InputError
from vit_rsst.models.anatomy import unit_groups
from vit_rsst.models.slim import SlimForm
from vit_rsst.pruning.granularity import alive_units


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def test_the_smallest_weights_of_all_layers_become_zero_and_the_others_stay():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    found = vit_rsst.prune(model, 0.75)
    sizes = torch.cat([before[name].abs().flatten() for name in ("0.weight", "2.weight")])
    threshold = sizes.sort().values[round(0.75 * 192) - 1]
    for name in ("0.weight", "2.weight"):
        expected = torch.where(before[name].abs() > threshold, before[name], 0.0)
        assert torch.equal(model.get_parameter(name), expected)
        assert torch.equal(found.mask[name], expected != 0)
    assert found.density == found.density_asked == 0.25
    assert sum(layer["alive"] for layer in found.layers.values()) == 48


def test_two_of_four_keeps_the_largest_pair_of_every_window():
    model = mlp()
    before = model[0].weight.detach().clone()
    assert vit_rsst.prune(model, granularity="2:4").density == 0.5
    windows = before.abs().view(16, 2, 4)
    kept = windows >= windows.sort(-1).values[..., 2:3]
    assert torch.equal(model[0].weight.detach() != 0, kept.view(16, 8))


def test_wanda_multiplies_each_weight_by_the_norm_of_its_input():
    model, (images, labels) = mlp(), (torch.randn(30, 8), torch.randint(4, (30,)))
    hidden = model[1](model[0](images)).detach()
    scores = [model[0].weight.detach().double().abs() * images.double().square().mean(0).sqrt()]
    scores += [model[2].weight.detach().double().abs() * hidden.double().square().mean(0).sqrt()]
    scores = [score / score.mean() for score in scores]  # layers compete relative to their mean
    loader = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    found = vit_rsst.prune(model, 0.5, criterion="activation_l2", calibration=loader)
    threshold = torch.cat([score.flatten() for score in scores]).sort().values[95]
    assert torch.equal(found.mask["0.weight"], scores[0] > threshold)
    assert torch.equal(found.mask["2.weight"], scores[1] > threshold)


def test_a_loader_and_a_callable_that_returns_it_give_the_same_mask_and_modes_are_kept():
    loader = [(torch.randn(9, 8), torch.randint(4, (9,)))]
    models = [mlp(), mlp()]
    for model in models:
        model.train()
        model[1].eval()
    words = {"criterion": "saliency"}
    one = vit_rsst.prune(models[0], 0.5, calibration=loader, **words)
    two = vit_rsst.prune(models[1], 0.5, calibration=lambda: iter(loader), **words)
    assert one.mask.fingerprint() == two.mask.fingerprint()
    assert [module.training for module in models[0]] == [True, False, True]


def test_the_classifier_and_the_first_layer_of_a_wrapped_timm_model_are_spared():
    inside = nn.ModuleDict({"net": vit()})
    found = vit_rsst.prune(inside, 0.5)
    assert list(found.mask) == [f"net.{name}" for name in vit_rsst.prune(vit(), 0.5).mask]
    assert not any("head" in name or "patch_embed" in name for name in found.mask)


@pytest.mark.parametrize("granularity", ["element", "head", "neuron", "head+neuron"])
def test_units_of_a_vit_are_removed_whole_and_can_be_cut_out(granularity):
    model = vit().eval()
    found = vit_rsst.prune(model, 0.5, granularity=granularity, min_neurons=1)
    assert found.density == pytest.approx(0.5, abs=0.15)
    images = torch.randn(2, 3, 8, 8)
    form = SlimForm(model, found.mask)
    assert form.is_narrower == (granularity != "element")
    assert torch.allclose(form.net(images), model(images), atol=1e-5)


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_resnet18_of_torchvision_is_pruned_by_element_and_by_channel(granularity):
    model = resnet().eval()
    found = vit_rsst.prune(model, 0.5, granularity=granularity, protect=["conv1*", "fc*"])
    assert found.density == pytest.approx(0.5, abs=0.01)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(SlimForm(model, found.mask).net(images), model(images), atol=1e-4)


@pytest.mark.parametrize(
    "granularity, criterion", [("element", "activation_l1"), ("head", "taylor"), ("head", "magnitude")]
)
def test_bert_of_transformers_is_pruned_by_element_and_by_unit(granularity, criterion):
    model = tiny_bert().eval()
    calibration = [tokens(seed) for seed in range(2)] if criterion != "magnitude" else None
    found = vit_rsst.prune(
        model, 0.5, granularity=granularity, criterion=criterion, min_neurons=1, protect=["*classifier*", "*pooler*"],
        calibration=calibration,
    )  # fmt: skip
    assert found.density == pytest.approx(0.5, abs=0.15)
    for name, kept in found.mask.masks.items():
        assert not (model.get_parameter(name).detach() * ~kept).any()
    for group in unit_groups(model) if granularity != "element" else ():
        if all(member.name in found.mask.masks for member in group.members):
            assert int(alive_units(group, found.mask).sum()) == found.units[group.name]["alive"]


@pytest.mark.parametrize("granularity", ["element", "2:4", "head+neuron"])
@torch.no_grad()
def test_with_compensation_the_same_mask_changes_the_logits_less(granularity):
    images, models, errors = torch.randn(200, 3, 8, 8), [vit().eval(), vit().eval()], []
    loader = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(64)]
    dense, found = models[0](images), []
    for model, words in zip(models, ({}, {"compensate": "least_squares", "calibration": loader}), strict=True):
        sparsity = None if granularity == "2:4" else 0.5
        found.append(vit_rsst.prune(model, sparsity, granularity=granularity, min_neurons=1, **words))
        errors.append(float((model(images) - dense).square().mean()))
        assert all(not model.get_parameter(name)[~kept].any() for name, kept in found[-1].mask.masks.items())
    assert found[0].mask.fingerprint() == found[1].mask.fingerprint()
    assert errors[1] < 0.7 * errors[0]
    assert found[0].compensation is None
    assert all(fit.error <= fit.error_masked for fit in found[1].compensation.fits.values())


def test_one_loader_serves_the_criterion_and_the_compensation_of_bert():
    model = tiny_bert().eval()
    words = {"criterion": "activation_l2", "compensate": "least_squares", "protect": ["*classifier*", "*pooler*"]}
    found = vit_rsst.prune(model, 0.5, calibration=iter([tokens(seed) for seed in range(2)]), **words)
    assert (len(found.compensation.fits), found.compensation.left) == (12, ())


def test_pruned_digits_are_still_told_apart():
    images, labels = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    vit_rsst.prune(model, 0.5)
    assert (model(images).argmax(1) == labels).float().mean() > 0.9


WRONG = [
    ({}, "prune(sparsity=…): missing; set it, such as 0.5, or a budget, such as {'flops': 0.5}."),
    ({"sparsity": 1.0}, "prune(sparsity=…): 1.0 is out of range; expected less than 1."),
    ({"sparsity": 0.999}, "prune(sparsity=…): a sparsity of 0.999 cannot be reached, at most 0.9843"),
    ({"sparsity": 0.7, "granularity": "2:4"}, "prune(sparsity=…): 0.7 does not match 2:4, which implies 0.5"),
    ({"sparsity": 0.5, "granularity": "heads"}, "prune(granularity=…): unknown value 'heads'; expected element,"),
    ({"sparsity": 0.5, "granularity": "head"}, "prune(granularity=…): Sequential has no head that can be removed"),
    ({"sparsity": 0.5, "criterion": "magnitud"}, "prune(criterion=…): unknown criterion 'magnitud'"),
    ({"sparsity": 0.5, "criterion": "movement"}, "prune(criterion=…): movement adds up over training steps, and none"),
    ({"sparsity": 0.5, "criterion": "saliency"}, "prune(calibration=…): missing; saliency needs gradients: pass a"),
    ({"sparsity": 0.5, "calibration": [1]}, "prune(calibration=…): has no effect with magnitude; omit it."),
    ({"sparsity": 0.5, "compensate": "obs"}, "prune(compensate=…): unknown value 'obs'; expected none or"),
    ({"sparsity": 0.5, "compensate": "least_squares"}, "prune(calibration=…): missing; least_squares needs inputs of"),
    ({"sparsity": 0.5, "compensate": "least_squares", "calibration": []}, "prune(calibration=…): compensation needs"),
    ({"sparsity": 0.5, "protect": ["heads.*"]}, "prune(protect=…): 'heads.*' matches no prunable weight; examples"),
    ({"sparsity": 0.5, "protect": ["*"]}, "prune(protect=…): no prunable weight is left; protect fewer or include"),
    ({"sparsity": 0.5, "scope": torch.ones(1)}, "prune: takes plain numbers, strings, lists and mappings (not"),
    ({"sparsity": 0.5, "criterion": "saliency", "calibration": []}, "prune(calibration=…): the criterion needs"),
    ({"sparsity": 0.5, "criterion": "saliency", "calibration": [1]}, "prune(calibration=…): a batch of type int;"),
]  # fmt: skip


@pytest.mark.parametrize("words, sentence", WRONG)
def test_a_wrong_keyword_is_one_sentence_in_the_words_of_the_call_and_changes_nothing(words, sentence):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError) as caught:
        vit_rsst.prune(model, **words)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_something_else_than_a_model_is_named():
    with pytest.raises(InputError, match=r"^prune\(model=…\): a str; expected a torch.nn.Module\.$"):
        vit_rsst.prune("vit_tiny", 0.5)
