"""refill against its budget rule, rst from its initial weights, ste in the forward pass and in its dense weights."""

from pathlib import Path

import pytest
import torch
from toys import Toy, copied, train_rounds, vit

from vit_rsst import loop
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.pruning.criteria import CRITERIA, Evidence
from vit_rsst.pruning.granularity import alive_units
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.methods.refill import Refill
from vit_rsst.pruning.methods.rst import Rst
from vit_rsst.pruning.methods.ste import StraightThrough
from vit_rsst.pruning.selector import Floors, Selector
from vit_rsst.tickets import ticket_file


@pytest.mark.parametrize("ratio, kept", [(0.0, [9, 12]), (0.5, [20, 22]), (1.0, [32, 32])])
def test_refill_keeps_as_many_neurons_as_the_element_budget_allows(ratio, kept):
    """32 neurons of 16 + 16 weights; 300 elements are left of the first block, 390 of the second: 9.4, 12.2."""
    weights, groups = prunable_parts(vit(), "neuron")
    elements = MaskSet({name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()})
    for block, number in enumerate((300, 390)):
        elements[f"blocks.{block}.mlp.fc1.weight"].view(-1)[:number] = True  # the first neurons have all of them
    selector = Selector(CRITERIA["survivors"], "neuron", groups, floors=Floors(min_neurons=2))
    filled = selector.fill(Evidence(weights, MaskSet.full(weights), 0), elements, ratio)
    for group, number in zip(groups, kept, strict=True):
        alive = alive_units(group, filled)
        assert int(alive.sum()) == number
        assert bool(alive[:number].all())  # those with the most survivors, ties by index
        assert bool(filled[group.members[0].name][:number].all())  # refilled whole
        assert bool(filled[group.members[1].name][:, :number].all())


def test_refill_respects_the_minimum_at_any_budget():
    weights, groups = prunable_parts(vit(), "head+neuron")
    nothing = MaskSet({name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()})
    selector = Selector(CRITERIA["survivors"], "head+neuron", groups, floors=Floors(min_neurons=3))
    filled = selector.fill(Evidence(weights, MaskSet.full(weights), 0), nothing, 0.0)
    assert [int(alive_units(group, filled).sum()) for group in groups] == [1, 3, 1, 3]


def test_post_refill_trains_the_units_of_the_last_element_mask(tmp_path):
    toy = Toy(Refill(feedback="post"), network=vit, granularity="neuron", criterion="survivors", final_sparsity=0.75)
    run = Toy(**{**vars(toy), "round_epochs": (1, 1, 1, 1), "rewind_epoch": 0}).make(tmp_path)
    run.controller.rounds = 2  # and one round more
    loop.train(run)
    found = [ticket_file.load(path).mask for path in sorted((tmp_path / "tickets").glob("*.safetensors"))]
    groups = run.controller.selector.groups
    assert [round(mask.density, 3) for mask in found[:3]] == [1.0, 0.5, 0.25]
    assert any(0 < int(row.sum()) < 16 for row in found[2]["blocks.0.mlp.fc1.weight"])  # scattered elements
    for group in groups:
        rows = found[3][group.members[0].name]
        assert bool((rows.all(1) == rows.any(1)).all())  # whole units
        paid = sum(int(found[2][member.name].sum()) for member in group.members) / 32
        assert int(rows.any(1).sum()) == max(int(paid), 2)


def test_rst_starts_every_round_from_the_initial_weights_with_growing_random_sets(tmp_path):
    run = Toy(Rst(), criterion="random", round_epochs=(2, 2, 2), rewind_epoch=0).make(tmp_path)
    begin, starts = run.controller.begin_round, []

    def watched(round: int) -> bool:
        begun = begin(round)
        starts.append(copied({name: w for name, w in run.controller.weights.items()}))
        return begun

    run.controller.begin_round = watched
    train_rounds(run)
    assert all(torch.equal(starts[1][name], starts[0][name]) for name in starts[0])
    assert any(bool((starts[2][name] == 0).any()) for name in starts[0])  # what round 1 removed stays so
    for name in starts[0]:
        alive = starts[2][name] != 0
        assert torch.equal(starts[2][name][alive], starts[0][name][alive])


def straight_through(folder: Path, **more: object) -> loop.Run:
    method = StraightThrough(window=(0.0, 0.5), interval=1)
    return Toy(method, network=vit, round_epochs=(6,), final_sparsity=0.75, **more).make(folder)


def test_ste_trains_dense_weights_and_uses_the_largest_in_the_forward_pass(tmp_path):
    run = straight_through(tmp_path)
    seen: list[dict[str, torch.Tensor]] = []
    forward = run.net.forward
    run.net.forward = lambda images: seen.append(copied(dict(run.controller.weights))) or forward(images)
    run.controller.begin_round(0)
    came_back = 0
    for _ in run.progress.remaining_epochs():
        before = run.controller.mask
        loop.train_epoch(run)
        came_back += run.controller.mask.minus(before).num_alive
        mask = run.controller.mask
        weights = {name: weight.detach() for name, weight in run.controller.weights.items()}
        assert all(bool(w.all()) for w in weights.values())  # dense between the steps
        if run.progress.round_step == 12:  # the window has just ended: its last choice is of weights as they stand
            flat = torch.cat([w.abs().flatten() for w in weights.values()])
            threshold = flat.topk(mask.num_alive).values[-1]
            assert all(torch.equal(mask[name], weights[name].abs() >= threshold) for name in mask)
        with run.controller.as_deployed():
            assert all(not bool(w[~mask[name]].any()) for name, w in run.controller.weights.items())
        assert all(torch.equal(weights[name], w) for name, w in run.controller.weights.items())
    assert came_back > 0
    assert any(bool((w == 0).any()) for w in seen[-1].values())
    report = run.controller.end_round()
    assert report.density == pytest.approx(0.25, abs=1e-3)
    assert all(not bool(w[~run.controller.mask[n]].any()) for n, w in run.controller.weights.items())


def test_the_gradient_of_ste_is_that_of_the_masked_weights(tmp_path):
    run = straight_through(tmp_path)
    run.controller.begin_round(0)
    generator = torch.Generator().manual_seed(1)
    run.controller.mask = MaskSet(
        {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in run.controller.weights.items()}
    )
    micro_batches = next(iter(run.loader.steps(run.progress)))
    images, labels = micro_batches[0]
    run.controller.before_forward()
    run.loss(run.net(images), labels).backward()
    run.controller.after_backward(run.progress)
    found = copied({name: weight.grad for name, weight in run.controller.weights.items()})
    dense = copied(dict(run.controller.weights))
    with torch.no_grad():
        for name, weight in run.controller.weights.items():
            weight.mul_(run.controller.mask[name])
    run.net.zero_grad()
    run.loss(run.net(images), labels).backward()
    for name, weight in run.controller.weights.items():
        assert torch.equal(found[name], weight.grad)
        assert bool(found[name][~run.controller.mask[name]].any())  # the removed learn as well
        assert bool(dense[name].all())
