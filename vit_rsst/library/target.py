"""What is pruned of a user's model: its weights, units and selector, from a checked section `pruning`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate import PartialState
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from vit_rsst.assembly.pruning import build_selection
from vit_rsst.errors import InputError
from vit_rsst.library.batches import Batches, forward_of, pairs
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.models.complexity import evaluating, size_of
from vit_rsst.models.observation import check_units
from vit_rsst.pruning.calibration import collect
from vit_rsst.pruning.compensation import compensate_
from vit_rsst.pruning.controller import Calibrate, Compensate
from vit_rsst.pruning.criteria import OF_IMAGES, Statistics
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.plan import Density, Method
from vit_rsst.pruning.selector import Selector
from vit_rsst.pruning.units import UnitGroup
from vit_rsst.recipe.schema import Pruning

CALIBRATION = {"pruning.calibration_images": "calibration"}
"""Recipe field → keyword of a call."""


@dataclass(frozen=True)
class Target:
    """The parts of a model that pruning works on.

    Attributes:
        net: the model without the wrappers of DDP and torch.compile.
        weights: the prunable parameters by name.
        groups: unit groups of a structured granularity.
        selector: chooses what stays.
        density: fraction of the schedule → target density.
    """

    net: nn.Module
    weights: dict[str, nn.Parameter]
    groups: list[UnitGroup]
    selector: Selector
    density: Callable[[float], Density]

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    @classmethod
    def of(cls, model: nn.Module, pruning: Pruning, calibration: Batches | None) -> "Target":
        """
        Raises:
            InputError: nothing to prune, a sparsity that cannot be met, or calibration images that are missing or not
                needed.
        """
        net = unwrapped(model)
        check_processes(next(net.parameters(), torch.empty(0)).device)
        weights, groups = prunable_parts(net, pruning.granularity, pruning.include, pruning.protect)
        names = {id(weight): name for name, weight in weights.items()}
        if shared := next((name for name, weight in weights.items() if names[id(weight)] != name), None):
            raise InputError(
                f"pruning.protect: {shared} and {names[id(weights[shared])]} are one weight; protect one of the names."
            )
        image_size = size_of(net)
        if pruning.method.prunes:
            check_units(net, groups, image_size)
        selector, density = build_selection(pruning, net, weights, groups, image_size)
        needs_images = pruning.method.prunes and selector.criterion.needs in OF_IMAGES
        if needs_images and calibration is None:
            raise InputError(
                f"pruning.calibration: missing; {pruning.criterion} needs {selector.criterion.needs}: pass a loader of "
                "(inputs, labels), or use the criterion magnitude."
            )
        compensates = pruning.compensate is not None
        if compensates and calibration is None:
            raise InputError(
                "pruning.calibration: missing; least_squares needs inputs of layers: pass a loader of (inputs, labels)."
            )
        if calibration is not None and not needs_images and not compensates:
            raise InputError(f"pruning.calibration: has no effect with {pruning.criterion}; omit it.")
        return cls(net, weights, groups, selector, density)

    def starting_mask(self, method: Method) -> MaskSet:
        """All weights alive, or for a method that keeps the zeros of a model, those that are not zero.

        Raises:
            InputError: there are none to keep.
        """
        if not method.keeps_start:
            return MaskSet.full(self.weights)
        mask = MaskSet({name: weight.detach() != 0 for name, weight in self.weights.items()})
        if mask.is_full:
            raise InputError("model.name: it has no zeros to keep; prune it first, or load a ticket into it.")
        return mask

    def with_images(self, calibration: Batches | None, compensates: bool) -> tuple[Calibrate | None, Compensate | None]:
        """What the controller does with calibration images, whenever it has to; tried on the first batch now.

        Raises:
            InputError: batches of another form, or weights whose inputs cannot be recorded.
        """
        if calibration is None:
            return None, None
        if isinstance(calibration, Iterator):
            raise InputError(
                "pruning.calibration: an iterator serves one round; pass the loader, or a callable that returns one."
            )
        needs, forward = self.selector.criterion.needs, forward_of(self.net)

        def calibrate(limit: int | None = None) -> Statistics:
            batches = islice(pairs(calibration, self.device), limit)
            with evaluating(self.net):
                return collect(self.net, batches, self.weights, self.groups, needs, forward)

        def compensate(mask: MaskSet) -> None:
            batches = pairs(calibration, self.device)
            with evaluating(self.net):
                compensate_(self.net, self.weights, mask, batches, of_units=bool(self.groups), forward=forward)

        if needs in OF_IMAGES:
            calibrate(limit=1)
        else:
            with evaluating(self.net), torch.no_grad():
                for inputs, _ in islice(pairs(calibration, self.device), 1):
                    forward(inputs)
        return calibrate if needs in OF_IMAGES else None, compensate if compensates else None


def check_processes(device: torch.device) -> None:
    """Lets Accelerate, through which masks are agreed on, know about processes that the caller started.

    Raises:
        InputError: it has been set up for another number of processes.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    known = PartialState(cpu=world > 1 and device.type == "cpu").num_processes  # made once; later arguments are ignored
    if known != world:
        raise InputError(
            f"model.name: torch.distributed runs {world} processes, and Accelerate was set up for {known}; initialize "
            "torch.distributed before anything of Accelerate or this package is used."
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of DDP and torch.compile.

    Raises:
        InputError: not a model, or its weights are sharded.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model.name: a {type(model).__name__}; expected a torch.nn.Module.")
    net = model
    while isinstance(net, DistributedDataParallel | DataParallel) or hasattr(net, "_orig_mod"):
        net = net._orig_mod if hasattr(net, "_orig_mod") else net.module
    if any(isinstance(parameter, DTensor) for parameter in net.parameters()):
        raise InputError("model.name: its weights are sharded (FSDP or tensor parallelism); only DDP is supported.")
    return net
