"""Diagnosis in words, from the curves of a run: what is seen, in numbers, and what to try, in fields of the recipe.

A rule speaks only of what is far outside of a healthy run, and each at most once: the first time that it is seen.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vit_rsst.report.history import History, number

PREFIX = "diagnosis: "
"""Of the warnings that a diagnosis becomes in the log."""


@dataclass(frozen=True)
class Diagnosis:
    """What a rule saw.

    Attributes:
        name: of the rule.
        seen: with numbers, a sentence.
        advice: what to try.
    """

    name: str
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.seen} Try {self.advice}."


@dataclass(frozen=True)
class Curve:
    """The epochs of one round; infinities and NaN are as they were logged."""

    train_loss: list[float]
    val_loss: list[float]
    train_top1: list[float]
    val_top1: list[float]

    @classmethod
    def of(cls, events: list[dict]) -> "Curve":
        keys = ("train/loss", "val/loss", "train/top1", "val/top1")
        return cls(*([number(event, key) for event in events] for key in keys))

    def __len__(self) -> int:
        return len(self.val_loss)


def diagnose(history: History) -> list[Diagnosis]:
    """What all rules see by now, each at most once, in the order of the rules."""
    found = (next(rule(history), None) for rule in RULES)
    return [diagnosis for diagnosis in found if diagnosis is not None]


def rounds(history: History) -> Iterator[tuple[int, Curve]]:
    """Each round with its epochs so far."""
    for round in sorted({event["round"] for event in history.epochs}):
        yield round, Curve.of([event for event in history.epochs if event["round"] == round])


def not_learning(history: History) -> Iterator[Diagnosis]:
    """After five epochs neither the loss nor the accuracy has moved."""
    for round, curve in rounds(history):
        if round > 0 or len(curve) < 5:
            return
        first, last = curve.train_loss[0], curve.train_loss[4]
        gained = max(curve.val_top1[:5]) - curve.val_top1[0]
        if last > 0.97 * first and gained < 2.0:
            yield Diagnosis(
                "not learning",
                f"after 5 epochs the training loss is {last:.3f}, after the first it was {first:.3f}, and validation "
                f"top-1 gained {gained:.2f} points.",
                "vit-rsst check with this recipe, optim.lr ten times lower or higher, optim.warmup_epochs",
            )


def diverging(history: History) -> Iterator[Diagnosis]:
    """The loss is not finite, or climbs and climbs."""
    for round, curve in rounds(history):
        for i, loss in enumerate(curve.train_loss):
            lowest = min((value for value in curve.train_loss[: i + 1] if math.isfinite(value)), default=math.nan)
            climbs = i >= 2 and curve.train_loss[i - 2] < curve.train_loss[i - 1] < loss
            if not math.isfinite(loss) or (climbs and loss > 1.5 * lowest and loss > lowest + 0.3):
                yield Diagnosis(
                    "diverging",
                    f"in round {round} the training loss climbed from {lowest:.3f} to {loss:.3f} by epoch {i + 1}.",
                    "a lower optim.lr, a longer optim.warmup_epochs, optim.clip_grad_norm=1.0",
                )
                return


def overfitting(history: History) -> Iterator[Diagnosis]:
    """Validation gets worse while training gets better, for three epochs: one alone is noise."""
    for round, curve in rounds(history):
        for i in range(3, len(curve)):
            best = min(range(i + 1), key=lambda j: curve.val_loss[j])
            low, last = curve.val_loss[best], range(i - 2, i + 1)
            apart = min(curve.train_top1[j] - curve.val_top1[j] for j in last)
            rose = min(curve.val_loss[j] for j in last) > 1.15 * low
            if i - best >= 3 and rose and apart > 10.0 and curve.train_loss[i] < curve.train_loss[best]:
                yield Diagnosis(
                    "overfitting",
                    f"in round {round} the validation loss rose from {low:.3f} in epoch {best + 1} to "
                    f"{curve.val_loss[i]:.3f} in epoch {i + 1} while the training loss fell, and training top-1 is "
                    f"{apart:.1f} points above validation.",
                    "stronger data.augment, a higher optim.weight_decay, train.label_smoothing=0.1, fewer train.epochs",
                )
                return


def underfitting(history: History) -> Iterator[Diagnosis]:
    """Round 0 is over, training is no better than validation, and both are low: still rising, or stuck."""
    curves = dict(rounds(history))
    curve = curves.get(0)
    is_over = history.state == "finished" or len(curves) > 1 or len(history.rows) > 0
    if curve is None or len(curve) < 8 or not is_over or any(not_learning(history)):
        return
    train, val = curve.train_top1[-1], curve.val_top1[-1]
    if not (train < 70.0 and train - val < 2.0):
        return
    quarter, half = curve.val_loss[-1 - len(curve) // 4], curve.val_loss[-1 - len(curve) // 2]
    seen = f"after {len(curve)} epochs training top-1 is {train:.1f} and validation {val:.1f}"
    if curve.val_loss[-1] < 0.9 * quarter:
        yield Diagnosis(
            "underfitting",
            f"{seen}, and the validation loss still fell from {quarter:.3f} to {curve.val_loss[-1]:.3f} over the last "
            "quarter.",
            "more train.epochs, a higher optim.lr",
        )
    elif train < 60.0 and abs(curve.val_loss[-1] - half) < 0.02 * half:
        yield Diagnosis(
            "underfitting",
            f"{seen}, and the validation loss has stood at {curve.val_loss[-1]:.3f} since half of them.",
            "a wider or deeper model (model.args), a higher optim.lr, a lower optim.weight_decay, weaker data.augment",
        )


def loader_bound(history: History) -> Iterator[Diagnosis]:
    """The model waits for images."""
    waits = [number(event, "time/loader_wait") for event in history.epochs if "time/loader_wait" in event]
    if len(waits) >= 2 and min(waits[-2:]) > 0.25:
        yield Diagnosis(
            "loader-bound",
            f"{waits[-1]:.0%} of the time is spent waiting for images.",
            "more data.workers, data.in_memory=true, images that are smaller on disk",
        )


def penalty_without_effect(history: History) -> Iterator[Diagnosis]:
    """When the condemned are removed they are still about as large as they would be without a penalty."""
    method = history.recipe.get("pruning", {}).get("method", {})
    if not isinstance(method, dict) or not method.get("penalty"):
        return
    for report in history.pruning:
        ratio = report.get("condemned_ratio")
        if ratio is not None and ratio > 0.2:
            yield Diagnosis(
                "penalty without effect",
                f"in round {report['round']} the condemned were removed at {ratio:.2f} of the size of the kept.",
                "a smaller penalty.residual, a longer penalty.window, penalty.coupling=decoupled, or a higher "
                "penalty.strength where it is gradient",
            )


def layer_nearly_empty(history: History) -> Iterator[Diagnosis]:
    """Hardly anything of a layer is left."""
    for report in history.pruning:
        layers = {name: layer for name, layer in report.get("layers", {}).items() if layer["density"] < 0.015}
        if layers:
            name = min(layers, key=lambda layer: layers[layer]["density"])
            more = f" and {len(layers) - 1} more layers are below 1.5 %" if len(layers) > 1 else ""
            left = f"{layers[name]['density']:.2%} of {name.removesuffix('.weight')} is left"
            yield Diagnosis(
                "layer nearly empty",
                f"after round {report['round']} {left}{more}.",
                "a lower pruning.max_layer_sparsity, pruning.scope=layer or erk, pruning.protect",
            )


def removal_costs(history: History) -> Iterator[Diagnosis]:
    """A removal cost accuracy that its round did not win back."""
    for before, row in zip(history.rows, history.rows[1:], strict=False):
        lost = before.val_top1 - row.val_top1
        if row.what_if_gap is not None and row.what_if_gap >= 2.0 and lost >= 2.0:
            yield Diagnosis(
                "removal costs accuracy",
                f"in round {row.round} the removal cost {row.what_if_gap:.2f} points at once, and {lost:.2f} were "
                f"still missing at its end, at density {row.density:.3f}.",
                "more pruning.schedule.rounds, pruning.method=rsst or a longer penalty.window, more train.round_epochs",
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
