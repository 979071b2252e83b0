"""Metric counters summed over batches and ranks: a single final reduction is exact for any number of ranks."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn

from vit_rsst.shards import in_step
from vit_rsst.training import switches


class Interrupted(Exception):
    """An evaluation was aborted."""


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    give_up: Callable[[], bool] = lambda: False,
    pads: bool = False,
    filler: Tensor | None = None,
) -> dict[str, float]:
    """Top-1, top-5 (percent) and mean cross-entropy over all samples of all ranks; collective.

    Args:
        model: returns logits (batch, classes); runs in eval mode.
        batches: this rank's share of the samples.
        give_up: called before every batch; True aborts the evaluation.
        pads: pad a smaller batch, which would make a compiled model recompile.
        filler: images for ranks that have run out of batches, for a model whose weights are sharded; see `in_step`.

    Raises:
        ValueError: no rank has any samples.
        Interrupted: a rank aborted; raised on all ranks.
    """
    was_training = model.training
    model.eval()
    sums, samples, gave_up, full = torch.zeros(3, dtype=torch.float64, device=device), 0, False, 0
    for images, labels in batches if filler is None else in_step(batches, filler, give_up):
        if filler is None and (gave_up := give_up()):
            break
        size, full = len(labels), max(full, len(labels))
        if pads and size < full:
            images = torch.cat([images, images[-1:].expand(full - len(images), *images.shape[1:])])
        switches.begin_pass()
        logits = model(images)[:size].float()
        rank = ranks(logits, labels)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([(rank < 1).sum(), (rank < 5).sum(), loss]).double()
        samples += size
    model.train(was_training)
    gave_up = gave_up or (filler is not None and give_up())
    counts = torch.tensor([samples, gave_up], dtype=torch.float64, device=device)
    top1, top5, loss, samples, gave_up = reduce(torch.cat([sums, counts]), "sum").tolist()
    if gave_up:
        raise Interrupted
    if samples == 0:
        raise ValueError("the evaluation split is empty")
    return {"top1": 100 * top1 / samples, "top5": 100 * top5 / samples, "loss": loss / samples}


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Rank of the true class, (batch,): the number of classes with a larger logit, or an equal one and a lower index.

    `topk` does not define the order of ties, and ties are common in bfloat16. NaN ranks last.
    """
    true = logits.gather(1, labels[:, None])
    numbers = torch.arange(logits.shape[1], device=logits.device)
    return (~(logits <= true) | ((logits == true) & (numbers < labels[:, None]))).sum(1)


class RunningLoss:
    """Mean training loss and top-1 since the last reset; exact across ranks and resumes."""

    def __init__(self, device: torch.device):
        self._samples = 0.0
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # top-1, loss

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Counts one micro-batch: logits (batch, classes), labels (batch,) or soft (batch, classes), its mean loss.

        The label of a mixed image is the class with the largest weight.
        """
        labels = labels.argmax(1) if labels.ndim == 2 else labels
        hits = (logits.detach().argmax(1) == labels).sum()
        self._samples += len(labels)
        self._sums += torch.stack([hits, loss.detach() * len(labels)]).double()

    def gather_(self, is_main: bool) -> list[float]:
        """Sums over all ranks: samples, top-1, loss. Only the main rank keeps them, as after a resume. Collective."""
        total = self._total()
        self.load(total, is_main)
        return total

    def load(self, sums: list[float], is_main: bool) -> None:
        """Restores the sums that `gather_` returned."""
        self._samples, *sums = sums if is_main else [0.0] * 3
        self._sums = torch.tensor(sums, dtype=torch.float64, device=self._sums.device)

    def compute_and_reset(self) -> dict[str, float]:
        """`loss` and `top1` (percent). Collective."""
        samples, top1, loss = self._total()
        self.load([0.0] * 3, True)
        return {"loss": loss / max(samples, 1), "top1": 100 * top1 / max(samples, 1)}

    def _total(self) -> list[float]:
        samples = torch.tensor([self._samples], dtype=torch.float64, device=self._sums.device)
        return reduce(torch.cat([samples, self._sums]), "sum").tolist()
