"""Checks of what the model is shown: classes, labels that belong to their images, normalisation."""

import math

import numpy as np
import torch
from torch import Tensor

from vit_rsst.checks.bench import Bench, Verdict

FITTED, ASKED = 2000, 500
"""Images that a linear classifier is fitted to, and asked about."""


def classes(bench: Bench) -> Verdict:
    """Every class is there, and the labels are 0 … C − 1."""
    labels = bench.draw("train", FITTED, 0)[1].cpu()
    counts = torch.bincount(labels, minlength=bench.num_classes)
    details = {"images": counts.tolist()}
    missing = [bench.data.classes[i] for i in (counts == 0).nonzero().flatten() if i < bench.num_classes]
    if len(labels.unique()) == 1:
        name = bench.data.classes[int(labels[0])]
        text = f"all {len(labels):,} images looked at are of one class, {name!r}; there is nothing to tell apart"
        return Verdict("classes", "failed", text, "look at data.label_column and at the labels of data.path", details)
    if missing and len(labels) >= 5 * bench.num_classes:
        text = f"{len(missing)} of {bench.num_classes} classes have no training image: {', '.join(missing[:5])}"
        return Verdict(
            "classes", "warning", text, "are they meant to be empty? data.train_samples may be too few", details
        )
    text = f"{len(labels.unique())} of {bench.num_classes} classes among {len(labels):,} training images"
    return Verdict("classes", "ok", text, details=details)


def labels(bench: Bench) -> Verdict:
    """A linear classifier of the pixels, fitted to training images, is better than chance on validation images.

    Labels that are shifted against their images, or mean other classes in one of the splits, leave it at chance. Its
    mean recall over classes is looked at, for which a class of most images is not worth more than any other: whoever
    guesses has one over the number of classes.
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
        f"a linear classifier of pixels has a mean recall of {recall:.1%} on {len(truth)} validation images, "
        f"chance {chance:.1%}"
    )
    details = {"mean_recall": recall, "chance": chance}
    if recall > chance + 3 * noise:
        return Verdict("labels", "ok", text, details=details)
    if len(y) < 20 * bench.num_classes or chance + 3 * noise >= 1:
        text += f"; {len(y)} images to learn from and these of {bench.num_classes} classes are too few to tell"
        return Verdict("labels", "warning", text, "look at some images with their labels", details)
    advice = "the labels may belong to other images or mean other classes in one split; look at data.label_column"
    return Verdict("labels", "failed", text, advice, details)


def _pixels(images: Tensor) -> np.ndarray:
    """Images as rows of 8 × 8 px, (images, 192)."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float().cpu(), 8).flatten(1).double().numpy()


def mean_recall(answers: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Mean recall over the classes that are there; what a guess has, and the standard deviation of such a guess.

    Args:
        answers, truth: classes, (images,). The guess answers as often with each class, whatever the image.
    """
    there, images = np.unique(truth, return_counts=True)
    recalls = [float((answers[truth == c] == c).mean()) for c in there]
    shares = np.array([float((answers == c).mean()) for c in there])
    noise = math.sqrt(float((shares * (1 - shares) / images).sum())) / len(there)
    return sum(recalls) / len(there), 1 / len(there), noise


def normalisation(bench: Bench) -> Verdict:
    """What training sees has a mean near 0 and a deviation near 1 in every channel."""
    images = torch.cat([batch[0] for batch in bench.batches(4)]).float()
    mean, deviation = (values.tolist() for values in (images.mean((0, 2, 3)), images.std((0, 2, 3))))
    shown = [" ".join(f"{value:.2f}" for value in values) for values in (mean, deviation)]
    text = f"channels have mean {shown[0]} and deviation {shown[1]} in the batches of training"
    details = {"mean": mean, "std": deviation}
    if all(abs(m) <= 1.0 and 0.5 <= s <= 2.0 for m, s in zip(mean, deviation, strict=True)):
        return Verdict("normalisation", "ok", text, details=details)
    advice = "they should be near 0 and 1: the images are not normalised, or with another set's mean and deviation"
    return Verdict("normalisation", "failed", text, advice, details)
