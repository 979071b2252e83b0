"""movement: −Σ w · g against float64, over micro-batches, stops and skipped steps; what goes, what is refused."""

from dataclasses import replace

import pytest
import torch
from test_continuing import StopAt, end
from toys import Toy, train_rounds

from vit_rsst import loop
from vit_rsst.errors import InputError, Stopped
from vit_rsst.pruning.criteria import CRITERIA, Evidence
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.movement import Movement
from vit_rsst.recipe.loading import load
from vit_rsst.run import resume
from vit_rsst.run.state import Run

GMP = Toy(Gmp((0.25, 0.75), 4), curve="cubic", criterion="movement", round_epochs=(4,), accumulation=2, clip=0.01)


def followed(run: Run) -> list[dict[str, torch.Tensor]]:
    """After every step −Σ w · g in float64, from gradients before masking and clipping."""
    controller, steps = run.controller, []
    after_backward = controller.after_backward

    def note(progress: object) -> None:
        terms = {n: -w.detach().double() * w.grad.double() for n, w in controller.weights.items()}
        after_backward(progress)
        steps.append({n: term + (steps[-1][n] if steps else 0.0) for n, term in terms.items()})

    controller.after_backward = note
    return steps


def test_scores_are_the_sum_over_all_steps_in_float64(tmp_path):
    run = GMP.make(tmp_path)
    steps = followed(run)
    train_rounds(run)
    for name, score in run.controller.movement.scores.items():
        torch.testing.assert_close(score.double(), steps[-1][name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_bit_for_bit_those_of_a_loop_over_the_weights(dtype):
    draw = torch.Generator().manual_seed(0)
    shapes = {"linear": (7, 5), "row": (1, 33), "conv": (4, 3, 2, 2), "frozen": (2, 2), "none": (0, 4)}
    weights = {name: torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for name, shape in shapes.items()}
    weights["conv"].data = weights["conv"].data.to(memory_format=torch.channels_last)
    weights["double"] = torch.nn.Parameter(torch.empty(3, 3, dtype=torch.float64))
    found, expected = Movement.zeros(weights), {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step, skipped in enumerate([None, 0.0, 1.0, 0.0, 1.0, None, 0.0]):
        for name, weight in weights.items():
            weight.data.normal_(generator=draw)
            if name != "frozen":
                weight.grad = torch.empty_like(weight).normal_(generator=draw)
        if step == 3:
            weights["conv"].grad = weights["conv"].grad.contiguous()  # of another memory format than its weight
        if skipped:
            weights["linear"].grad[0, 0] = (torch.nan, torch.inf)[step == 4]
        found.note(weights)
        moves = {name: weight for name, weight in weights.items() if weight.grad is not None and not skipped}
        for name, weight in moves.items():
            expected[name] -= weight.detach() * weight.grad
            weight.grad.mul_(0.1)  # masked and clipped, and the weight moved
            weight.data.add_(1.0)
        found.add_(None if skipped is None else torch.tensor(skipped))
        assert all(torch.equal(found.scores[name], expected[name]) for name in weights)
    assert not found.scores["frozen"].any()
    again = Movement.zeros(weights)
    again.load_({name: score.contiguous() for name, score in found.scores.items()})
    assert all(again.scores[name].stride() == weight.stride() for name, weight in weights.items())
    assert all(torch.equal(again.scores[name], expected[name]) for name in weights)


def test_a_step_that_is_skipped_for_a_gradient_of_an_unpruned_tensor_adds_nothing(tmp_path):
    run = replace(GMP, max_skipped_steps=1, accumulation=1).make(tmp_path)
    backward, scores = run.accelerator.backward, []

    def spoiled(loss: torch.Tensor) -> None:
        scores.append({name: score.clone() for name, score in run.controller.movement.scores.items()})
        backward(loss)
        if run.progress.global_step == 2:
            run.net[1].bias.grad[0] = torch.nan

    run.accelerator.backward = spoiled
    train_rounds(run)
    assert all(torch.equal(scores[2][name], scores[3][name]) for name in scores[0])


def test_gmp_keeps_the_alive_weights_that_have_moved_furthest_from_zero(tmp_path):
    run = GMP.make(tmp_path)
    steps, controller = followed(run), run.controller
    after_step, removals = controller.after_step, 0

    def watched(progress: object, skipped: torch.Tensor | None = None) -> None:
        nonlocal removals
        before = controller.mask
        after_step(progress, skipped)
        gone = before.minus(controller.mask)
        if gone.num_alive:
            removals += 1
            scores = steps[-1]
            largest = max(float(scores[n][gone[n]].max()) for n in gone if gone[n].any())
            least = min(float(scores[n][controller.mask[n]].min()) for n in gone if controller.mask[n].any())
            assert largest <= least + 1e-7

    controller.after_step = watched
    train_rounds(run)
    assert removals == 2
    assert controller.mask.density == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("toy", [GMP, replace(GMP, method=Imp(), curve="geometric", round_epochs=(2, 1, 1))])
@pytest.mark.parametrize("stop", [5, 10])
def test_a_stopped_and_restored_run_keeps_its_scores(tmp_path, toy, stop):
    loop.train(toy.make(tmp_path / "whole"))
    first, second = toy.make(tmp_path / "stopped"), toy.make(tmp_path / "stopped")
    first.stop = StopAt(stop)
    with pytest.raises(Stopped):
        loop.train(first)
    assert any(bool(score.any()) for score in first.controller.movement.scores.values())
    resume.restore_(second, second.checkpointer.load())
    loop.train(second)
    assert end(tmp_path / "stopped") == end(tmp_path / "whole")


def test_a_skipped_step_adds_nothing(tmp_path):
    run = replace(GMP, max_skipped_steps=1, accumulation=1).make(tmp_path)
    backward, scores = run.accelerator.backward, []

    def spoiled(loss: torch.Tensor) -> None:
        scores.append({name: score.clone() for name, score in run.controller.movement.scores.items()})
        backward(loss)
        if run.progress.global_step == 2:
            next(iter(run.controller.weights.values())).grad[0, 0] = torch.inf

    run.accelerator.backward = spoiled
    train_rounds(run)
    assert all(torch.equal(scores[2][name], scores[3][name]) for name in scores[0])
    assert not all(torch.equal(scores[1][name], scores[2][name]) for name in scores[0])
    assert all(bool(score.isfinite().all()) for score in run.controller.movement.scores.values())


def test_without_training_steps_it_is_refused(tmp_path):
    weights = {"w": torch.ones(2, 2)}
    for movement in (None, {"w": torch.zeros(2, 2)}):
        with pytest.raises(InputError, match="movement adds up over training steps, and none precedes this selection"):
            CRITERIA["movement"].of_elements(Evidence(weights, MaskSet.full(weights), 0, movement=movement))
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nmodel: {start_from: t}\npruning: {method: imp, criterion: movement}\n")
    with pytest.raises(InputError, match=r"pruning.criterion: movement adds up .* round 0 has none"):
        load(path)
