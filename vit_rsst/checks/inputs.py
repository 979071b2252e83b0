"""Checks of the model's input: classes, labels, normalisation."""

import math

import numpy as np
import torch
from torch import Tensor

from vit_rsst.checks.bench import Bench, Verdict

FITTED, ASKED = 2000, 500
"""Images that the linear classifier is fitted to, and tested on."""


def classes(bench: Bench) -> Verdict:
    """Every class has images, and labels are 0 … C − 1."""
    labels = bench.draw("train", FITTED, 0)[1].cpu()
    counts = torch.bincount(labels, minlength=bench.num_classes)
    details = {"images": counts.tolist()}
    missing = [bench.data.classes[i] for i in (counts == 0).nonzero().flatten() if i < bench.num_classes]
    if len(labels.unique()) == 1:
        name = bench.data.classes[int(labels[0])]
        text = f"all {len(labels):,} sampled images belong to one class, {name!r}; there is nothing to classify"
        return Verdict("classes", "failed", text, "check data.label_column and the labels in data.path", details)
    if missing and len(labels) >= 5 * bench.num_classes:
        text = f"{len(missing)} of {bench.num_classes} classes have no training image: {', '.join(missing[:5])}"
        return Verdict(
            "classes", "warning", text, "are they meant to be empty? data.train_samples may be too small", details
        )
    text = f"{len(labels.unique())} of {bench.num_classes} classes among {len(labels):,} training images"
    return Verdict("classes", "ok", text, details=details)


def labels(bench: Bench) -> Verdict:
    """A linear classifier on pixels, fitted to training images, beats chance on validation images.

    It stays at chance if labels are shifted against their images or differ in meaning between splits. The score is
    the mean recall over classes, in which frequent classes count no more than rare ones: chance is 1 / classes.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = bench.draw("train", FITTED, 0)
    asked, truth = bench.draw("val", ASKED, 1)
    ridge = RidgeClassifier(alpha=0.1 * len(x), class_weight="balanced")
    classifier = make_pipeline(StandardScaler(), ridge).fit(_pixels(x), y.cpu().numpy())
    recall, chance, noise = mean_recall(classifier.predict(_pixels(asked)), truth.cpu().numpy())
    text = (
        f"a linear classifier on pixels has a mean recall of {recall:.1%} on {len(truth)} validation images, "
        f"chance {chance:.1%}"
    )
    details = {"mean_recall": recall, "chance": chance}
    if recall > chance + 3 * noise:
        return Verdict("labels", "ok", text, details=details)
    if len(y) < 20 * bench.num_classes or chance + 3 * noise >= 1:
        text += f"; inconclusive: too few images ({len(y)} for training) for {bench.num_classes} classes"
        return Verdict("labels", "warning", text, "inspect some images and their labels", details)
    advice = "labels may be shifted, or differ in meaning between splits; check data.label_column"
    return Verdict("labels", "failed", text, advice, details)


def _pixels(images: Tensor) -> np.ndarray:
    """Images downsampled to 8 × 8 px, (images, 192)."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float().cpu(), 8).flatten(1).double().numpy()


def mean_recall(answers: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Mean recall over the classes present; that of a random guess, and its standard deviation.

    Args:
        answers, truth: classes, (images,). The guess predicts each class as often as `answers` does.
    """
    there, images = np.unique(truth, return_counts=True)
    recalls = [float((answers[truth == c] == c).mean()) for c in there]
    shares = np.array([float((answers == c).mean()) for c in there])
    noise = math.sqrt(float((shares * (1 - shares) / images).sum())) / len(there)
    return sum(recalls) / len(there), 1 / len(there), noise


def normalisation(bench: Bench) -> Verdict:
    """Training batches have a mean near 0 and a standard deviation near 1 in every channel."""
    images = torch.cat([batch[0] for batch in bench.batches(4)]).float()
    mean, deviation = (values.tolist() for values in (images.mean((0, 2, 3)), images.std((0, 2, 3))))
    shown = [" ".join(f"{value:.2f}" for value in values) for values in (mean, deviation)]
    text = f"training batches have channel means {shown[0]} and standard deviations {shown[1]}"
    details = {"mean": mean, "std": deviation}
    if all(abs(m) <= 1.0 and 0.5 <= s <= 2.0 for m, s in zip(mean, deviation, strict=True)):
        return Verdict("normalisation", "ok", text, details=details)
    advice = "expected about 0 and 1: images are not normalised, or with the statistics of another dataset"
    return Verdict("normalisation", "failed", text, advice, details)
