"""set and rigl: exact density at every step, growth among the dead alone, against a second implementation in numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_continuing import StopAt, end
from toys import Toy, train_rounds, vit

from vit_rsst import loop
from vit_rsst.assembly.pruning import check_gradual
from vit_rsst.errors import InputError, Stopped
from vit_rsst.progress import Progress
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.methods.rigl import RigL
from vit_rsst.pruning.methods.set import SparseEvolutionary
from vit_rsst.pruning.preview import preview
from vit_rsst.pruning.swapping import swap
from vit_rsst.run import resume
from vit_rsst.run.state import Run

METHODS = {"set": SparseEvolutionary((0.0, 0.8), 4), "rigl": RigL((0.0, 0.8), 4)}
UPDATES = [4, 8, 12]  # of 20 steps; the end of the window, 16, is none


def toy(name: str, **changes: object) -> Toy:
    return replace(Toy(METHODS[name], criterion="random", scope="erk", round_epochs=(5,)), **changes)


def references(size: np.ndarray, growth: np.ndarray, alive: np.ndarray, share: float) -> np.ndarray:
    """Flat arrays: drops the smallest alive, then grows the largest of those that were dead."""
    count = min(round(share * alive.sum()), int((~alive).sum()))
    living, dead = np.flatnonzero(alive), np.flatnonzero(~alive)
    mask = alive.copy()
    mask[living[np.argsort(size[living])[:count]]] = False
    mask[dead[np.argsort(-growth[dead])[:count]]] = True
    return mask


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("density", [0.1, 0.7])
def test_a_swap_is_that_of_a_second_implementation(density, share):
    weight, gradient = drawn(12, 20, seed=1), drawn(12, 20, seed=2)
    alive = drawn(12, 20, seed=3) < torch.tensor(density).mul(2).sub(1).erfinv() * math.sqrt(2)
    found = swap({"w": weight * alive}, MaskSet({"w": alive}), share, {"w": gradient}, seed=0)["w"]
    flat = [t.flatten().numpy() for t in (weight.abs(), gradient.abs(), alive)]
    assert np.array_equal(found.flatten().numpy(), references(*flat, share))
    assert found.sum() == alive.sum()


def test_a_swap_within_windows_keeps_n_of_m_and_takes_the_windows_with_the_smallest_elements():
    weight = torch.tensor([[5.0, 0.0, 0.0, 1.0, 4.0, 3.0, 0.0, 0.0]])  # two windows of 2:4
    gradient = torch.tensor([[9.0, 2.0, -7.0, 9.0, 9.0, 9.0, 8.0, 1.0]])
    alive = weight != 0
    one, both = (
        swap({"w": weight}, MaskSet({"w": alive}), share, {"w": gradient}, 0, window=4)["w"] for share in (0.25, 1.0)
    )
    assert one.int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0]]  # 1.0 goes, −7 grows
    assert both.int().tolist() == [[1, 0, 1, 0, 1, 0, 1, 0]]  # no more than one per window


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_swap_within_windows_of_a_convolution_is_that_of_a_loop_over_windows(share):
    weight, gradient = drawn(6, 8, 3, 1, seed=1), drawn(6, 8, 3, 1, seed=2)
    alive = drawn(6, 8, 3, 1, seed=3) < 0  # windows of 0 to 4 alive; of none and of all, nothing is swapped
    found = swap({"w": weight * alive}, MaskSet({"w": alive}), share, {"w": gradient}, 0, window=4)["w"]
    size, growth, mask = ((t.movedim(1, -1).reshape(-1, 4).numpy()) for t in (weight.abs(), gradient.abs(), alive))
    swaps = [i for i, window in enumerate(mask) if window.any() and not window.all()]
    swaps.sort(key=lambda i: size[i][mask[i]].min())
    expected = mask.copy()
    for i in swaps[: round(share * int(alive.sum()))]:
        expected[i, np.where(mask[i], size[i], np.inf).argmin()] = False
        expected[i, np.where(mask[i], -np.inf, growth[i]).argmax()] = True
    assert np.array_equal(found.movedim(1, -1).reshape(-1, 4).numpy(), expected)


def test_growth_at_random_is_uniform_over_the_dead_and_differs_by_weight_and_seed():
    weights = {name: torch.ones(100, 100) for name in "ab"}
    alive = MaskSet({name: torch.arange(10_000).view(100, 100) < 5000 for name in weights})
    first, second = (swap(weights, alive, 0.5, None, seed) for seed in (0, 1))
    grown = first["a"] & ~alive["a"]
    assert grown.sum() == 2500
    assert int(grown.flatten()[5000:7500].sum()) == pytest.approx(1250, abs=4 * 25)  # σ = 25
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], second["a"])


def watched(run: Run) -> list[dict]:
    """A record of each step: masks, weights and moments after it, and the gradient before it is masked."""
    steps, controller = [], run.controller
    after_backward, after_step = controller.after_backward, controller.after_step

    def note_gradients(progress: Progress) -> None:
        steps.append({"gradient": {n: w.grad.clone() for n, w in controller.weights.items()}})
        after_backward(progress)

    def note_masks(progress: Progress, skipped: torch.Tensor | None = None) -> None:
        before = {n: w.detach().clone() for n, w in controller.weights.items()}
        after_step(progress, skipped)
        moments = {n: run.optimizer.state[w]["exp_avg"].clone() for n, w in controller.weights.items()}
        weights = {n: w.detach().clone() for n, w in controller.weights.items()}
        steps[-1] |= {"before": before, "mask": controller.mask, "weights": weights, "moments": moments}

    controller.after_backward, controller.after_step = note_gradients, note_masks
    return steps


@pytest.mark.parametrize("granularity", ["element", "2:4"])
@pytest.mark.parametrize("name", METHODS)
def test_every_weight_keeps_its_density_at_every_step_and_only_the_dead_grow_from_zero(tmp_path, name, granularity):
    sparsity = {"final_sparsity": 0.5} if granularity == "2:4" else {}
    run = toy(name, network=vit, granularity=granularity, **sparsity).make(tmp_path)
    steps = watched(run)
    run.controller.begin_round(0)
    mask = first = run.controller.mask
    train_rounds(run)
    moved = []
    for number, step in enumerate(steps, 1):
        assert step["mask"].layers() == first.layers()
        grown, dropped = step["mask"].minus(mask), mask.minus(step["mask"])
        if grown.num_alive:
            moved.append(number)
        for w in first:
            changed = grown[w] | dropped[w]
            assert not step["weights"][w][changed].any()
            assert not step["moments"][w][changed].any()
            assert not step["weights"][w][~step["mask"][w]].any()
        if granularity == "2:4":
            assert all(bool((m.reshape(-1, 4).sum(1) == 2).all()) for m in step["mask"].tensors())
        mask = step["mask"]
    assert moved == UPDATES


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients_before_masking_with_a_cosine_share(tmp_path):
    run = toy("rigl", clip=0.01, accumulation=2).make(tmp_path)
    steps = watched(run)
    run.controller.begin_round(0)
    mask = run.controller.mask
    train_rounds(run)
    for number, step in enumerate(steps, 1):
        share = 0.15 * (1 + math.cos(math.pi * number / 16)) if number in UPDATES else 0.0
        for w, alive in mask.masks.items():
            tensors = (step["before"][w].abs(), step["gradient"][w].abs(), alive)
            expected = references(*(t.flatten().numpy() for t in tensors), share)
            assert np.array_equal(step["mask"][w].flatten().numpy(), expected)
        mask = step["mask"]


def test_erk_gives_small_weights_a_higher_density_than_uniform(tmp_path):
    found = {}
    for scope in ("erk", "layer"):
        run = toy("set", scope=scope).make(tmp_path / scope)
        run.controller.begin_round(0)
        found[scope] = [layer["density"] for layer in run.controller.mask.layers().values()]
    assert found["layer"] == pytest.approx([0.1, 0.1], abs=0.02)
    assert found["erk"][0] < 0.1 < found["erk"][1]


@pytest.mark.parametrize("stop", [7, 8, 9])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_stopped_before_at_or_after_an_update_ends_bit_for_bit_the_same(tmp_path, name, stop):
    loop.train(toy(name).make(tmp_path / "whole"))
    first = toy(name).make(tmp_path / "stopped")
    first.stop = StopAt(stop)
    with pytest.raises(Stopped):
        loop.train(first)
    second = toy(name).make(tmp_path / "stopped")
    resume.restore_(second, second.checkpointer.load())
    loop.train(second)
    assert end(tmp_path / "stopped") == end(tmp_path / "whole")


def test_a_skipped_step_moves_nothing(tmp_path):
    run = toy("rigl", max_skipped_steps=1).make(tmp_path)
    steps = watched(run)
    backward = run.accelerator.backward

    def spoiled(loss: torch.Tensor) -> None:
        backward(loss)
        if run.progress.global_step + 1 == UPDATES[1]:
            next(iter(run.controller.weights.values())).grad[0, 0] = torch.nan

    run.accelerator.backward = spoiled
    train_rounds(run)
    masks = [step["mask"].fingerprint() for step in steps]
    assert [n for n in range(2, 21) if masks[n - 1] != masks[n - 2]] == [n for n in UPDATES if n != UPDATES[1]]


def test_the_preview_says_that_the_mask_moves_at_its_first_density():
    [found] = preview(
        SparseEvolutionary((0.0, 0.8), 4), Progress(4, (5,)), 1, lambda f: 1.0 - 0.9 * f, lambda density: density, "ab"
    )
    assert (found.density, found.removal()) == (
        pytest.approx(0.1),
        "before the first step; moves every 4 steps, steps 4–12",
    )


def test_an_interval_that_leaves_no_update_is_refused():
    with pytest.raises(InputError, match=r"pruning.method.interval: no step .* 36 steps is due .* 100"):
        check_gradual(SparseEvolutionary(), Progress(12, (3,)))
    check_gradual(SparseEvolutionary(interval=13), Progress(12, (3,)))
