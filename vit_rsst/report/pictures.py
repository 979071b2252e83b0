"""Figures that need the model and its test images: confusions and attention maps."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vit_rsst import files
from vit_rsst.assembly.data import evaluation_batch
from vit_rsst.data.decoding import Corrupt, Decoder, Sample
from vit_rsst.data.images import ImageData
from vit_rsst.data.sources import open_data
from vit_rsst.data.tables import Rows, Split
from vit_rsst.data.transforms import normalize
from vit_rsst.evaluation.evaluate import outcomes_of
from vit_rsst.evaluation.outcomes import Outcomes, most_confused
from vit_rsst.report import canvas
from vit_rsst.report.attention import attention, mean_of_heads, over_patches, rollout
from vit_rsst.report.history import SCORES
from vit_rsst.text import clipped
from vit_rsst.tickets import rounds
from vit_rsst.tickets.trained import Trained, open_trained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN, NAME = 6, 11
"""Images per row, and the longest class name above one, in columns."""


@dataclass(frozen=True)
class Exhibit:
    """A ticket and its predictions on the test images.

    Attributes:
        dense: the ticket of round 0, for comparison; None if it is the same.
    """

    trained: Trained
    dense: Trained | None
    data: ImageData
    device: torch.device

    @classmethod
    def of(cls, run: Path, device: torch.device) -> "Exhibit":
        """The last ticket of a run folder.

        Raises:
            RunError: there is no ticket, it cannot be read, or the dataset is missing.
        """
        last, first = rounds.last_ticket(run), rounds.ticket_path(run, 0)
        dense = open_trained(first) if first.is_file() and first != last else None
        trained = open_trained(last)
        return cls(trained, dense, open_data(trained.data, trained.seed), device)

    @cached_property
    def outcomes(self) -> Outcomes:
        return outcomes_of(self.trained, self.data, "test", evaluation_batch(self.device), self.device)[0]

    @property
    def classes(self) -> list[str]:
        return self.trained.classes

    @cached_property
    def confusion(self) -> np.ndarray:
        """Number of images by true and predicted class."""
        number, found = len(self.classes), self.outcomes
        return np.bincount(found.labels * number + found.predictions, minlength=number**2).reshape(number, number)

    @cached_property
    def samples(self) -> Split:
        """One test image from each of the first few classes."""
        _, first = np.unique(self.outcomes.labels, return_index=True)
        return self.pictures(np.sort(first[:SHOWN]))

    def pictures(self, positions: np.ndarray) -> Split:
        """Test images by position among the decodable ones, as in the outcomes."""
        samples, last = self.data.samples("test"), int(positions.max())
        if isinstance(samples, Split):
            return Split(samples.images[positions], samples.labels[positions])
        decoder = self.data.decoder("test")
        if self.trained.data.max_corrupt:
            seen = enumerate(islice(_decodable(samples.walk(None), decoder), last + 1))
            kept = {place: pair for place, pair in seen if place in positions}
            found = [kept[position] for position in positions.tolist()]
        else:
            if isinstance(samples, Rows):
                chosen = list(replace(samples, index=samples.index[positions]).walk(None))
            else:
                walked = list(islice(samples.walk(None), last + 1))
                chosen = [walked[position] for position in positions]
            found = [(decoder.picture(sample), sample.label) for sample in decoder.fetched(chosen)]
        images, labels = zip(*found, strict=True)
        return Split(torch.from_numpy(np.stack(images)), torch.tensor(labels))

    def save_scores(self, folder: Path) -> None:
        """Saves the confusion matrix for reports."""
        found = {
            "ticket": self.trained.path.name,
            "density": self.trained.mask.density,
            "classes": self.classes,
            "confusion": self.confusion.tolist(),
        }
        folder.mkdir(exist_ok=True)
        files.write_text(folder / SCORES, json.dumps(found, ensure_ascii=False) + "\n")


def _decodable(samples: Iterator[Sample], decoder: Decoder) -> Iterator[tuple[np.ndarray, int]]:
    """Pixels and label of each image that can be decoded."""
    for sample in samples:
        [fetched] = decoder.fetched([sample])
        with suppress(Corrupt):
            yield decoder.picture(fetched), sample.label


def confusion(exhibit: Exhibit) -> "Figure":
    """Share of each true class predicted as each class."""
    counts, classes = exhibit.confusion, exhibit.classes
    number = len(classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = canvas.figure(4.4)
    axes = figure.subplots()
    mesh = axes.imshow(shares, cmap=canvas.HEAT, vmin=0, vmax=1, interpolation="nearest")
    if number <= 12:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(j, i, str(count), ha="center", va="center", fontsize=8,
                          color="#fffffd" if shares[i, j] < 0.6 else "#000001")  # fmt: skip
    every = -(-number // 20)
    ticks = range(0, number, every)
    names = [clipped(classes[i], 16) for i in ticks]
    axes.set_xticks(ticks, names, rotation=90 if max(map(len, classes)) > 2 else 0)
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted", ylabel="true")
    axes.grid(visible=False)
    figure.colorbar(mesh, ax=axes, label="share of the true class", shrink=0.8).outline.set_visible(False)
    return figure


def confused(exhibit: Exhibit, pairs: int = 5) -> "Figure | None":
    """The most frequent confusions, one row of images per pair of classes."""
    most = most_confused(exhibit.confusion.tolist(), pairs)
    if not most or exhibit.trained.data.max_corrupt:  # finding an image would mean decoding all before it
        return None
    found = exhibit.outcomes
    figure = canvas.figure(0.35 + 0.85 * len(most))
    grid = figure.subplots(len(most), SHOWN, squeeze=False)
    for (count, true, predicted), row in zip(most, grid, strict=True):
        of_pair = np.flatnonzero((found.labels == true) & (found.predictions == predicted))[:SHOWN]
        for axes, picture in zip(row, exhibit.pictures(of_pair).images, strict=False):
            _show(axes, picture)
        for axes in row:
            axes.set_axis_off()
        meant, said = (clipped(exhibit.classes[i], 24) for i in (true, predicted))
        names = f"{meant} predicted as {said} ({count})"
        row[-1].set_title(" ", fontsize=9)  # keeps the height; as a title, the names would widen the first column
        above = {"xytext": (0, 4), "textcoords": "offset points", "fontsize": 9}
        row[0].annotate(names, (0, 1), xycoords="axes fraction", **above).set_in_layout(False)
    return figure


def attended(exhibit: Exhibit) -> "Figure | None":
    """Attention of the pruned model: in the last layer, and rolled out through all layers."""
    return _maps(exhibit, [("last layer", exhibit.trained, last_layer), ("rollout", exhibit.trained, through_all)])


def dense_beside_pruned(exhibit: Exhibit) -> "Figure | None":
    """Attention on the same images: the ticket of round 0 and the last one."""
    if exhibit.dense is None:
        return None
    names = [f"density {trained.mask.density:.2g}" for trained in (exhibit.dense, exhibit.trained)]
    return _maps(exhibit, [(names[0], exhibit.dense, through_all), (names[1], exhibit.trained, through_all)])


def last_layer(layers: list[Tensor], alive: list[Tensor]) -> Tensor:
    return mean_of_heads(layers[-1], alive[-1])


def through_all(layers: list[Tensor], alive: list[Tensor]) -> Tensor:
    return rollout(layers, alive)


def _maps(exhibit: Exhibit, rows: list[tuple[str, Trained, Callable]]) -> "Figure | None":
    """A row of images, then a row of maps for each (label, model, method), with the prediction above each map."""
    images = exhibit.samples.images
    found = [(label, *_looked(trained, images, exhibit.device, way)) for label, trained, way in rows]
    if any(maps is None for _, maps, _ in found):
        return None
    figure = canvas.figure(1.05 + 1.2 * len(rows))
    grid = figure.subplots(1 + len(rows), len(images), squeeze=False)
    for axes, picture, label in zip(grid[0], images, exhibit.samples.labels.tolist(), strict=True):
        _show(axes, picture)
        axes.set_title(clipped(exhibit.classes[label], NAME), fontsize=9)
    for row, (label, maps, probabilities) in zip(grid[1:], found, strict=True):
        for axes, picture, looked, chances in zip(row, images, maps, probabilities, strict=True):
            _show(axes, picture, looked)
            best = int(chances.argmax())
            axes.set_title(f"{clipped(exhibit.classes[best], NAME)}\n{100 * float(chances[best]):.0f} %", fontsize=9)
        row[0].set_ylabel(label, fontsize=9)
    return figure


def _looked(trained: Trained, images: Tensor, device: torch.device, way: Callable) -> tuple[Tensor | None, Tensor]:
    """Maps over patches (images, side, side) and probabilities (images, classes)."""
    batch = normalize(images.to(device), trained.mean, trained.std)
    layers, alive, logits = attention(trained.net.to(device), batch)
    maps = over_patches(way(layers, alive)) if layers else None
    return None if maps is None else maps.cpu(), logits.float().softmax(1).cpu()


def _show(axes: "Axes", picture: Tensor, looked: Tensor | None = None) -> None:
    """An image, under an attention map if there is one."""
    pixels = picture.permute(1, 2, 0).cpu().numpy()
    if looked is not None:
        pixels = np.repeat(pixels.mean(2, keepdims=True), 3, 2).astype(np.uint8)
    size = pixels.shape[0]
    axes.imshow(pixels, extent=(0, size, size, 0), interpolation="nearest")
    if looked is not None:
        axes.imshow(looked.numpy(), extent=(0, size, size, 0), cmap="inferno", alpha=0.6, interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


@dataclass(frozen=True)
class Picture:
    """A figure of a model; see `curves.Drawing`."""

    name: str
    title: str
    caption: str
    draw: Callable[[Exhibit], "Figure | None"]


PICTURES = (
    Picture("confusion", "Confusion matrix", "Last ticket on the test split.", confusion),
    Picture(
        "confused", "Most confused classes", "The last ticket's most frequent confusions, with test images.", confused
    ),
    Picture(
        "attention",
        "Attention maps",
        "What the class token attends to (or the average patch, without a class token): in the last layer, and through "
        "all layers by attention rollout (Abnar & Zuidema 2020).",
        attended,
    ),
    Picture(
        "dense_beside_pruned",
        "Dense against pruned",
        "Attention rollout and predictions of the ticket of round 0 (top) and of the last ticket (bottom).",
        dense_beside_pruned,
    ),
)
