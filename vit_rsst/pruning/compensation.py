"""Compensation: the weights that stay in a layer make up for those that leave, by least squares on calibration inputs.

Layers are fitted in the order of the forward pass: the inputs X are those of the model whose earlier layers are already
pruned, the target is what the dense weight makes of them (Frantar & Alistarh 2023, arXiv:2301.00774). With the Gram
matrix G = Xᵀ X and a damping λ, the row w' of a weight minimizes ‖X w' − X w‖² + λ ‖w' − w‖² and is zero outside of the
mask, which is the exact form of the update of Optimal Brain Compression (Frantar et al. 2022, arXiv:2208.11580). A bias
takes over the mean of what leaves: X is then centred, and b' = b + (w − w') · mean of the inputs.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, reduce
from torch import Tensor, nn

from vit_rsst.errors import InputError
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.products import Products

DAMPING = 0.01
"""λ relative to the mean of the Gram matrix' diagonal, as in SparseGPT."""
TOLERANCE, MAX_ITERATIONS = 1e-7, 500
"""Of conjugate gradients: residual of each row relative to its right-hand side. Rows still above it get a Cholesky.
They are for GPUs."""
BLOCK = 256
"""Columns of the Gram matrix that are computed together."""
PASSES_DIFFER = "pruning.compensate: the order in which layers are applied differs from batch to batch; use none."


@dataclass(frozen=True)
class Fit:
    """How well a layer was fitted; errors are ‖X w' + b' − X w − b‖² / ‖X w‖² over its outputs.

    Attributes:
        error_masked, error: with the weights that leave set to zero, and after the fit.
        tokens: rows of X, over all ranks.
        columns, dead_columns: of X, and those that are the same for all tokens, or without a bias zero.
    """

    error_masked: float
    error: float
    tokens: int
    columns: int
    dead_columns: int

    @property
    def is_singular(self) -> bool:
        """Whether the damping alone determines the answer: fewer tokens than columns, or constant columns."""
        return self.tokens < self.columns or self.dead_columns > 0


@dataclass(frozen=True)
class Compensation:
    """What was fitted.

    Attributes:
        fits: by weight.
        left: weights that lost elements and were masked only: grouped or one-dimensional convolutions, and weights that
            the forward pass applies several times, or not as they are.
    """

    fits: Mapping[str, Fit]
    left: tuple[str, ...]

    def __str__(self) -> str:
        singular = [name for name, fit in self.fits.items() if fit.is_singular]
        lines = [f"{len(self.fits)} weights fitted by least squares"]
        if singular:
            lines += [f"damping alone determines a part of {_listed(singular)}: too few tokens, or constant inputs"]
        if self.left:
            lines += [f"masked without a fit: {_listed(self.left)}"]
        return "; ".join(lines)


@torch.no_grad()
def least_squares(weight: Tensor, keep: Tensor, gram: Tensor, damping: float = DAMPING) -> Tensor:
    """The weight closest to `weight` in what it computes among those that are zero outside of `keep`.

    Args:
        weight: (out, in).
        keep: bool, (out, in).
        gram: Xᵀ X, (in, in), in the precision to compute in; may be singular.
        damping: > 0, relative to the mean of its diagonal.
    """
    dense = weight.to(gram.dtype)
    mean = gram.diagonal().mean()
    if not mean > 0:  # the layer sees zeros
        return weight * keep
    scale = (gram.diagonal() + damping * mean).sqrt()
    ridge = (damping * mean / scale.square()).diag()
    hessian = gram / scale / scale[:, None] + ridge  # of unit diagonal: Jacobi's preconditioner
    way = _change_of_all if _is_shared(keep) else _change_by_row if hessian.device.type == "cpu" else _change
    change = way(dense * scale, keep, hessian)
    return torch.where(keep, dense + change / scale, 0.0).to(weight.dtype)


def _is_shared(keep: Tensor) -> bool:
    """Whether all rows that keep anything keep the same columns."""
    rows = keep[keep.any(1)]
    return len(rows) == 0 or bool((rows == rows[0]).all())


