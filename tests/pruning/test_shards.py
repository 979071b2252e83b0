"""Masks of weights of which every rank holds some rows: bit for bit those of one process.

Weights are quantised, so that most scores are tied, and have odd numbers of rows: some units lie on two ranks, and of
some weights a rank holds nothing. Granularities, criteria and scopes are all that there are.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import faulty
import pytest
import torch
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, distributed, nn

from vit_rsst import files, shards
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.pruning.allocation import Allocation
from vit_rsst.pruning.contest import Entry, contest
from vit_rsst.pruning.criteria import CRITERIA, Evidence, SiteStatistics, Statistics
from vit_rsst.pruning.granularity import units_left
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.movement import Movement
from vit_rsst.pruning.patterns import GRANULARITIES, UNIT_KINDS
from vit_rsst.pruning.plan import Density
from vit_rsst.pruning.selector import Floors, Selector
from vit_rsst.pruning.swapping import swap
from vit_rsst.recipe.schema import Pruning
from vit_rsst.tickets import ticket_file
from vit_rsst.training.ema import Ema

SCOPES = get_args(get_args(get_type_hints(Pruning)["scope"])[0])
PATTERNS = {"N:M": ("2:4", "1:2")}


def model() -> nn.Module:
    """Heads of 10 rows, which two or three ranks split; a head of 5 classes; one row, which most ranks lack; and a
    residual block of 4 channels, of which the last of three ranks holds none."""
    torch.manual_seed(0)
    net = VisionTransformer(img_size=8, patch_size=4, embed_dim=20, depth=2, num_heads=2, mlp_ratio=1.4, num_classes=5)
    net.pretrained_cfg = {"first_conv": "patch_embed.proj", "classifier": "head"}
    net.add_module("gate", nn.Linear(20, 1))
    net.add_module("stage", BasicBlock(4, 4))
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_((weight * 40).round() / 4)
    return net


def sharded(tensor: Tensor, mesh: object) -> Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor.detach(), mesh, [Shard(0)])


def statistics(weights: dict, groups: list) -> Statistics:
    """Small whole numbers, so that scores are tied; the gradient is sharded as the weights are."""
    draw = torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randint(1, 4, shape, generator=draw).double()

    sites = {g.name: SiteStatistics(*(some(g.units) for _ in range(4))) for g in groups}
    absolute, square = ({name: some(w.shape[1]) for name, w in weights.items()} for _ in range(2))
    return Statistics(absolute, square, {name: some(*w.shape).float() for name, w in weights.items()}, sites)


def selections(net: nn.Module, every: bool) -> Iterator[tuple[str, Selector, Density, dict[str, Tensor], MaskSet]]:
    """Granularities with criteria and scopes, some elements dead already; all combinations, or each of them once."""
    scope_of = itertools.cycle(SCOPES)
    for granularity in itertools.chain.from_iterable(PATTERNS.get(name, (name,)) for name in GRANULARITIES):
        weights, groups = prunable_parts(net, granularity, ["head.weight"])
        alive = MaskSet({name: weight.detach() != 0.25 for name, weight in weights.items()})
        criteria = [CRITERIA[name] for name in CRITERIA if groups or CRITERIA[name].elements is not None]
        criteria = [one for one in criteria if one.needs != "moments"]  # refused: they need whole weights
        for rule, scope in itertools.product(criteria, SCOPES if every else [None]):
            scope = scope or next(scope_of)
            if (groups and scope == "erk") or (":" in granularity and scope != "global" and every):
                continue
            allocation = Allocation(scope, (0.5, 1.5) if scope == "layer" else None, {"*fc1*": 0.8} if groups else {})
            chosen = Selector(rule, granularity, groups, allocation, Floors(3, 0.9))
            for density in (0.8, 0.6, 0.2) if every else (0.3,):
                yield f"{granularity}, {rule.__doc__}, {scope}, {density}", chosen, density, weights, alive
        if groups:  # budgets, and densities by kind
            rule = CRITERIA["magnitude"]
            for dearer, floors in ((0.0, Floors()), (1.5, Floors()), (1.5, Floors(2, 0.7))):
                costs = {group.name: 7.0 + dearer * place for place, group in enumerate(groups)}
                chosen = Selector(rule, granularity, groups, Allocation(never_above=True), floors, costs)
                yield f"{granularity}, {costs}, {floors}", chosen, 0.45, weights, alive
            by_kind = {kind: 0.3 + 0.2 * place for place, kind in enumerate(UNIT_KINDS[granularity])}
            yield f"{granularity}, {by_kind}", Selector(rule, granularity, groups), by_kind, weights, alive


def contests() -> Iterator[tuple[list[Tensor], list[Tensor], list[int], int]]:
    """Scores of few values, among them both zeros, infinities and a subnormal, of weights with one to seven rows."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 1e-40, 0.5])
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        shapes = torch.randint(1, 8, (3, 2), generator=draw).tolist()
        scores = [values[torch.randint(len(values), shape, generator=draw)] for shape in shapes]
        alive = [torch.rand(shape, generator=draw) < 0.7 for shape in shapes]
        least = torch.randint(0, 5, (3,), generator=draw).tolist()
        yield scores, alive, least, int(torch.randint(0, sum(map(torch.numel, scores)) + 1, (), generator=draw))


