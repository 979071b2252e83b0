"""Training components against reference values: losses, mixing, erasing, sampling, EMA, the best epoch."""

import copy
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import nn

from vit_rsst import files
from vit_rsst.assembly import data
from vit_rsst.data.dealing import Dealing
from vit_rsst.data.loaders import InMemoryLoader
from vit_rsst.data.mixing import Mixing
from vit_rsst.data.options import Imbalance
from vit_rsst.data.tables import Split, class_balanced, shuffled
from vit_rsst.data.transforms import Augmentation, Erasing
from vit_rsst.models.dynamic_vit import DynamicVit
from vit_rsst.progress import Progress
from vit_rsst.tickets import rounds
from vit_rsst.tickets.ticket_file import load
from vit_rsst.training import switches
from vit_rsst.training.best import Best
from vit_rsst.training.counters import RunningLoss
from vit_rsst.training.distill import Distillation, divergence
from vit_rsst.training.ema import Ema
from vit_rsst.training.losses import make_loss

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


# -- losses


COUNTS = torch.tensor([6, 3, 1])
LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3], [-0.4, 1.1, 0.0], [0.0, 0.0, 2.0]])
LABELS = torch.tensor([0, 2, 1, 2])


def by_hand(kind: str, smoothing: float, shares: np.ndarray) -> float:
    """The loss in float64, from shares of classes (batch, classes)."""
    logits, counts = LOGITS.double().numpy(), COUNTS.double().numpy()
    if kind == "balanced_softmax":
        logits = logits + np.log(counts)
    weights = 10 / (3 * counts) if kind == "class_weighted" else np.ones(3)
    shares = shares * (1 - smoothing) + smoothing / 3
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-(weights * shares * log_p).sum() / len(logits))


