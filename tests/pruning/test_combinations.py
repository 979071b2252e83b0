"""Every method × granularity × criterion: valid combinations work, invalid ones say why."""

from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from test_continuing import StopAt, end
from toys import CLASSES, Toy, vit

from vit_rsst import loop
from vit_rsst.errors import InputError, Stopped
from vit_rsst.models.resnet import CifarResNet
from vit_rsst.pruning.criteria import CRITERIA
from vit_rsst.pruning.granularity import alive_units
from vit_rsst.pruning.patterns import UNIT_KINDS
from vit_rsst.pruning.plan import METHODS
from vit_rsst.recipe.loading import load
from vit_rsst.run import resume
from vit_rsst.run.state import Run
from vit_rsst.tickets import ticket_file

BUILTIN = ("constant", "dense", "gmp", "imp", "refill", "rigl", "rsst", "rst", "set", "ste")
MOVING = {"set", "rigl"}
CRITERION = ("magnitude", "survivors", "activation_l1", "activation_l2", "saliency", "taylor", "random")
GRANULARITY = ("element", "head", "neuron", "head+neuron", "channel", "2:4")
UNIT_CRITERIA = ("survivors", "taylor")

EVERY = [*product(BUILTIN, GRANULARITY, CRITERION), *product(("gmp", "imp", "set"), GRANULARITY, ("movement",))]


def is_allowed(method: str, granularity: str, criterion: str) -> bool:
    """As the pages say it, written a second time."""
    if (method == "ste" and criterion != "magnitude") or (method in MOVING and granularity in UNIT_KINDS):
        return False
    if method in MOVING and criterion == "movement":
        return False
    return granularity in UNIT_KINDS or not (method == "refill" or criterion in UNIT_CRITERIA)


ALLOWED = [case for case in EVERY if is_allowed(*case)]
REFUSED = [case for case in EVERY if not is_allowed(*case)]


def recipe_text(method: str, granularity: str, criterion: str) -> str:
    sparsity = "" if granularity == "2:4" else ", final_sparsity: 0.5"
    return (
        f"name: r\nmodel: {{start_from: {'t' if method == 'constant' else 'null'}}}\npruning:\n  method: {method}\n"
        f"  granularity: '{granularity}'\n  criterion: {criterion}\n  schedule: {{rounds: 2{sparsity}}}\n"
    )


def test_every_combination_is_counted():
    assert set(BUILTIN) <= set(METHODS)
    assert {*CRITERION, "movement"} <= set(CRITERIA)
    assert (len(EVERY), len(ALLOWED), len(REFUSED)) == (438, 294, 144)


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_an_invalid_combination_says_why(tmp_path, case):
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text(*case), encoding="utf-8")
    with pytest.raises(InputError, match=r"pruning\.(granularity|criterion): .*; use |is not for it"):
        load(path)


def toy(method: str, granularity: str, criterion: str) -> Toy:
    gradual = {"window": (0.0, 0.7), "interval": 2} if method in {"gmp", "ste", *MOVING} else {}
    made = METHODS[method](**gradual)
    return Toy(
        made,
        network=vit if granularity != "channel" else lambda: CifarResNet(CLASSES, depth=8, width=4),
        round_epochs=(6,) if made.one_round else (2, 2, 2),
        steps_per_epoch=2,
        final_sparsity=0.5,
        curve="linear" if granularity == "2:4" else "geometric",
        criterion=criterion,
        granularity=granularity,
        scope="isomorphic" if granularity == "head+neuron" else "global",
        rewind_epoch=0 if method == "rst" else None,
    )


def make(case: tuple[str, str, str], folder: Path) -> Run:
    run = toy(*case).make(folder)
    if case[0] == "constant":  # as if it had started from a sparse ticket
        generator = torch.Generator().manual_seed(7)
        sparse = {n: torch.rand(w.shape, generator=generator) < 0.5 for n, w in run.controller.weights.items()}
        run.controller._set_mask_(type(run.controller.mask)(sparse))
    return run


@pytest.mark.parametrize("case", ALLOWED, ids="-".join)
def test_every_valid_combination_writes_nested_sparse_tickets_and_resumes_after_a_stop(tmp_path, case):
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text(*case), encoding="utf-8")
    assert load(path).pruning.method_name == case[0]

    run = make(case, tmp_path / "whole")
    loop.train(run)
    files = sorted((tmp_path / "whole" / "tickets").glob("*.safetensors"))
    found = [ticket_file.load(file) for file in files]
    assert len(found) == len(run.progress.round_epochs)
    for ticket in found:
        assert not any(bool(ticket.state[name][~ticket.mask[name]].any()) for name in ticket.mask)
    assert all(later.mask.nested_in(earlier.mask) for earlier, later in pairwise(found))
    check_density(case, run)
    last = found[-1]
    assert all(torch.equal(last.state[name], tensor) for name, tensor in run.net.state_dict().items())

    stopped = make(case, tmp_path / "stopped")
    stopped.stop = StopAt(5)
    with pytest.raises(Stopped):
        loop.train(stopped)
    again = make(case, tmp_path / "stopped")
    resume.restore_(again, again.checkpointer.load())
    loop.train(again)
    assert end(tmp_path / "stopped") == end(tmp_path / "whole")


def check_density(case: tuple[str, str, str], run: Run) -> None:
    """Exactly half of the elements, two of every four inputs, or half of the units as near as whole ones come."""
    method, granularity, _ = case
    mask, groups = run.controller.mask, run.controller.selector.groups
    if method == "dense":
        assert mask.density == 1.0
    elif method == "constant":
        assert 0.4 < mask.density < 0.6
    elif granularity == "element":
        assert mask.num_alive == round(0.5 * mask.num_elements)
    elif granularity == "2:4":
        assert all(bool((m.reshape(-1, 4).sum(1) == 2).all()) for m in mask.masks.values())
    else:
        alive = [alive_units(group, mask) for group in groups]
        for group, units in zip(groups, alive, strict=True):
            assert units.sum() >= {"neuron": 2}.get(group.kind, 1)
            for member in group.members:  # a unit lives or dies as a whole
                owned = mask[member.name].movedim(member.dim, 0)[member.index].flatten(1)
                assert granularity == "channel" or bool((owned.all(1) == units).all())
        if method == "refill":  # whole units that the elements of each group pay for, and at least one head
            one_head = sum(16 * 8 * 4 for group in groups if group.kind == "head")
            assert mask.num_alive <= 0.5 * mask.num_elements + one_head
        else:
            for kind in UNIT_KINDS[granularity]:
                kept = sum(int(u.sum()) for g, u in zip(groups, alive, strict=True) if g.kind == kind)
                total = sum(group.units for group in groups if group.kind == kind)
                assert granularity == "channel" or kept == round(0.5 * total)
            assert abs(mask.density - 0.5) < 0.05