def joined(rank: int, world: int, port: int) -> object:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world,))


def equal(masks: MaskSet, expected: MaskSet) -> bool:
    return all(torch.equal(shards.whole(masks[name]), expected[name]) for name in expected)


def select(rank: int, world: int, port: int, every: bool = False) -> None:
    mesh, number = joined(rank, world, port), 0
    for what, selector, density, weights, alive in selections(model(), every):
        moved = {name: weight.detach() * 4 for name, weight in weights.items()}
        whole = Evidence(weights, alive, 7, statistics(weights, selector.groups), movement=moved)
        split = replace(
            whole,
            weights={name: sharded(weight, mesh) for name, weight in weights.items()},
            alive=MaskSet({name: sharded(mask, mesh) for name, mask in alive.masks.items()}),
            movement={name: sharded(movement, mesh) for name, movement in moved.items()},
            statistics=replace(
                whole.statistics, gradient={n: sharded(g, mesh) for n, g in whole.statistics.gradient.items()}
            ),
        )
        expected, found = selector.units(whole, density), selector.units(split, density)
        assert equal(found, expected), what
        assert (found.num_alive, found.fingerprint()) == (expected.num_alive, expected.fingerprint()), what
        number += 1
        assert units_left(selector.groups, found) == units_left(selector.groups, expected), what
        assert selector.alive_cost(split.weights, found) == selector.alive_cost(weights, expected), what
        if selector.groups:
            elements, split_elements = selector.elements(whole, density), selector.elements(split, density)
            assert equal(split_elements, elements), what
            assert equal(selector.fill(split, split_elements, 0.2), selector.fill(whole, elements, 0.2)), what
    assert number > (60 if every else 20)
    for scores, living, least, k in contests():
        whole_entries, split_entries = (
            [
                Entry(f"{i}", "", cut(s), cut(a), 1.0, n)
                for i, (s, a, n) in enumerate(zip(scores, living, least, strict=True))
            ]
            for cut in (lambda tensor: tensor, lambda tensor: sharded(tensor, mesh))
        )
        for ours, theirs in zip(contest(split_entries, k), contest(whole_entries, k), strict=True):
            assert torch.equal(shards.whole(ours), theirs), (scores, living, least, k)
    distributed.destroy_process_group()


def select_with_every_combination(rank: int, world: int, port: int) -> None:
    select(rank, world, port, every=True)


