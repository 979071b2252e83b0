"""rigl: sparse from the first step; dropped weights are replaced where the gradient is largest (Evci et al. 2020)."""

from dataclasses import dataclass
from typing import ClassVar

from vit_rsst.pruning.methods.set import SparseEvolutionary
from vit_rsst.pruning.plan import Growth, register_method


@register_method("rigl")
@dataclass(frozen=True)
class RigL(SparseEvolutionary):
    """Like set, but grows the dead elements whose gradient is largest in the step of the update, over all ranks."""

    reads_gradients: ClassVar[bool] = True
    growth: ClassVar[Growth] = "gradient"
