"""The checklist before a run: it passes what is sound and finds each planted bug, with one line a verdict."""

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from vit_rsst import machine
from vit_rsst.checks import bench as benches
from vit_rsst.checks import checking, costs, inputs, learning, removal
from vit_rsst.checks.bench import Bench, Verdict
from vit_rsst.errors import CheckFailed
from vit_rsst.recipe import loading
from vit_rsst.train import make_accelerator

ARGS = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
RECIPE = tiny.RECIPE.replace("steps_per_epoch: 3, ", "").replace(json.dumps(tiny.MODEL_ARGS), json.dumps(ARGS))


def bench_of(folder: Path, *overrides: str, text: str = RECIPE) -> Bench:
    recipe = loading.load(tiny.write_recipe(folder, text), overrides)
    return Bench.of(recipe, make_accelerator(recipe))


@pytest.fixture(scope="module")
def one_bench(tmp_path_factory):
    with tiny.alone_on_cpu():
        yield bench_of(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def bench(one_bench):
    """With nothing that an earlier check left in it: networks are made anew in any case."""
    with tiny.alone_on_cpu():
        accelerator = make_accelerator(one_bench.recipe)
        yield dataclasses.replace(one_bench, accelerator=accelerator, step_seconds=0.0, toy=None)


@pytest.fixture
def make(tmp_path):
    with tiny.alone_on_cpu():
        yield lambda *overrides: bench_of(tmp_path, *overrides)


def planted(bench: Bench, change: Callable[[nn.Module], object]) -> Bench:
    """The bench with something done to every network that it makes."""
    make_net = bench.make_net

    def made() -> nn.Module:
        net = make_net()
        change(net)
        return net

    return dataclasses.replace(bench, make_net=made)


def redrawn(bench: Bench, change: Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Bench:
    """The bench with something done to the images and labels of every draw and batch."""
    draw = bench.draw

    class Loader:
        def steps(self, progress: object) -> object:
            for step in bench.loader.steps(progress):
                yield [change("train", *batch) for batch in step]

    return dataclasses.replace(bench, draw=lambda split, *a: change(split, *draw(split, *a)), loader=Loader())


def failed(verdict: Verdict, text: str) -> None:
    assert verdict.state == "failed", verdict
    assert text in verdict.text, verdict
    assert verdict.advice


# -- a sound recipe


def test_the_quick_start_passes_every_check(tmp_path, capsys):
    argv = ["train.global_batch=32", "--json", tmp_path / "c.json", "--picture", tmp_path / "lr.svg"]
    assert tiny.command("check", "digits/quickstart", *argv) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = json.loads((tmp_path / "c.json").read_text())["checks"]
    assert len(verdicts) == len(checking.CHECKS) == 12
    states = {verdict["name"]: verdict["state"] for verdict in verdicts}
    assert {state for name, state in states.items() if name not in ("speed", "memory")} == {"ok"}, states
    assert [line.split()[0] for line in lines[:12] if not line.startswith(" ")] == list(states.values())
    assert lines[-1].startswith("no check failed")
    norms = next(verdict for verdict in verdicts if verdict["name"] == "gradients")["details"]["norms"]
    assert len(norms) == 56
    assert "recipe, 0.002" in (tmp_path / "lr.svg").read_text(encoding="utf-8")
    assert not (tmp_path / "runs").exists()


def test_a_failed_check_exits_with_6(tmp_path, capsys):
    path = tiny.write_recipe(tmp_path, RECIPE)
    assert tiny.command("check", path, "optim.lr=3.0") == 6
    captured = capsys.readouterr()
    assert "error: 1 of 12 checks failed: learning rate." in captured.err
    assert "failed   learning rate" in captured.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "text"),
    [("global_pool: ''", "logits are (32, 17, 10)"), ("img_size: 64", "Input height (32) doesn't match model (64)")],
)
def test_a_model_that_does_not_match_the_data_is_a_verdict_with_numbers(tmp_path, capsys, args, text):
    path = tiny.write_recipe(tmp_path, RECIPE)
    model = f"model.args={{{json.dumps(ARGS)[1:-1]}, {args}}}"
    assert tiny.command("check", path, model, "--json", tmp_path / "c.json") == 6
    captured = capsys.readouterr()
    assert "error: 1 of 12 checks failed: shapes." in captured.err
    states = {verdict["name"]: verdict for verdict in json.loads((tmp_path / "c.json").read_text())["checks"]}
    assert text in states["shapes"]["text"]
    assert states["hours"]["text"] == "shapes do not match"