@pytest.mark.parametrize("kind", ["cross_entropy", "class_weighted", "balanced_softmax"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_hard_and_mixed_labels_match_float64(kind, smoothing):
    loss = make_loss(kind, smoothing, COUNTS)
    shares = np.eye(3)[LABELS.numpy()]
    assert float(loss(LOGITS, LABELS)) == pytest.approx(by_hand(kind, smoothing, shares), rel=1e-5)
    mixed = 0.7 * shares + 0.3 * shares[::-1]
    assert float(loss(LOGITS, torch.tensor(mixed).float())) == pytest.approx(by_hand(kind, smoothing, mixed), rel=1e-5)


def test_class_weights_average_to_one_per_image_and_tolerate_an_empty_class():
    loss = make_loss("class_weighted", 0.0, torch.tensor([30, 10, 0]))
    zeros = torch.zeros(40, 3)
    labels = torch.tensor([0] * 30 + [1] * 10)
    assert float(loss(zeros, labels)) == pytest.approx(math.log(3), rel=1e-6)
    smoothed = make_loss("class_weighted", 0.1, torch.tensor([30, 10, 0]))
    far = zeros + torch.tensor([0.0, 0.0, -50.0])
    assert float(smoothed(far, labels)) < 1.0
    assert make_loss("balanced_softmax", 0.1, torch.tensor([30, 10, 0]))(LOGITS, LABELS).isfinite()


def test_weighted_losses_of_equal_micro_batches_average_to_the_batch():
    loss = make_loss("class_weighted", 0.1, COUNTS)
    halves = (loss(LOGITS[:2], LABELS[:2]) + loss(LOGITS[2:], LABELS[2:])) / 2
    assert float(halves) == pytest.approx(float(loss(LOGITS, LABELS)), rel=1e-6)


def test_divergence_from_a_teacher_matches_float64_and_is_zero_from_itself():
    teacher, t = torch.tensor([[1.0, 0.0, -2.0], [0.3, 0.1, 0.0], [0.0, 2.0, 1.0], [1.0, 1.0, 1.0]]), 3.0
    p = np.exp(teacher.double().numpy() / t)
    p /= p.sum(1, keepdims=True)
    q = np.exp(LOGITS.double().numpy() / t)
    q /= q.sum(1, keepdims=True)
    expected = t * t * (p * np.log(p / q)).sum() / 4
    assert float(divergence(LOGITS, teacher, t)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(LOGITS, LOGITS, t)) == pytest.approx(0.0, abs=1e-6)


def test_distillation_blends_by_weight_and_is_skipped_without_a_teacher():
    net, images = nn.Linear(3, 3).requires_grad_(False), torch.randn(4, 3)
    loss = F.cross_entropy(LOGITS, LABELS)
    found = Distillation(lambda: net, 0.25, 2.0, torch.no_grad)(loss, LOGITS, images)
    assert float(found) == pytest.approx(float(0.75 * loss + 0.25 * divergence(LOGITS, net(images), 2.0)), rel=1e-6)
    assert Distillation(lambda: None, 0.25, 2.0, torch.no_grad)(loss, LOGITS, images) is loss


# -- mixtures and erasing


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_a_mixture_matches_its_parameters(alphas):
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    mixing = Mixing(3, *alphas, 1.0, 0.5)
    drawn = mixing.draw(6, seed=5)
    mixed, shares = mixing(images, labels, drawn)
    assert torch.allclose(shares.sum(1), torch.ones(6))
    for i, partner in enumerate((1, 0, 3, 2, 5, 4)):
        own = float(shares[i] @ F.one_hot(labels[i], 3).float())
        if alphas[0]:
            assert own == pytest.approx(float(drawn[i, 0]), abs=1e-6)
            expected = own * images[i] + (1 - own) * images[partner]
            torch.testing.assert_close(mixed[i], expected)
        else:
            is_pasted = (mixed[i] == images[partner]).all(0)
            assert bool((is_pasted | (mixed[i] == images[i]).all(0)).all())
            assert own == pytest.approx(1 - float(is_pasted.float().mean()), abs=1e-6)


def test_mixing_weights_and_boxes_follow_the_published_distributions():
    drawn = Mixing(3, 0.8, 1.0, 0.5, 0.25).draw(20_000, seed=1)[::2]
    is_mixed, is_cut = drawn[:, 0] < 1, drawn[:, 1] > 0
    assert is_mixed.float().mean() == pytest.approx(0.5, abs=0.02)
    assert is_cut.float().mean() == pytest.approx(0.25, abs=0.02)
    share = drawn[is_mixed & ~is_cut, 0]
    assert (share.mean(), share.var()) == pytest.approx((0.5, 1 / (4 * (2 * 0.8 + 1))), abs=0.01)


@pytest.mark.parametrize("repeats", [1, 3])
def test_mixtures_do_not_depend_on_ranks_or_accumulation(repeats):
    mixing, images = Mixing(3, 0.8, 1.0, 0.8, 0.5, repeats), torch.randn(24, 3, 8, 8)
    labels, drawn = torch.arange(24) % 3, Mixing(3, 0.8, 1.0, 0.8, 0.5, repeats).draw(24, seed=2)
    whole = mixing(images, labels, drawn)
    for size in (6, 12):
        parts = [mixing(*(t[i : i + size] for t in (images, labels, drawn))) for i in range(0, 24, size)]
        for found, expected in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
            assert torch.equal(found, expected)


def test_a_repeated_image_is_mixed_with_another_one():
    images = torch.arange(4.0).repeat_interleave(3).view(12, 1, 1, 1).expand(12, 3, 8, 8)
    mixed, _ = Mixing(3, 0.8, 0.0, 1.0, 0.5, repeats=3)(
        images, torch.zeros(12, dtype=torch.long), torch.tensor([0.5, 0.0, 0.5, 0.5]).expand(12, 4)
    )
    assert mixed[:, 0, 0, 0].tolist() == pytest.approx([0.5] * 6 + [2.5] * 6)


@pytest.mark.parametrize("number", [1, 5])
def test_an_image_without_a_partner_is_unchanged(number):
    images, labels = torch.randn(number, 3, 8, 8), torch.arange(number) % 3
    mixing = Mixing(3, 0.8, 0.0, 1.0, 0.5)
    mixed, shares = mixing(images, labels, mixing.draw(number, seed=0))
    assert torch.equal(mixed[-1], images[-1])
    assert shares[-1].tolist() == F.one_hot(labels[-1], 3).tolist()
    assert len(mixed) == len(shares) == number


def test_the_top1_of_a_mixture_counts_the_dominant_class():
    meter = RunningLoss(CPU)
    meter.add(LOGITS, torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.9, 0.1], [0.2, 0.8, 0.0], [0.0, 0.3, 0.7]]), LOGITS.sum())
    assert meter.compute_and_reset()["top1"] == 75.0


