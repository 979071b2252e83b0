"""What a fit by least squares takes, computed from shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vit_rsst.models.complexity import flops_by_module, own_flops
from vit_rsst.pruning.compensation import BLOCK
from vit_rsst.text import size


@dataclass(frozen=True)
class FitNeeds:
    """What a fit by least squares takes of a process beside the model.

    Attributes:
        inputs: bytes of the calibration images, as the model takes them.
        activations: bytes of their activations at the layer where that is most.
        matrix: bytes of the largest Gram matrix.
        operations: of all Gram matrices.
    """

    inputs: int
    activations: int
    matrix: int
    operations: int

    def text(self) -> str:
        held = size(self.inputs + self.activations)
        return f"about {held} at a layer and matrices of {size(self.matrix)}; {self.operations / 1e12:.2f} TFLOPs"


def fit_needs(
    net: nn.Module, weights: Mapping[str, Tensor], image_size: int, images: int, num_processes: int = 1
) -> FitNeeds:
    """Of a fit of all `weights` to `images`, which are divided among processes; works on `meta` too."""
    counted, own = own_flops(flops_by_module(net, image_size)), -(-images // num_processes)
    columns = {name: weight[0].numel() for name, weight in weights.items()}
    tokens = {n: counted.get(n.removesuffix(".weight"), 0) // (2 * w.numel()) for n, w in weights.items()}
    return FitNeeds(
        inputs=4 * own * 3 * image_size**2,
        activations=4 * own * max(tokens[name] * columns[name] for name in columns),
        matrix=4 * max(columns.values()) ** 2,
        operations=images * sum(tokens[name] * n * (n + min(n, BLOCK)) for name, n in columns.items()),
    )