def _change_of_all(dense: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """Change of the weights that stay, which are the same columns of all rows: H_SS Δ = H_SD w_D, by one Cholesky."""
    stays, found = keep.any(0), torch.zeros_like(dense)
    factor = torch.linalg.cholesky(hessian[stays][:, stays])
    right = dense[:, ~stays] @ hessian[~stays][:, stays]
    found[:, stays] = torch.cholesky_solve(right.T, factor).T
    return found


def _change_by_row(dense: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """The same for a support of each row's own, by a Cholesky each; on a CPU much faster than what a GPU does."""
    found, right = torch.zeros_like(dense), (dense * ~keep) @ hessian
    for row, stays in enumerate(keep):
        index = stays.nonzero().flatten()
        factor = torch.linalg.cholesky(hessian.index_select(0, index).index_select(1, index))
        found[row, index] = torch.cholesky_solve(right[row, index, None], factor)[:, 0]
    return found


def _change(dense: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """The same by conjugate gradients on all rows at once."""
    found = torch.zeros_like(dense)
    residual = ((dense * ~keep) @ hessian) * keep
    direction, square = residual.clone(), residual.square().sum(1, keepdim=True)
    enough = TOLERANCE**2 * square
    for _ in range(MAX_ITERATIONS):
        open_rows = square > enough
        if not open_rows.any():
            break
        image = (direction @ hessian) * keep
        step = torch.where(open_rows, square / (direction * image).sum(1, keepdim=True), 0.0)
        found += step * direction
        residual -= step * image
        before, square = square, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(open_rows, square / before, 0.0) * direction
    for row in (square > enough).flatten().nonzero().flatten().tolist():
        found[row : row + 1] = _change_of_all(dense[row : row + 1], keep[row : row + 1], hessian)
    return found


@torch.no_grad()
def compensate_(
    net: nn.Module,
    weights: Mapping[str, nn.Parameter],
    mask: MaskSet,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    of_units: bool = False,
    forward: Callable[[Any], Tensor] | None = None,
) -> Compensation:
    """Sets the dead to zero and fits what stays, in place. Collective.

    All batches go through the network once, side by side: each waits before a layer until that layer is fitted. Memory
    is therefore that of the activations of all calibration images at one layer, and of one Gram matrix.

    Args:
        net: unwrapped, in evaluation mode, with dense weights that are the same on all ranks.
        weights: the prunable parameters by name.
        mask: the elements that stay.
        batches: calibration inputs and labels of this rank; labels are not used.
        of_units: whether `mask` removes units. Their rows then stay until their consumer is fitted: it makes up for
            what they compute.
        forward: inputs → logits; None: the network itself.

    Raises:
        InputError: there are no calibration images, or the passes differ from batch to batch.
    """
    passes = [_Pass(forward or net, inputs, weights) for inputs, _ in batches]
    names = _order(passes)
    losing = [name for name in weights if not bool(mask[name].all())]
    fitted = [name for name in losing if names.count(name) == 1 and is_supported(net, name)]
    kept = {name: mask[name] | ~_any_of_row(mask[name]) if of_units else mask[name] for name in losing}
    biases = {name: bias for name in fitted if (bias := bias_of(net, name)) is not None}
    dense = [(tensor, tensor.clone()) for tensor in (*(weights[name] for name in losing), *biases.values())]
    fits: dict[str, Fit] = {}
    try:
        for name in losing:
            if name not in fitted:
                weights[name].masked_fill_(~kept[name], 0.0)
        with torch.compiler.set_stance("force_eager"):  # compiled code would hide the matrix products
            for name in names:
                inputs = [one.input_of(name) for one in passes]
                if name in fitted:
                    fits[name] = _fit_(net, name, weights[name], biases.get(name), mask[name], kept[name], inputs)
    except BaseException:
        for tensor, before in dense:
            tensor.copy_(before)
        raise
    finally:
        for one in passes:
            one.stop()
    for name in losing:
        weights[name].masked_fill_(~mask[name], 0.0)  # +0, not −0 nor NaN · 0
    return Compensation(fits, tuple(name for name in losing if name not in fits))


def _fit_(
    net: nn.Module, name: str, weight: Tensor, bias: Tensor | None, mask: Tensor, kept: Tensor, inputs: Sequence[Tensor]
) -> Fit:
    """Fits a weight to the inputs of all ranks, except for its rows that are dead in `mask` and alive in `kept`."""
    layer, matrix, keep = net.get_submodule(name.rpartition(".")[0]), weight.flatten(1).float(), mask.flatten(1)
    held = (kept.flatten(1) & ~keep).any(1)
    total = weight.new_zeros(matrix.shape[1] + 1, dtype=torch.float64)  # of the columns, and the number of tokens
    for x in inputs:
        rows = rows_of(layer, x)
        total += torch.cat([rows.sum(0, dtype=torch.float64), total.new_tensor([len(rows)])])
    if PartialState().num_processes > 1:
        total = reduce(total, "sum")
    tokens = int(total[-1])
    mean = (total[:-1] / tokens).float() if bias is not None else torch.zeros_like(matrix[0])
    gram = weight.new_zeros(len(mean), len(mean), dtype=torch.float32)
    for x in inputs:
        _add_gram_(gram, rows_of(layer, x).float() - mean)
    gram = gram.triu() + gram.triu(1).T
    if PartialState().num_processes > 1:
        gram = reduce(gram, "sum")
    if not gram.isfinite().all():
        raise InputError(f"pruning.compensate: inputs of {name} are not finite on the calibration images; use none.")
    found = least_squares(matrix, keep, gram)
    if PartialState().num_processes > 1:
        found = broadcast(found)  # ranks on other hardware may differ in the last bits
    alive = keep.any(1) if bias is None else ~held

    def size(change: Tensor, shift: Tensor | float = 0.0) -> float:
        change, shift = change[alive], (shift + change @ mean)[alive]
        return float((change @ gram * change).sum() + tokens * shift.square().sum())

    whole, dead = max(size(matrix), 1e-30), int((gram.diagonal() == 0).sum())
    shift = (matrix - found) @ mean
    fit = Fit(size(matrix * ~keep) / whole, size(found - matrix, shift) / whole, tokens, len(gram), dead)
    weight.copy_(torch.where(held[:, None] & ~keep, matrix, found).view_as(weight))
    if bias is not None:
        bias.add_(torch.where(held, 0.0, shift))
    return fit


def _add_gram_(gram: Tensor, rows: Tensor) -> None:
    """Adds rowsᵀ rows, of which the blocks on and above the diagonal suffice."""
    for start in range(0, len(gram), BLOCK):
        gram[start : start + BLOCK, start:].addmm_(rows[:, start : start + BLOCK].T, rows[:, start:])


def bias_of(net: nn.Module, name: str) -> nn.Parameter | None:
    """The bias that is added to what a weight computes, if it is of this layer alone and trains like the weight."""
    layer = net.get_submodule(name.rpartition(".")[0])
    if layer.bias is None or (layer.weight.requires_grad and not layer.bias.requires_grad):
        return None
    users = [one for one, bias in net.named_parameters(remove_duplicate=False) if bias is layer.bias]
    return layer.bias if len(users) == 1 else None


def _any_of_row(mask: Tensor) -> Tensor:
    """Whether anything of an output row is alive, in a shape that broadcasts to that of the mask."""
    return mask.flatten(1).any(1).view(-1, *[1] * (mask.dim() - 1))


def is_supported(net: nn.Module, name: str) -> bool:
    """Whether `rows_of` knows what the layer multiplies by its weight."""
    layer = net.get_submodule(name.rpartition(".")[0])
    is_conv = isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward
    return isinstance(layer, nn.Linear) or (is_conv and layer.groups == 1 and not isinstance(layer.padding, str))


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer as rows that its weight is multiplied by: (tokens, in), or of a convolution its patches."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    padding = layer.padding if layer.padding_mode == "zeros" else 0  # others have padded the input already
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # (images, in, patches)
    return patches.transpose(1, 2).flatten(0, 1)


def _order(passes: Sequence["_Pass"]) -> list[str]:
    """Weights in the order in which rank 0's first batch meets them, once for each product. Collective.

    Raises:
        InputError: there are no calibration images.
    """
    told = [passes[0].met() if passes else None]
    names = broadcast_object_list(told)[0]
    if names is None:
        raise InputError("pruning.calibration_images: compensation needs calibration images, but there are none.")
    return names


class _Stopped(BaseException):
    """Ends a forward pass that nobody waits for."""


class _Pass(Products):
    """The forward pass of one batch, in a thread of its own that runs only while its caller waits for it."""

    def __init__(self, forward: Callable[[Any], Tensor], inputs: Any, weights: Mapping[str, Tensor]):
        super().__init__()
        self._forward, self._inputs = forward, inputs
        self._names = {id(weight): name for name, weight in weights.items()}
        self._device = next(iter(weights.values())).device
        self._go: SimpleQueue[bool] = SimpleQueue()
        self._reached: SimpleQueue[tuple[str, Tensor] | BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def met(self) -> list[str]:
        """Names of the weights in the order of the pass, which one input shows."""
        names, met = self._names, []
        batch = self._inputs if isinstance(self._inputs, Mapping) else {"": self._inputs}
        first = {key: value[:1] if isinstance(value, Tensor) else value for key, value in batch.items()}

        class Order(Products):
            def note(self, weight: Tensor, x: Tensor, name: str) -> None:
                if id(weight) in names:
                    met.append(names[id(weight)])

        with torch.compiler.set_stance("force_eager"), Order():
            self._forward(first if isinstance(self._inputs, Mapping) else first[""])
        return met

    def input_of(self, name: str) -> Tensor:
        """Continues until the next watched weight, which has to be this one; returns what it will be multiplied by."""
        if self._thread.ident is None:
            self._thread.start()
        self._go.put(True)
        reached = self._reached.get()
        if isinstance(reached, BaseException):
            raise reached
        if reached is None or reached[0] != name:
            raise InputError(PASSES_DIFFER)
        return reached[1]

    def stop(self) -> None:
        """Ends the thread."""
        if self._thread.is_alive():
            self._go.put(False)
            self._thread.join()

    def note(self, weight: Tensor, x: Tensor, name: str) -> None:
        if id(weight) in self._names:
            self._reached.put((self._names[id(weight)], x))
            self._wait()

    def _wait(self) -> None:
        if not self._go.get():
            raise _Stopped

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # like gradient mode, a state of each thread
        try:
            self._wait()
            with torch.no_grad(), self:
                self._forward(self._inputs)
            self._reached.put(None)
        except _Stopped:
            pass
        except BaseException as error:  # raised again in the caller's thread
            self._reached.put(error)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
