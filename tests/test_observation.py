"""What one pass through a model shows: parameters that the loss does not reach, units that cannot be cut."""

import pytest
import torch
from torch import Tensor, nn

from vit_rsst.errors import InputError
from vit_rsst.models import observation, zoo
from vit_rsst.models.anatomy import prunable_parts, prunable_weights, unit_groups

VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
HF = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}


def make(name: str, args: dict, device: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create(*zoo.describe(name, args, 10), device=device)


@pytest.mark.parametrize("device", [None, "meta"])
def test_what_the_loss_does_not_reach_is_frozen_and_no_longer_prunable(device):
    net = make("hf:siglip", {"vision_config": HF | {"intermediate_size": 48}}, device)
    unused = {name for name in prunable_weights(net) if ".head." in name}
    assert unused
    unreached = observation.observe(net, 32).unreached
    observation.freeze_(net, unreached)
    assert unused < set(unreached)
    assert not any(".head." in name for name in prunable_weights(net))
    [note] = observation.notes(net)
    assert note.startswith("frozen")
    assert unreached[0] in note
    assert not any(".head." in group.name for group in prunable_parts(net, "neuron")[1])


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny", VIT),
        ("dynamic_vit", VIT | {"stages": [1]}),
        ("hf:deit", HF | {"intermediate_size": 48}),
        ("resnet20", {}),
    ],
)
def test_of_a_model_that_uses_all_of_itself_nothing_is_frozen_and_nothing_changed(name, args):
    net = make(name, args).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert set(observation.observe(net, 32).unreached) <= {"deit.embeddings.mask_token", "cls_classifier.weight"}
    observation.check_units(net, unit_groups(net), 32)
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


class Stubborn(nn.Module):
    """An attention-like module that takes as many features for granted as come in, or reads a dead unit's bias."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault
        self.pretrained_cfg = {"first_conv": "stem", "classifier": "head"}
        self.stem = nn.Linear(3, 4)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.mean((2, 3)))
        hidden = self.fc1(x)
        if self.fault == "shape":
            hidden = hidden.reshape(len(x), 6)
        x = self.fc2(hidden) + (hidden.mean(1, keepdim=True) if self.fault == "value" else 0)
        return self.head(x)


@pytest.mark.parametrize(
    ("fault", "reason"), [("shape", "the forward pass fails without it: shape"), ("value", "logits differ by")]
)
def test_units_that_cannot_leave_are_refused_with_the_reason(fault, reason):
    torch.manual_seed(0)
    net = Stubborn(fault)
    groups = unit_groups(net)
    assert [group.kind for group in groups] == ["neuron"]
    with pytest.raises(InputError, match=rf"pruning\.granularity: no neuron of this Stubborn.*{reason}.*use element"):
        observation.check_units(net, groups, 8)
    observation.check_units(Stubborn("none"), groups, 8)


def test_a_shape_that_does_not_fit_is_found_without_numbers():
    with pytest.raises(InputError, match="the forward pass fails"):
        observation.check_units(Stubborn("shape").to("meta"), unit_groups(Stubborn("shape")), 8)


def test_a_criterion_of_inputs_refuses_weights_whose_inputs_are_not_seen():
    net = make("vit_tiny", VIT)
    observed = observation.observe(net, 32)
    weights = prunable_weights(net)
    assert set(weights) <= observed.applied
    observation.check_inputs(observed, weights, [])
    with pytest.raises(InputError, match=r"pruning\.criterion.*pos_embed"):
        observation.check_inputs(observed, {**weights, "pos_embed": net.pos_embed}, [])


def test_a_model_that_fails_or_has_no_gradient_at_all_shows_nothing_and_is_left_to_the_checks():
    net = make("vit_tiny", VIT)
    assert observation.observe(net, 40) == observation.Observed()  # of another image size
    observation.check_units(net, unit_groups(net), 40)
    observation.check_inputs(observation.Observed(), prunable_weights(net), [])
    net.register_forward_hook(lambda module, args, output: output.detach())
    assert observation.observe(net, 32).unreached == ()
