"""Methods: common properties of all, rsst against imp bit for bit, gmp against its cubic, and an external method."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from toys import Toy, bits, copied, train_rounds, vit

from vit_rsst import loop
from vit_rsst.errors import InputError
from vit_rsst.progress import Progress
from vit_rsst.pruning.criteria import Criterion, Evidence
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.methods.dense import Dense
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import METHODS, Gradual, Method, Penalty, PruningView, RoundPlan, register_method
from vit_rsst.pruning.preview import preview
from vit_rsst.recipe.schema import Pruning, Recipe, Schedule, Train
from vit_rsst.tickets import ticket_file


def loaded(folder: Path) -> list[ticket_file.Ticket]:
    return [ticket_file.load(path) for path in sorted((folder / "tickets").glob("*.safetensors"))]


def scores(folder: Path) -> list[dict[str, str]]:
    """rounds.csv without times."""
    with open(folder / "rounds.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


# -- every method × scope × criterion


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("constant", "refill")])
def test_every_method_writes_nested_tickets_of_exactly_the_target_density(tmp_path, name, criterion, scope):
    method = METHODS[name]()
    epochs = (4,) if method.one_round else (1, 1, 1, 1)
    toy = Toy(method, criterion=criterion, scope=scope, round_epochs=epochs, final_sparsity=0.875)
    run = toy.make(tmp_path)
    loop.train(run)
    found = loaded(tmp_path)
    assert len(found) == len(epochs)
    sizes = [w.numel() for w in run.controller.weights.values()]
    asked = [float(row["density_asked"]) for row in scores(tmp_path)]
    if name == "dense":
        densities = [1.0]
    elif method.one_round:
        densities = [0.125]
    else:
        densities = [1.0, 0.5, 0.25, 0.125]
    assert asked == pytest.approx(densities)
    for ticket, density in zip(found, densities, strict=True):
        alive = round(density * sum(sizes)) if scope == "global" else sum(round(density * n) for n in sizes)
        assert ticket.mask.num_alive == alive
        for weight, mask in ticket.mask.masks.items():
            assert not ticket.state[weight][~mask].any()
            assert ticket.state[weight][mask].count_nonzero() > 0.9 * mask.sum()
    for earlier, later in pairwise(found):
        assert later.mask.nested_in(earlier.mask)
        assert not earlier.mask.nested_in(later.mask)


def test_random_selection_differs_between_rounds_and_seeds(tmp_path):
    seeds = []
    for seed in (0, 1):
        run = Toy(Imp(), criterion="random", round_epochs=(1, 1, 1, 1), seed=seed).make(tmp_path)
        selector = run.controller.selector
        draw = selector.criterion.elements
        watched = Criterion(lambda evidence, draw=draw: seeds.append(evidence.seed) or draw(evidence))
        run.controller.selector = replace(selector, criterion=watched)
        train_rounds(run)
    assert len(seeds) == len(set(seeds)) == 6


# -- rsst against imp


NOTHING_TO_SEE = {
    "removed at once": Rsst(remove_at=0.0),
    "removed at once with an empty window": Rsst(Penalty(window=(0.0, 0.0)), remove_at=0.0),
    "removed at once whatever its penalty": Rsst(Penalty("cosine", strength=9.0, window=(0.0, 1.0)), remove_at=0.0),
}


@pytest.mark.parametrize("optimizer, rewind_epoch", [("adamw", None), ("sgd", 0), ("adamw", 1)])
@pytest.mark.parametrize("method", NOTHING_TO_SEE)
def test_rsst_that_removes_at_once_is_imp_bit_for_bit(tmp_path, method, rewind_epoch, optimizer):
    """Whole runs of four rounds through the loop: weights, buffers, masks, scores and what-if gaps."""
    toy = Toy(Imp(), optimizer=optimizer, rewind_epoch=rewind_epoch, final_sparsity=0.8, round_epochs=(2, 1, 1, 1))
    for name, variant in (("imp", toy), ("rsst", replace(toy, method=NOTHING_TO_SEE[method]))):
        loop.train(variant.make(tmp_path / name))
    imp, rsst = loaded(tmp_path / "imp"), loaded(tmp_path / "rsst")
    assert [round(t.mask.density, 2) for t in imp] == [1.0, 0.58, 0.34, 0.2]
    for a, b in zip(imp, rsst, strict=True):
        assert bits(a.state) == bits(b.state)
        assert a.mask.fingerprint() == b.mask.fingerprint()
    assert scores(tmp_path / "imp") == scores(tmp_path / "rsst")
    assert bits(imp[2].state) != bits(imp[3].state)


def test_rsst_of_a_vision_transformer_that_removes_at_once_is_imp_bit_for_bit(tmp_path):
    toy = Toy(Imp(), network=vit, round_epochs=(2, 1, 1))
    runs = [replace(toy, method=m).make(tmp_path / str(i)) for i, m in enumerate((Imp(), Rsst(remove_at=0.0)))]
    for run in runs:
        train_rounds(run)
    assert bits(runs[0].net.state_dict()) == bits(runs[1].net.state_dict())
    assert runs[0].controller.mask.fingerprint() == runs[1].controller.mask.fingerprint()


def test_rsst_that_removes_later_is_not_imp(tmp_path):
    """Shows that the test above can fail."""
    toy = Toy(Imp(), round_epochs=(1, 2))
    runs = [replace(toy, method=m).make(tmp_path / str(i)) for i, m in enumerate((Imp(), Rsst(remove_at=0.5)))]
    for run in runs:
        train_rounds(run)
    assert runs[0].controller.mask.fingerprint() == runs[1].controller.mask.fingerprint()
    assert bits(runs[0].net.state_dict()) != bits(runs[1].net.state_dict())


def test_rsst_condemns_what_imp_removes_and_keeps_it_until_remove_at(tmp_path):
    run = Toy(Rsst(Penalty(window=(0.0, 0.5)), remove_at=0.5), round_epochs=(1, 2), steps_per_epoch=5).make(tmp_path)
    train_rounds(run, 1)
    scores = torch.cat([w.detach().abs().flatten() for w in run.controller.weights.values()])
    run.controller.begin_round(1)
    condemned = torch.cat([t.flatten() for t in run.controller.condemned.tensors()])
    assert scores[condemned].max() <= scores[~condemned].min()
    densities = []
    after_step = run.controller.after_step

    def watched(progress: object, skipped: bool = False) -> None:
        after_step(progress, skipped)
        densities.append(run.controller.mask.density)

    run.controller.after_step = watched
    train_rounds(run)
    assert densities == [1.0] * 4 + [pytest.approx(0.1, abs=1e-3)] * 6


def test_a_removal_at_the_end_happens_at_the_last_step_and_recovery_follows(tmp_path):
    run = Toy(Rsst(Penalty(window=(0.0, 1.0)), remove_at=1.0), round_epochs=(1, 1, 1)).make(tmp_path)
    run.controller.rounds = 1  # the third round is for recovery
    densities = []
    after_step = run.controller.after_step

    def watched(progress: object, skipped: bool = False) -> None:
        after_step(progress, skipped)
        densities.append(round(run.controller.mask.density, 2))

    run.controller.after_step = watched
    train_rounds(run)
    assert densities == [1.0] * 7 + [0.1] * 5
    assert run.controller.state.what_if_gap is None, "nothing was removed in the recovery round"


# -- gmp and dense


def cubic(done: Fraction, final: Fraction, size: int) -> int:
    """How many are alive of `size`: Zhu & Gupta, equation 1, in whole numbers."""
    return round((1 - final * (1 - (1 - done) ** 3)) * size)


@pytest.mark.parametrize(
    "interval, window, events",
    [
        (3, (0.1, 0.7), [7, 10, 13, 16, 19, 22, 25, 28]),  # 40 steps: grows from 4 to 28
        (7, (0.1, 0.7), [11, 18, 25, 28]),  # the end of the window is an event of its own
        (100, (0.1, 0.7), [28]),
        (1, (0.5, 0.6), [21, 22, 23, 24]),
        (10, (0.0, 1.0), [10, 20, 30, 40]),
    ],
)
def test_gmp_follows_the_cubic_at_every_interval_and_ends_exactly(tmp_path, interval, window, events):
    toy = Toy(Gmp(window, interval), curve="cubic", final_sparsity=0.8, round_epochs=(10,))
    run = toy.make(tmp_path)
    alive = []
    after_step = run.controller.after_step

    def watched(progress: object, skipped: bool = False) -> None:
        after_step(progress, skipped)
        alive.append(run.controller.mask.num_alive)

    run.controller.after_step = watched
    train_rounds(run)
    size = run.controller.mask.num_elements
    start, end = (round(Fraction(str(x)) * 40) for x in window)
    expected, now = [], size
    for step in range(1, 41):
        if step in events:
            now = cubic(Fraction(step - start, end - start), Fraction(4, 5), size)
        expected.append(now)
    assert alive == expected
    assert alive[-1] == round(Fraction(1, 5) * size)
    assert alive == sorted(alive, reverse=True)


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.1, 0.7), (0.3, 0.3), (1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("interval", [1, 4, 100])
@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_the_steps_that_are_due_are_those_with_a_fraction(window, interval, epochs):
    progress, gradual, found = Progress(7, (epochs,)), Gradual(window, interval), []
    for step in range(7 * epochs):
        if gradual.fraction_at(progress) is not None:
            found.append(step)
        progress.advance()
    assert gradual.due(7 * epochs) == found


class Unannounced(Gmp):
    """gmp that does not say when it removes."""

    gradual = None

    def refresh(self, progress: Progress, view: PruningView) -> MaskSet | None:
        return Gmp(self.window, self.interval).refresh(progress, view)


@pytest.mark.parametrize("window", [(0.1, 0.7), (0.4, 0.4)])
def test_the_preview_of_a_method_that_says_when_it_removes_is_that_of_asking_every_step(window):
    asked = (Progress(7, (3,)), 10, lambda fraction: 1.0 - 0.9 * fraction, lambda density: density, ["a", "b"])
    announced, unannounced = (
        [vars(r) | {"plan": None} for r in preview(m(window, 4), *asked)] for m in (Gmp, Unannounced)
    )
    assert announced == unannounced
    assert announced[0]["refreshes"]


def test_gmp_ranks_the_current_weights_at_each_removal(tmp_path):
    run = Toy(Gmp((0.0, 1.0), 8), curve="cubic", final_sparsity=0.8, round_epochs=(4,)).make(tmp_path)
    removals = 0
    sizes: dict[str, torch.Tensor] = {}
    selector, after_step = run.controller.selector, run.controller.after_step

    def watched_criterion(evidence: Evidence) -> dict[str, torch.Tensor]:
        sizes.update({name: w.detach().abs().clone() for name, w in evidence.weights.items()})
        return selector.criterion.elements(evidence)

    def watched(progress: object, skipped: bool = False) -> None:
        nonlocal removals
        before = run.controller.mask
        after_step(progress, skipped)
        kept, leaving = run.controller.mask, before.minus(run.controller.mask)
        if not leaving.num_alive:
            return
        removals += 1
        largest = max(float(sizes[n][leaving[n]].max()) for n in leaving if leaving[n].any())
        assert largest <= min(float(sizes[n][kept[n]].min()) for n in kept if kept[n].any())
        assert all(torch.equal(w.detach().abs(), sizes[n] * kept[n]) for n, w in run.controller.weights.items())

    run.controller.selector = replace(selector, criterion=Criterion(watched_criterion))
    run.controller.after_step = watched
    train_rounds(run)
    assert removals == 2


def test_dense_removes_nothing_and_measures_no_removal(tmp_path):
    run = Toy(Dense(), round_epochs=(4,)).make(tmp_path)
    run.controller.evaluate = lambda: pytest.fail("nothing is removed, so that nothing is measured")
    train_rounds(run)
    report = run.controller.end_round()
    assert (report.density, report.density_asked, report.what_if_gap, report.condemned_ratio) == (1.0, 1.0, None, None)
    assert all(w.all() for w in run.controller.weights.values())


def test_single_round_controls_train_the_total_epochs_of_all_rounds():
    pruned = Recipe("a", train=Train(epochs=7, round_epochs=3), pruning=Pruning(Imp(), schedule=Schedule(rounds=4)))
    assert pruned.round_epochs == (7, 3, 3, 3, 3)
    for control in (Dense(), Gmp()):
        assert replace(pruned, pruning=replace(pruned.pruning, method=control)).round_epochs == (19,)


# -- plans are data


def view(density_now: float = 1.0) -> PruningView:
    mask = MaskSet({"w": torch.arange(8) < 8 * density_now})

    def best(density: float) -> MaskSet:
        return MaskSet({"w": torch.arange(8) < 8 * density})

    return PruningView(
        mask, 2, lambda f: 1 - 0.75 * f, best, best, best, lambda elements, ratio: elements, lambda *_: mask
    )


@pytest.mark.parametrize("method", [Imp(), Rsst(), Rsst(remove_at=0.0), Dense(), Gmp()])
def test_round_0_is_dense_and_keeps_its_weights(method):
    plan = method.plan(0, view())
    assert (plan.mask.density, plan.target, plan.penalty, plan.start_from) == (1.0, None, None, "trained")


def test_imp_plans_immediate_removal_from_the_rewind_point():
    plan = Imp().plan(1, view())
    assert (plan.mask.density, plan.target, plan.start_from) == (0.625, None, "rewind")


def test_rsst_plans_the_current_mask_a_target_and_a_penalty():
    method = Rsst(Penalty("cosine"), remove_at=0.4)
    plan = method.plan(2, view(0.625))
    assert (plan.mask.density, plan.target.density, plan.remove_at) == (0.625, 0.25, 0.4)
    assert (plan.penalty, plan.start_from) == (method.penalty, "rewind")


# -- an external method


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(METHODS._parts)
    yield
    METHODS._parts.clear()
    METHODS._parts.update(before)


def test_an_external_method_runs_through_the_whole_loop(tmp_path, clean_registry):
    @register_method("halving")
    @dataclass(frozen=True)
    class Halving:
        """Condemns half of the alive weights in every round, whatever the schedule says."""

        one_round: ClassVar[bool] = False
        remove_at: float = 0.5

        def plan(self, round: int, view: PruningView) -> RoundPlan:
            if round == 0:
                return RoundPlan(view.mask)
            penalty = Penalty(window=(0.0, 0.5))
            return RoundPlan(view.mask, view.elements(view.mask.density / 2), penalty, self.remove_at, "rewind")

    assert METHODS["halving"] is Halving
    recipe = Recipe("plugin", pruning=Pruning(method=Halving()))
    assert recipe.tree()["pruning"]["method"] == {"name": "halving", "remove_at": 0.5}
    run = Toy(METHODS["halving"](), rewind_epoch=0, round_epochs=(1, 2, 2, 2)).make(tmp_path)
    start = copied(run.net.state_dict())
    loop.train(run)
    found = loaded(tmp_path)
    assert [t.mask.density for t in found] == [1.0, 0.5, 0.25, 0.125]
    for earlier, later in pairwise(found):
        assert later.mask.nested_in(earlier.mask)
    assert bits(run.controller.rewind_point) == bits(start)
    with pytest.raises(InputError, match="twice"):
        register_method("halving")(Halving)


@pytest.mark.parametrize("rewind_epoch", [None, 0])
def test_a_plan_that_swaps_weights_zeroes_and_measures_the_removed_ones(tmp_path, rewind_epoch):
    """As many weights are removed as come back: still a removal, although the density is unchanged."""

    @dataclass(frozen=True)
    class Swap(Method):
        one_round: ClassVar[bool] = False

        def plan(self, round: int, view: PruningView) -> RoundPlan:
            if round == 0:
                return RoundPlan(view.mask)
            even = {n: (torch.arange(m.numel()) % 2 == round % 2).view(m.shape) for n, m in view.mask.masks.items()}
            return RoundPlan(MaskSet(even), start_from="rewind")

    run = Toy(Swap(), rewind_epoch=rewind_epoch, lr=0.05, round_epochs=(2, 1, 1)).make(tmp_path)
    reports = []
    end_round = run.controller.end_round
    run.controller.end_round = lambda: reports.append(end_round()) or reports[-1]
    train_rounds(run, 2)
    run.controller.begin_round(2)
    for name, weight in run.controller.weights.items():
        assert not weight.detach()[~run.controller.mask[name]].view(torch.int32).any(), f"{name}: not +0"
    train_rounds(run)
    assert [report.density for report in reports] == [1.0, 0.5, 0.5]
    assert [report.what_if_loss_gap is None for report in reports] == [True, False, False]


def test_a_target_without_a_penalty_is_removed_at_remove_at(tmp_path):
    @dataclass(frozen=True)
    class Late(Method):
        one_round: ClassVar[bool] = False

        def plan(self, round: int, view: PruningView) -> RoundPlan:
            return RoundPlan(view.mask, view.elements(0.5), remove_at=0.5) if round else RoundPlan(view.mask)

    run = Toy(Late(), round_epochs=(1, 2)).make(tmp_path)
    seen = []
    after_step = run.controller.after_step

    def watched(progress: object, skipped: bool = False) -> None:
        after_step(progress, skipped)
        seen.append(run.controller.mask.density)

    run.controller.after_step = watched
    train_rounds(run)
    assert seen == [1.0] * 7 + [0.5] * 5


def test_the_registry_is_restored_after_an_external_method():
    assert "halving" not in METHODS
    with pytest.raises(InputError, match="halving"):
        METHODS["halving"]