def erased(erasing: Erasing, images: torch.Tensor, seed: int) -> torch.Tensor:
    drawn = erasing.draw(len(images), torch.Generator().manual_seed(seed))
    return erasing.fill(images, erasing.boxes(drawn, *images.shape[2:]))


def test_cutout_erases_one_square_of_the_requested_area():
    places = Counter()
    for image in erased(Erasing(1.0, "const", (0.25, 0.25), 1.0), torch.ones(64, 3, 16, 16), seed=3):
        rows, columns = (image[0] == 0).nonzero(as_tuple=True)
        assert len(rows) == 64
        assert (rows.max() - rows.min(), columns.max() - columns.min()) == (7, 7)
        places[int(rows.min()), int(columns.min())] += 1
    assert len(places) > 30


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_covers_as_much_as_timms(mode):
    found = erased(Erasing(0.5, mode), torch.full((2000, 3, 16, 16), 9.0), seed=0) != 9.0
    random.seed(0)
    of_timm, images = RandomErasing(0.5, mode=mode, device="cpu"), torch.full((2000, 3, 16, 16), 9.0)
    for image in images:
        of_timm(image)
    expected = images != 9.0
    assert found.flatten(1).any(1).float().mean() == pytest.approx(0.5, abs=0.04)
    assert found.float().mean() == pytest.approx(float(expected.float().mean()), rel=0.1)
    assert found.float().mean(0).std() == pytest.approx(float(expected.float().mean(0).std()), rel=0.1)


def test_erased_pixels_are_normal_and_independent_of_the_rest_of_the_batch():
    erasing, images = Erasing(0.5, "pixel"), torch.full((32, 3, 16, 16), 9.0)
    boxes = erasing.boxes(erasing.draw(32, torch.Generator().manual_seed(1)), 16, 16)
    together = erasing.fill(images, boxes)
    apart = torch.cat([erasing.fill(images[i : i + 1], boxes[i : i + 1]) for i in range(32)])
    assert torch.equal(together, apart)
    assert together[together != 9.0].std() == pytest.approx(1.0, abs=0.1)


# -- sampling


def numbered(count: int) -> Split:
    return Split(torch.arange(count).byte().view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone(), torch.arange(count) % 10)