def test_an_invalid_recipe_exits_with_2(tmp_path):
    assert tiny.command("check", tiny.write_recipe(tmp_path), "optim.lr=fast") == 2


# -- planted bugs


def test_a_frozen_layer_is_found(bench):
    verdict = learning.gradients(planted(bench, lambda net: net.blocks[1].mlp.requires_grad_(False)))
    failed(verdict, "blocks.1.mlp.fc1.weight")
    assert "frozen" in verdict.text
    assert learning.gradients(bench).state == "ok"


def test_a_detached_head_is_found(bench):
    def detach(net: nn.Module) -> None:
        net.head.register_forward_pre_hook(lambda module, args: (args[0].detach(),))

    verdict = learning.gradients(planted(bench, detach))
    failed(verdict, "have a gradient of zero")
    assert "cls_token" not in verdict.text
    assert len([n for n in verdict.details["norms"].values() if n > 0]) == 2


def test_a_fully_detached_network_cannot_memorise(bench):
    def detach(net: nn.Module) -> None:
        net.register_forward_hook(lambda module, args, output: output.detach() + 0 * net.head.bias.sum())

    failed(learning.over_fit(planted(bench, detach)), "of 32 images were memorised")


@pytest.mark.parametrize("bug", ["frozen", "detached"])
def test_a_network_without_gradients_is_found_and_later_checks_are_skipped(bench, bug):
    def spoil(net: nn.Module) -> None:
        if bug == "frozen":
            net.requires_grad_(False)
        else:
            net.register_forward_hook(lambda module, args, output: output.detach())

    verdicts = {verdict.name: verdict for verdict in checking.check(planted(bench, spoil))}
    assert list(verdicts) == list(checking.CHECKS)
    failed(verdicts["gradients"], "are frozen" if bug == "frozen" else "have a gradient of zero")
    after = list(verdicts).index("gradients") + 1
    assert {(v.state, v.text) for v in list(verdicts.values())[after:]} == {("skipped", "nothing is trained")}


