"""Diagnosis of a run's curves: the symptom in numbers and what to try in recipe fields.

A rule fires only far outside of what a healthy run looks like, and at most once, the first time.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vit_rsst.report.history import History, at, number

PREFIX = "diagnosis: "
"""Marks the log warnings that are diagnoses."""


@dataclass(frozen=True)
class Diagnosis:
    """What a rule found.

    Attributes:
        name: of the rule.
        seen: the symptom in numbers, a sentence.
        advice: what to try.
    """

    name: str
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.seen} Try {self.advice}."


@dataclass(frozen=True)
class Curve:
    """The epochs of one round; infinities and NaN as logged.

    Attributes:
        density: after each epoch; NaN while condemned weights shrink.
    """

    train_loss: list[float]
    val_loss: list[float]
    train_top1: list[float]
    val_top1: list[float]
    density: list[float]

    @classmethod
    def of(cls, events: list[dict]) -> "Curve":
        keys = ("train/loss", "val/loss", "train/top1", "val/top1")
        density = [
            math.nan if "prune/condemned_left" in e else number({"prune/density": 1.0} | e, "prune/density")
            for e in events
        ]
        return cls(*([number(event, key) for event in events] for key in keys), density)

    def __len__(self) -> int:
        return len(self.val_loss)


def diagnose(history: History) -> list[Diagnosis]:
    """Findings of all rules so far, at most one each, in the order of the rules."""
    found = (next(rule(history), None) for rule in RULES)
    return [diagnosis for diagnosis in found if diagnosis is not None]


def rounds(history: History) -> Iterator[tuple[int, Curve]]:
    """Each round with its epochs so far."""
    for round in sorted({event["round"] for event in history.epochs}):
        yield round, Curve.of([event for event in history.epochs if event["round"] == round])


def not_learning(history: History) -> Iterator[Diagnosis]:
    """After five or more epochs accuracy has not moved, and the loss is flat or fell without any gain in accuracy.

    A loss that halves without any gain recovers from an early blow-up to the loss of guessing.
    """
    for round, curve in rounds(history):
        if round > 0:
            return
        for i in range(4, len(curve)):
            then, now = curve.train_loss[i - 3], curve.train_loss[i]
            best = max(curve.train_top1[: i + 1])
            # Training and validation: a small validation split is noisy.
            rises = [(top1[0], max(top1[: i + 1])) for top1 in (curve.train_top1, curve.val_top1)]
            flat = [high < low + 2.0 and high <= 1.5 * low for low, high in rises]  # with 1,000 classes 0.7 % is a lot
            stands = now > 0.97 * then and any(flat)
            fell_in_vain = now < 0.5 * max(curve.train_loss[: i + 1]) and flat[0]
            if (stands or fell_in_vain) and best < 55.0:  # pretrained weights are flat too
                yield Diagnosis(
                    "not learning",
                    f"after {i + 1} epochs the training loss is {now:.3f} ({then:.3f} three epochs earlier) and "
                    f"training top-1 has never exceeded {best:.2f} %.",
                    "running vit-rsst check on this recipe, a 10× lower or higher optim.lr, or optim.warmup_epochs",
                )
                return


def diverging(history: History) -> Iterator[Diagnosis]:
    """The loss is not finite, keeps climbing, or stays high; while weights are being removed it may."""
    for round, curve in rounds(history):
        for i, loss in enumerate(curve.train_loss):
            where = f"in round {round} the training loss"
            advice = "a lower optim.lr, more optim.warmup_epochs, or optim.clip_grad_norm=1.0"
            if not math.isfinite(loss):
                yield Diagnosis("diverging", f"{where} became non-finite in epoch {i + 1}.", advice)
                return
            so_far = zip(curve.train_loss[: i + 1], curve.density, strict=False)
            alike = [value for value, density in so_far if density == curve.density[i]]
            if len(alike) < 3 or len(set(curve.density[i - 2 : i + 1])) > 1:
                continue
            last, lowest = alike[-3:], min(alike)
            high = max(1.5 * lowest, lowest + 0.3)
            if loss > high and (last[0] < last[1] < last[2] or min(last) > high):
                yield Diagnosis("diverging", f"{where} rose from {lowest:.3f} to {loss:.3f} by epoch {i + 1}.", advice)
                return


def overfitting(history: History) -> Iterator[Diagnosis]:
    """Validation gets worse while training gets better, for three epochs in a row; a single one is noise."""
    for round, curve in rounds(history):
        for i in range(3, len(curve)):
            best = min(range(i + 1), key=lambda j: curve.val_loss[j])
            low, last = curve.val_loss[best], range(i - 2, i + 1)
            apart = min(curve.train_top1[j] - curve.val_top1[j] for j in last)
            rose = min(curve.val_loss[j] for j in last) > 1.15 * low
            if i - best >= 3 and rose and apart > 10.0 and curve.train_loss[i] < curve.train_loss[best]:
                yield Diagnosis(
                    "overfitting",
                    f"in round {round} the validation loss rose from {low:.3f} (epoch {best + 1}) to "
                    f"{curve.val_loss[i]:.3f} (epoch {i + 1}) while the training loss fell; training top-1 is "
                    f"{apart:.1f} points above validation.",
                    "stronger data.augment, a higher optim.weight_decay, train.label_smoothing=0.1, or fewer "
                    "train.epochs",
                )
                return


def underfitting(history: History) -> Iterator[Diagnosis]:
    """Round 0 has finished with training no better than validation and both low: still improving, or stuck."""
    curves = dict(rounds(history))
    curve = curves.get(0)
    is_over = history.state == "finished" or len(curves) > 1 or len(history.rows) > 0
    if curve is None or len(curve) < 8 or not is_over or any(not_learning(history)) or any(diverging(history)):
        return
    train, val = curve.train_top1[-1], curve.val_top1[-1]
    if not (max(train, val) < 70.0 and train - val < 2.0):  # under strong augmentation, train alone is low
        return
    last, quarter = curve.val_loss[-1], curve.val_loss[-1 - len(curve) // 4]
    seen = f"after {len(curve)} epochs training top-1 is {train:.1f} % and validation top-1 {val:.1f} %"
    if last < 0.9 * quarter:
        yield Diagnosis(
            "underfitting",
            f"{seen}, and the validation loss was still falling, from {quarter:.3f} to {last:.3f} over the last "
            "quarter.",
            "more train.epochs or a higher optim.lr",
        )
    elif max(train, val) < 60.0 and last > 0.98 * quarter:
        yield Diagnosis(
            "underfitting",
            f"{seen}, and the validation loss has plateaued at {last:.3f} over the last quarter.",
            "a wider or deeper model (model.args), a higher optim.lr, a lower optim.weight_decay, or weaker "
            "data.augment",
        )


def loader_bound(history: History) -> Iterator[Diagnosis]:
    """The model waits for the data loader."""
    waits = [number(event, "time/loader_wait") for event in history.epochs if "time/loader_wait" in event]
    if len(waits) >= 2 and min(waits[-2:]) > 0.25:
        yield Diagnosis(
            "loader-bound",
            f"data loading is the bottleneck: {waits[-1]:.0%} of the time is spent waiting for images.",
            "more data.workers, data.in_memory=true, or smaller images on disk",
        )


def penalty_without_effect(history: History) -> Iterator[Diagnosis]:
    """At removal the condemned are nearly as large as they would be without a penalty."""
    if not at(history.recipe, "pruning.method.penalty", None):
        return
    for report in history.pruning:
        ratio = report.get("condemned_ratio")
        if ratio is not None and ratio > 0.2:
            yield Diagnosis(
                "penalty without effect",
                f"in round {report['round']} the condemned weights were removed at {ratio:.2f} × the size of the "
                "kept ones.",
                "a smaller penalty.residual, a longer penalty.window, penalty.coupling=decoupled, or a higher "
                "penalty.strength with penalty.coupling=gradient",
            )


def layer_nearly_empty(history: History) -> Iterator[Diagnosis]:
    """A layer has hardly any weights left."""
    for report in history.pruning:
        layers = {name: layer for name, layer in report.get("layers", {}).items() if layer["density"] < 0.015}
        if layers:
            name = min(layers, key=lambda layer: layers[layer]["density"])
            more = f"; {len(layers) - 1} more layers are below 1.5 %" if len(layers) > 1 else ""
            left = f"{name.removesuffix('.weight')} keeps only {layers[name]['density']:.2%} of its weights"
            yield Diagnosis(
                "layer nearly empty",
                f"after round {report['round']} {left}{more}.",
                "a lower pruning.max_layer_sparsity, pruning.scope=layer or erk, or pruning.protect",
            )


def removal_costs(history: History) -> Iterator[Diagnosis]:
    """Removal, or the shrinking before it, cost accuracy that the round did not recover.

    The loss must agree: a few images of a small split are noise.
    """
    loss_gaps = {report.get("round"): report.get("what_if_loss_gap") for report in history.pruning}
    for before, row in itertools.pairwise(history.rows):
        gap, loss_gap = row.what_if_gap, loss_gaps.get(row.round)
        lost, lost_loss = before.val_top1 - row.val_top1, row.val_loss - before.val_loss
        if gap is not None and gap >= 2.0 and lost >= 2.0 and (loss_gap is None or loss_gap > 0.05):
            yield Diagnosis(
                "removal costs accuracy",
                f"in round {row.round} removal cost {gap:.2f} points immediately, and {lost:.2f} points were still "
                f"missing at the end of the round, at density {row.density:.3f}.",
                "more pruning.schedule.rounds, pruning.method=rsst, a longer penalty.window, or more "
                "train.round_epochs",
            )
        elif lost >= 5.0 and lost_loss > 0.05 and row.density < before.density:
            yield Diagnosis(
                "removal costs accuracy",
                f"round {row.round} ended {lost:.2f} points of validation top-1 below the previous round, at density "
                f"{row.density:.3f}; accuracy was lost while the weights shrank, not only at their removal.",
                "a lower pruning.schedule.final_sparsity, more pruning.schedule.rounds, or more train.round_epochs",
            )


RULES: tuple[Callable[[History], Iterator[Diagnosis]], ...] = (
    diverging,
    not_learning,
    overfitting,
    underfitting,
    loader_bound,
    penalty_without_effect,
    layer_nearly_empty,
    removal_costs,
)