def seen(ranks: int, accumulation: int, repeats: int, weights: torch.Tensor | None = None) -> list[list[int]]:
    """Global batch of every step of an epoch, in the order of the whole batch."""
    dealing = Dealing.of(24, 24 // ranks // accumulation, ranks)
    split, plain = numbered(200), Augmentation()
    loaders = [
        InMemoryLoader(dealing, r, CPU, 0, plain, (0.0,) * 3, (1 / 255,) * 3, repeats, split=split, weights=weights)
        for r in range(ranks)
    ]
    steps = zip(*(loader.steps(Progress(8, (1,))) for loader in loaders), strict=True)
    batches = []
    for parts in steps:
        numbers = [[int(n) for n in images[:, 0, 0, 0].round()] for rank in parts for images, _ in rank]
        order = [
            n for micro in range(accumulation) for rank in range(ranks) for n in numbers[rank * accumulation + micro]
        ]
        batches.append(order)
    return batches


def test_repeated_images_are_consecutive_on_any_number_of_ranks():
    once = seen(1, 1, 3)
    flat = [n for batch in once for n in batch]
    assert all(flat[i] == flat[i + 1] == flat[i + 2] for i in range(0, len(flat), 3))
    assert len(set(flat)) == len(flat) // 3 == 64
    assert seen(2, 1, 3) == seen(1, 2, 3) == seen(2, 2, 3) == once


def test_a_balanced_sampler_draws_each_class_as_often_and_the_same_on_any_number_of_ranks():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    drawn = labels[shuffled(3000, 4, class_balanced(labels).repeat(3))[:1000] % 1000]
    counts = torch.bincount(drawn, minlength=3)
    assert counts.min() > 270  # 333 each on average, deviation 15
    assert torch.equal(shuffled(1000, 4, class_balanced(labels)), shuffled(1000, 4, class_balanced(labels)))
    weights = class_balanced(numbered(200).labels)
    assert seen(1, 1, 1, weights) == seen(2, 2, 1, weights)


@pytest.mark.parametrize(
    ("kind", "ratio", "expected"),
    [
        ("long_tail", 100, [500, 300, 180, 108, 65, 39, 23, 14, 8, 5]),  # 500 · 100^(−c/9)
        ("step", 10, [500] * 5 + [50] * 5),
        ("long_tail", 1e6, [500, 108, 23, 5, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_an_imbalance_keeps_class_counts_given_by_the_formula(kind, ratio, expected):
    assert Imbalance(kind, ratio).counts(500, 10) == expected


# -- averages


def test_the_average_matches_float64_and_follows_unaveraged_weights():
    net = nn.Linear(3, 2)
    ema, reference = Ema(net, 0.95), copy.deepcopy(net.weight.detach().double())
    staying = torch.tensor([[True, True, False], [True, False, True]])
    for step in range(1, 60):
        with torch.no_grad():
            net.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        ema.update_()
        ema.follow_({"weight": ~staying})
        decay = min(0.95, (1 + step) / (10 + step))
        reference = torch.where(staying, decay * reference + (1 - decay) * net.weight.detach().double(), net.weight)
    assert torch.allclose(ema.tensors["weight"].double(), reference, atol=1e-6)
    assert torch.equal(ema.tensors["weight"][~staying], net.weight.detach()[~staying])


def test_the_average_is_swapped_in_and_out_for_the_weights():
    net = nn.BatchNorm1d(4)
    ema = Ema(net, 0.5)
    net(torch.randn(16, 4))
    ema.update_()
    live, averaged = copy.deepcopy(net.state_dict()), {name: t.clone() for name, t in ema.tensors.items()}
    with ema.in_place():
        assert all(torch.equal(net.state_dict()[name], t) for name, t in averaged.items())
        assert not torch.equal(net.running_mean, live["running_mean"])
    assert all(torch.equal(net.state_dict()[name], t) for name, t in live.items())
    assert all(torch.equal(ema.tensors[name], t) for name, t in averaged.items())


def test_tied_weights_are_restored_after_a_swap():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    ema, live = Ema(net, 0.5), net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    ema.update_()
    with ema.in_place():
        assert not torch.equal(net[1].weight, live + 1.0)
    assert torch.equal(net[1].weight, live + 1.0)


# -- the best epoch


def test_patience_counts_from_the_best_epoch_and_ties_are_no_improvement():
    best = Best(patience=2, keeps=True)
    ends = [
        best.note(top1, epoch, lambda e=epoch: {"w": torch.tensor(e)}) for epoch, top1 in enumerate([5, 7, 7, 6], 1)
    ]
    assert ends == [False, False, False, True]
    assert (best.top1, best.ended_after, int(best.weights["w"])) == (7, 4, 2)
    again = Best(patience=2, keeps=True)
    again.load_state_dict(*best.state_dict())
    assert again == best
    best.restart()
    assert best == Best(patience=2, keeps=True)


def test_without_patience_a_round_never_ends_early():
    best = Best()
    assert not any(best.note(1.0, epoch, dict) for epoch in range(50))
    assert best.weights is None


def scores(run) -> list[tuple[int, float]]:
    return [(e["round"], e["val/top1"]) for e in tiny.events(run) if e["event"] == "epoch"]


def test_a_round_ends_with_its_best_epoch_and_early_if_patience_runs_out(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    options = ("pruning.method=imp", "train.epochs=6", "train.round_epochs=6", "optim.lr=0.02")
    assert tiny.command("train", recipe, *options, "train.keep_best=true", "train.patience=2") == 0
    [run] = (tmp_path / "runs").iterdir()
    rows, found = rounds.load_rows(run), scores(run)
    for row in rows:
        of_round = [top1 for number, top1 in found if number == row.round]
        assert row.epochs == len(of_round)
        assert row.val_top1 == pytest.approx(max(of_round))
    assert min(row.epochs for row in rows) < 6


def test_a_round_is_scored_by_its_last_epoch(tmp_path, monkeypatch):
    """Three rounds of two epochs, the accuracy before and after two removals, three tickets on the test split."""
    counted, evaluation_batches = Counter(), data.evaluation_batches

    def counting(samples, *args, **options):
        counted[len(samples)] += 1
        return evaluation_batches(samples, *args, **options)

    monkeypatch.setattr(data, "evaluation_batches", counting)
    assert tiny.command("train", tiny.write_recipe(tmp_path)) == 0
    assert counted == {144: 3 * 2 + 2 * 2, 360: 3}
    run = tmp_path / "runs" / "tiny"
    epochs = [event["val/loss"] for event in tiny.events(run) if event["event"] == "epoch"]
    assert [event["val_loss"] for event in tiny.events(run) if event["event"] == "round"] == epochs[1::2]


@pytest.mark.parametrize(
    "method",
    [
        "{name: gmp, window: [0.5, 0.5]}",
        "{name: ste, window: [0.0, 0.5], interval: 2}",
        "{name: rsst, remove_at: 1.0}",
        "rst",
        "{name: refill}",
    ],
)
def test_the_best_epoch_of_any_method_is_one_after_its_last_removal(tmp_path, method):
    recipe = tiny.write_recipe(tmp_path)
    options = ("train.epochs=2", "train.round_epochs=3", "train.keep_best=true", "train.patience=1", "optim.lr=0.02")
    units = ("pruning.granularity=neuron", "pruning.schedule.final_sparsity=0.5") if "refill" in method else ()
    assert tiny.command("train", recipe, *options, *units, f"pruning.method={method}") == 0
    [run] = (tmp_path / "runs").iterdir()
    assert rounds.load_rows(run)[-1].density < 0.6


def test_a_models_auxiliary_loss_is_not_weighted_by_the_teacher(tmp_path, monkeypatch):
    seen = []
    plain = DynamicVit.auxiliary_loss

    def auxiliary_loss(net: DynamicVit) -> torch.Tensor:
        loss = plain(net)
        if not loss.is_meta:  # where the model is observed before it trains
            seen.append(loss)
        return 1000.0 * loss

    monkeypatch.setattr(DynamicVit, "auxiliary_loss", auxiliary_loss)
    args = json.dumps({"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "stages": [1]})
    options = ("model.name=dynamic_vit", f"model.args={args}", "train.distill={teacher: dense, weight: 1.0}")
    assert tiny.command("train", tiny.write_recipe(tmp_path), *options, "train.log_every_steps=1") == 0
    [run] = (tmp_path / "runs").iterdir()
    told = [event["train/loss"] for event in tiny.events(run) if event["event"] == "step"]
    assert all(loss >= 1000.0 * own.item() for loss, own in zip(told, seen, strict=True))


def test_the_teacher_of_the_later_rounds_is_the_model_of_round_0(tmp_path, monkeypatch):
    asked = []
    plain = Distillation.__call__
    monkeypatch.setattr(Distillation, "__call__", lambda s, *a: asked.append(s.teacher()) or plain(s, *a))
    monkeypatch.setattr(switches, "memory_format", lambda net, device: torch.channels_last)  # as of CNNs on a GPU
    assert tiny.command("train", tiny.write_recipe(tmp_path), "train.distill.teacher=dense") == 0
    [run] = (tmp_path / "runs").iterdir()
    assert asked[0] is None
    dense = load(rounds.ticket_path(run, 0)).state
    assert all(torch.equal(value, dense[name]) for name, value in asked[-1].state_dict().items())
    assert not asked[-1].training
    assert asked[-1].patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    other = ("name=other", f"train.distill.teacher={run}", "pruning.method=dense")
    assert tiny.command("train", tiny.write_recipe(tmp_path), *other, "--dry-run") == 0
    assert tiny.command("train", tiny.write_recipe(tmp_path), *other) == 0
    record = json.loads((run.parent / "other" / "environment.json").read_text())
    assert record["teacher"] == files.sha256(max((run / "tickets").glob("*.safetensors")))


def test_a_teacher_of_other_data_is_refused_before_anything_is_written(tmp_path, capsys):
    recipe = tiny.write_recipe(tmp_path)
    assert tiny.command("train", recipe, "name=teacher", "pruning.method=dense", "train.epochs=1") == 0
    args = json.dumps(tiny.MODEL_ARGS | {"img_size": 64})
    other = ("data.image_size=64", f"model.args={args}", f"train.distill.teacher={tmp_path}/runs/teacher")
    assert tiny.command("train", recipe, "name=student", *other) == 2
    assert "image size 32 there, 64 here" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "student").exists()
    for flags in ((), ("--dry-run",)):
        assert tiny.command("train", recipe, "name=student", "train.distill.teacher=nowhere", *flags) == 5
    own = (f"train.distill.teacher={tmp_path}/runs/student", "name=student")
    assert tiny.command("train", recipe, *own) == 2