@pytest.mark.parametrize("shift", ["against the images", "in one split"])
def test_shifted_labels_are_found(bench, shift):
    def shifted(split: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if split != "train":
            return images, labels
        return (images, labels.roll(1)) if shift == "against the images" else (images, (labels + 1) % 10)

    failed(inputs.labels(redrawn(bench, shifted)), "on 144 validation images, chance 10.0%")
    assert inputs.labels(bench).state == "ok"


def imbalanced(split: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Two classes, `0` and all others, about 10 : 90; of few images, the first of which is one of the small class."""
    zeros, others = (labels == 0).nonzero().flatten(), (labels != 0).nonzero().flatten()
    chosen = torch.cat([zeros[: len(others) // 9], others])
    return images[chosen], (labels[chosen] != 0).long()


def test_labels_of_imbalanced_classes_are_judged_by_mean_recall(bench):
    assert inputs.labels(redrawn(bench, imbalanced)).state == "ok"

    def shifted(split: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = imbalanced(split, images, labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        return images, labels[order] if split == "train" else labels

    failed(inputs.labels(redrawn(bench, shifted)), "chance 50.0%")


def test_labels_of_one_class_or_very_few_images_are_a_warning(bench):
    for number in (2, 144):
        only = redrawn(bench, lambda split, x, y, n=number: (x[:n], torch.arange(n) % 2 if n == 2 else 0 * y[:n]))
        verdict = inputs.labels(only)
        assert (verdict.state, "inconclusive: too few images" in verdict.text) == ("warning", True), verdict


def test_mean_recall_worked_out_by_hand():
    truth, answers = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1])
    recall, chance, noise = inputs.mean_recall(answers, truth)
    assert (recall, chance) == (0.875, 0.5)
    assert noise == pytest.approx(math.sqrt(0.6 * 0.4 / 4 + 0.4 * 0.6 / 1) / 2)


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_missing_normalisation_is_found(bench, scale):
    def raw(split: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images * 0.376 + 0.305) * scale, labels  # the digits' own numbers

    failed(inputs.normalisation(redrawn(bench, raw)), "training batches have channel means")
    assert inputs.normalisation(bench).state == "ok"


def at_rate(bench: Bench, lr: float) -> Bench:
    recipe = dataclasses.replace(bench.recipe, optim=dataclasses.replace(bench.recipe.optim, lr=lr))
    return dataclasses.replace(bench, recipe=recipe)


def test_a_wrong_learning_rate_is_found(bench, monkeypatch):
    swept = learning.sweep(bench)
    monkeypatch.setattr(learning, "sweep", lambda bench: swept)
    low, right, high = (learning.learning_rate(at_rate(bench, lr)) for lr in (2e-5, 2e-3, 0.2))
    assert right.state == "ok", right
    for verdict, text in ((low, "would be too slow"), (high, "would diverge")):
        failed(verdict, text)
        assert 1e-4 <= float(verdict.advice.rsplit("=", 1)[1]) <= 1e-2


with open(Path(__file__).with_name("range_tests.csv"), encoding="utf-8") as file:
    RANGE_TESTS = list(csv.DictReader(file))
"""As they were measured with recipes of this package, those of wide models at a depth of 4."""


@pytest.mark.parametrize("measured", RANGE_TESTS, ids=lambda measured: measured["recipe"])
def test_recorded_range_tests_detect_rates_a_hundred_times_too_high_or_too_low(bench, monkeypatch, measured):
    low, high, lr = (float(measured[name]) for name in ("lowest rate", "highest rate", "lr"))
    losses = [float(loss) for loss in measured["losses"].split()]
    rates = [low * (high / low) ** (i / 99) for i in range(len(losses))]
    monkeypatch.setattr(learning, "sweep", lambda bench: (rates, losses))
    found = [learning.learning_rate(at_rate(bench, rate)) for rate in (lr / 100, lr, 100 * lr)]
    highest = "ok" if "resnet" in measured["recipe"] else "failed"  # SGD over batch norms does not diverge at 1
    assert [verdict.state for verdict in found] == ["failed", "ok", highest], found
    assert "too slow" in found[0].text
    assert ("would diverge" in found[2].text) == (highest == "failed")


def test_a_range_test_that_never_falls_is_inconclusive(bench, monkeypatch):
    rates = [1e-6 * 1.2**i for i in range(60)]
    monkeypatch.setattr(learning, "sweep", lambda bench: (rates, [2.3 + 0.01 * (i % 3) for i in range(60)]))
    verdict = learning.learning_rate(bench)
    assert (verdict.state, "never falls" in verdict.text) == ("warning", True)


def test_the_seven_range_tests_are_read():
    assert len(RANGE_TESTS) == 7


def test_data_with_a_single_class_is_found(bench):
    only = redrawn(bench, lambda split, images, labels: (images, torch.full_like(labels, 3)))
    failed(inputs.classes(only), "belong to one class, '3'")


def test_a_class_without_images_is_a_warning(bench):
    def without(split: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images[labels != 4], labels[labels != 4]

    verdict = inputs.classes(redrawn(bench, without))
    assert (verdict.state, "1 of 10 classes have no training image: 4" in verdict.text) == ("warning", True)


def test_a_mask_that_empties_a_block_is_found(make):
    spoilt = make("pruning.layer_sparsity={'blocks.1.*': 0.9999}", "pruning.max_layer_sparsity=1.0")
    verdict = removal.removal(spoilt)
    failed(verdict, "all weights are removed from blocks.1.attn.proj.weight")
    assert "(in blocks.1)" in verdict.text
    assert removal.removal(make()).state == "ok"


# -- the rest of the list


def test_a_model_with_other_classes_is_found(bench):
    def wider(net: nn.Module) -> None:
        net.head = nn.Linear(48, 7)

    bench = planted(bench, wider)
    failed(learning.shapes(bench), "logits are (32, 7)")
    states = {verdict.name: verdict.state for verdict in checking.check(bench)}
    assert states["gradients"] == states["hours"] == "skipped"
    assert states["labels"] == "ok"


def test_an_over_confident_head_is_a_warning(bench):
    def shout(net: nn.Module) -> None:
        net.head.weight.data.mul_(500)

    verdict = learning.first_loss(planted(bench, shout))
    assert verdict.state == "warning"
    assert learning.first_loss(bench).state == "ok"


def test_non_finite_gradients_are_found(bench):
    def infinite(net: nn.Module) -> None:
        net.blocks[0].norm1.weight.data[0] = float("inf")

    failed(learning.gradients(planted(bench, infinite)), "not finite")


def test_a_check_that_takes_too_long_is_skipped_with_an_estimate(bench, monkeypatch):
    learning.first_loss(bench)
    assert bench.step_seconds > 0
    for part in (learning, costs):
        monkeypatch.setattr(part, "LIMIT", 0.0)
    for one in (learning.gradients, costs.speed, learning.over_fit, learning.learning_rate):
        verdict = one(bench)
        assert (verdict.state, "would take about" in verdict.text) == ("skipped", True)


def test_insufficient_memory_is_found(bench, monkeypatch):
    memory = dataclasses.make_dataclass("Memory", ["available"])
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory(1000))
    failed(costs.memory(bench), "1000 B free")
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory(2**40))
    assert costs.memory(bench).state == "ok"


def test_a_loader_slower_than_the_model_is_a_warning(bench, monkeypatch):
    monkeypatch.setattr(costs, "_loader_speed", lambda bench: 1.0)
    verdict = costs.speed(bench)
    assert (verdict.state, "data.workers" in verdict.advice) == ("warning", True)


def test_the_loader_is_not_timed_if_an_epoch_has_a_single_step(make):
    verdict = costs.speed(make("train.steps_per_epoch=1"))
    assert (verdict.state, verdict.details["loader"]) == ("ok", None)
    assert "an epoch has a single step" in verdict.text


def test_the_time_of_a_recipe_is_the_time_of_its_steps(bench):
    bench.step_seconds = 0.1
    assert len(bench.batch[1]) == 32
    found = costs.hours(bench).details["seconds"]
    steps = bench.progress.total_steps
    evaluations = 0.4 * (6 + 3 * 3) * 144 / 32 * 0.1
    assert found == pytest.approx(steps * 0.1 + evaluations)


@pytest.mark.parametrize("granularity", ["head+neuron", "2:4"])
def test_removal_of_any_kind_of_unit_is_sound(make, granularity):
    final = "pruning.schedule={rounds: 2, final_sparsity: 0.5}"
    criterion = "activation_l2" if granularity == "2:4" else "taylor"
    bench = make(f"pruning.granularity={granularity}", final, f"pruning.criterion={criterion}")
    verdict = removal.removal(bench)
    assert verdict.state == "ok", verdict
    assert verdict.details["density"] == pytest.approx(0.5, abs=0.05)


def test_a_dense_recipe_has_no_removal(make):
    assert removal.removal(make("pruning.method=dense")).state == "skipped"


def test_turning_points_worked_out_by_hand():
    rates = [10.0**i for i in range(40)]
    losses = [2.0, 2.2] * 5 + [1.9] * 5 + [1.1] * 10 + [1.9] * 5 + [3.1] * 10
    # The start is 2.1 with a deviation of 0.1054, the lowest 1.1: three quarters of the way are 1.35.
    falls, diverges = learning.turning_points(rates, losses)
    assert falls == 1e16  # (1.9 + 4 · 1.1) / 5 = 1.26; one before 1.42
    assert diverges == 1e29  # (3 · 1.9 + 2 · 3.1) / 5 = 2.38 is the first above 2.31; one before 2.14
    assert learning.turning_points(rates, losses[:10] * 4) == (None, 1e39)
    assert learning.turning_points(rates, losses[:25]) == (1e16, 1e24)
    assert learning.turning_points([], []) == (None, 0.0)


def test_conclusions():
    ok, bad = Verdict("a", "ok", "t"), Verdict("b c", "failed", "t", "x=1")
    assert checking.conclude([ok, Verdict("w", "warning", "t")]) == "no check failed; 1 warning(s)"
    with pytest.raises(CheckFailed, match="1 of 2 checks failed: b c") as caught:
        checking.conclude([ok, bad])
    assert caught.value.exit_code == 6
    assert checking.line(bad).splitlines() == ["failed   b c            t", f"{'':8} {'':14} advice: x=1"]
    assert benches.LIMIT == 300