def check_movement(weights: dict[str, nn.Parameter], split: dict[str, nn.Parameter], mesh: object) -> None:
    both = [Movement.zeros(of) for of in (weights, split)]
    for skipped in (0.0, 1.0, 0.0):
        for name, weight in weights.items():
            gradient = (weight.detach() * 3 + 0.5) * (torch.nan if skipped else 1.0)
            weight.grad, split[name].grad = gradient, sharded(gradient, mesh)
        for movement, of in zip(both, (weights, split), strict=True):
            movement.note(of)
            movement.add_(torch.tensor(skipped))
    whole, of_shards = both
    assert all(torch.equal(shards.whole(of_shards.scores[name]), score) for name, score in whole.scores.items())
    again = Movement.zeros(split)
    again.load_(whole.scores)
    assert all(torch.equal(shards.whole(again.scores[name]), score) for name, score in whole.scores.items())
    for weight in weights.values():
        weight.grad = None


def edit_shards(rank: int, world: int, port: int) -> None:
    mesh, net = joined(rank, world, port), model()
    weights, _ = prunable_parts(net, "element")
    split = {name: sharded(weight, mesh) for name, weight in weights.items()}
    one = split["gate.weight"]
    assert len(shards.local(one)) == (rank == 0), "one row: the other ranks hold none"
    for name, weight in split.items():
        assert torch.equal(shards.local(weight), weights[name][shards.rows(weight)]), name
        assert torch.equal(shards.whole(shards.placed(weights[name], weight)), weights[name]), name
    alive = MaskSet({name: weight.detach() > 0 for name, weight in weights.items()})
    mask = MaskSet.unpack(alive.pack(), split)
    assert equal(mask, alive)
    assert mask.layers() == alive.layers()
    assert not mask.is_full
    assert mask.pack().keys() == alive.pack().keys()
    assert all(torch.equal(bits, alive.pack()[name]) for name, bits in mask.pack().items())
    assert torch.equal(shards.before(torch.tensor([rank, 1]), one), torch.tensor([sum(range(rank)), rank]))
    gathered = shards.gathered(split)
    assert (list(gathered) == list(split)) == (rank == 0), "no other rank keeps whole tensors"
    for gradients in (None, {name: (weight.detach() * 3).round() for name, weight in weights.items()}):
        shared = gradients and {name: sharded(gradient, mesh) for name, gradient in gradients.items()}
        assert equal(swap(split, mask, 0.3, shared, 5), swap(weights, alive, 0.3, gradients, 5))
    check_movement(weights, {name: nn.Parameter(sharded(weight, mesh)) for name, weight in weights.items()}, mesh)
    broken = {**split, "gate.weight": one * torch.nan}
    with pytest.raises(ValueError, match="not a number"):  # on every rank, though one holds it
        Selector(CRITERIA["magnitude"]).units(Evidence(broken, mask, 0), 0.2)
    for name, weight in split.items():
        net.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(weight)
    state, masks = shards.gathered(net.state_dict()), mask.gathered()
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = Path(folder) / "ours.safetensors", Path(folder) / "theirs.safetensors"
            ticket_file.save(ours, state, masks, {"seed": "0"})
            ticket_file.save(theirs, model().state_dict(), alive, {"seed": "0"})
            assert files.sha256(ours) == files.sha256(theirs), "a ticket does not tell how its weights were held"
    averages = {}
    for owner, removed in ((net, mask), (model(), alive)):
        average = averages[owner] = Ema(owner, 0.5)
        with torch.no_grad():
            owner.gate.weight.mul_(3)
        average.update_()
        average.zero_(removed.masks)
        with average.in_place():
            average.follow_(removed.masks)
    split, expected = (average.tensors for average in averages.values())
    assert all(torch.equal(shards.whole(value), expected[name]) for name, value in split.items())
    distributed.destroy_process_group()


CASES = [
    (select, 2),
    (edit_shards, 3),
    pytest.param(select, 3, marks=pytest.mark.slow),
    pytest.param(edit_shards, 2, marks=pytest.mark.slow),
    pytest.param(select_with_every_combination, 2, marks=pytest.mark.slow),
    pytest.param(select_with_every_combination, 3, marks=pytest.mark.slow),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("work", "world"), CASES)
def test_shards_give_the_same_masks_as_whole_weights(work, world):
    port = faulty.free_port()
    processes = [faulty.CONTEXT.Process(target=work, args=(rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(faulty.SECONDS)
    assert [process.exitcode for process in processes] == [0] * world
