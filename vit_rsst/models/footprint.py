"""Peak memory of forward and backward passes from shapes alone: they run on `meta`, where nothing is computed.

Every storage is counted from the operation that makes it until the last reference to it is gone, as an allocator would:
what autograd saves, the copies of weights that autocast keeps, gradients as they come, and what lives for a moment.
What kernels allocate inside, such as the workspace of a matrix product, is not seen.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vit_rsst.errors import OF_A_LIBRARY
from vit_rsst.models.complexity import images, in_mode, shapes_of
from vit_rsst.training.distill import divergence

IN_BF16 = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "baddbmm", "addmm", "addbmm", "einsum",
    "conv1d", "conv2d", "conv3d", "conv_transpose2d", "scaled_dot_product_attention",
}  # fmt: skip
IN_FP32 = {
    "layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "cosine_similarity", "logsumexp", "softplus",
    "pow", "__pow__", "exp", "log", "rsqrt",
}  # fmt: skip
"""Functions that autocast on CUDA runs in one type (torch's page on torch.amp, CUDA op-specific behavior)."""


class Functions(TorchFunctionMode):
    """Functions as they run on a GPU: fused attention and, on request, autocast to bfloat16.

    torch has neither for `meta`. Copies of weights live until the context ends, as in autocast, unless it has no cache:
    what gradient checkpointing computes again in the backward pass needs each weight once.
    """

    def __init__(self, bf16: bool, has_cache: bool = True):
        super().__init__()
        self._bf16, self._has_cache = bf16, has_cache
        self._copies: dict[int, Tensor] = {}

    def __exit__(self, *error: object) -> None:
        self._copies.clear()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self._bf16 and name in IN_BF16:
            args, kwargs = tree_map_only(Tensor, self._lowered, (args, kwargs))
        elif self._bf16 and name in IN_FP32:
            args, kwargs = tree_map_only(Tensor, _raised, (args, kwargs))
        if name == "scaled_dot_product_attention" and args[0].device.type == "meta":
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _lowered(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (self._has_cache and tensor.is_leaf and tensor.requires_grad):
            return tensor.bfloat16()
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.bfloat16()
        return self._copies[id(tensor)]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The fused kernel, which saves its inputs, its output and a number per query, but no scores."""
    if query.ndim != 4 or enable_gqa or value.shape[-1] != query.shape[-1]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _raised(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


class Footprint(TorchDispatchMode):
    """Counts the bytes of what its operations make.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        """
        Args:
            known: tensors from before, which do not count.
        """
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes()).atexit = False

    def _forget(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.now -= num_bytes


class Step(nn.Module):
    """A network and what is done with it, so that blocks recomputed in the backward pass have the same weights."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, step: Callable[[], None]) -> None:
        step()


def training_bytes(
    net: nn.Module,
    image_size: int,
    batch: int,
    bf16: bool = False,
    teacher: nn.Module | None = None,
    keeps_gradients: bool = True,
    keeps_copies: bool = True,
) -> int:
    """Peak of a forward and a backward pass of one micro-batch beyond the weights.

    Args:
        bf16: under autocast.
        teacher: its forward pass comes between the two.
        keeps_gradients: False: those of the weights lie elsewhere, such as in buckets.
        keeps_copies: False: the weights come in bf16 and need no copies.
    """

    def passed(device: str, batch: int) -> int:
        shapes = _shapes(net, device, bf16 and not keeps_copies)
        theirs = {} if teacher is None else {name: shape.detach() for name, shape in shapes_of(teacher, device).items()}
        for weight in () if keeps_gradients else shapes.values():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_drop_gradient)

        def step() -> None:
            seen, labels = images(batch, image_size, device), torch.zeros(batch, dtype=torch.int64, device=device)
            with Functions(bf16):
                logits = net(seen).float()
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad(), in_mode(teacher, training=False), Functions(bf16):
                    targets = functional_call(teacher, theirs, (seen,)).float()
                loss = loss + divergence(logits, targets, 1.0)
            auxiliary_loss: Callable[[], Tensor] | None = getattr(net, "auxiliary_loss", None)
            if auxiliary_loss is not None:
                loss = loss + auxiliary_loss()
            with Functions(bf16, has_cache=False):
                _backward(loss)

        with in_mode(net, training=True), Footprint([*shapes.values(), *theirs.values()]) as footprint:
            functional_call(Step(net), {f"net.{name}": shape for name, shape in shapes.items()}, (step,))
        return footprint.peak

    return _peak(passed, batch)


def evaluation_bytes(net: nn.Module, image_size: int, batch: int, bf16: bool = False, keeps_copies: bool = True) -> int:
    """Peak of a forward pass without gradients beyond the weights; arguments as in `training_bytes`."""

    def passed(device: str, batch: int) -> int:
        shapes = _shapes(net, device, bf16 and not keeps_copies)
        footprint = Footprint(shapes.values())
        with torch.no_grad(), in_mode(net, training=False), footprint, Functions(bf16):
            functional_call(net, shapes, (images(batch, image_size, device),)).float()
        return footprint.peak

    return _peak(passed, batch)


def _peak(passed: Callable[[str, int], int], batch: int) -> int:
    """That of a pass on `meta`; if it depends on values, along the line through those of 2 and 4 black images."""
    try:
        return passed("meta", batch)
    except OF_A_LIBRARY:
        with torch.random.fork_rng(devices=[]):
            two, four = passed("cpu", 2), passed("cpu", 4)
        return two + (four - two) * (batch - 2) // 2


def _shapes(net: nn.Module, device: str, lowered: bool) -> dict[str, Tensor]:
    shapes = shapes_of(net, device)
    if not lowered:
        return shapes
    return {
        n: shape.detach().bfloat16().requires_grad_() if shape.requires_grad else shape for n, shape in shapes.items()
    }


def _backward(loss: Tensor) -> None:
    """`loss.backward()`, which itself leaves the function mode that recomputed blocks need."""
    run, ones = torch.autograd.graph._engine_run_backward, torch.ones_like(loss)
    run((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None
