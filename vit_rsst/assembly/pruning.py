"""The pruning section of a recipe: selection, target density, initial mask."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from vit_rsst.errors import InputError
from vit_rsst.models.complexity import flops as model_flops
from vit_rsst.models.complexity import unit_costs
from vit_rsst.progress import Progress
from vit_rsst.pruning.allocation import Allocation
from vit_rsst.pruning.criteria import CRITERIA
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.plan import Density, Method, changes_within_rounds
from vit_rsst.pruning.selector import Floors, Selector
from vit_rsst.pruning.units import UnitGroup
from vit_rsst.recipe.schema import Pruning


def starting_mask(weights: dict[str, nn.Parameter], found: MaskSet | None, method: Method) -> MaskSet:
    """All weights alive, except for the zeros of the ticket that the run starts from.

    Raises:
        InputError: the ticket has zeros in a weight that this recipe does not prune, which would grow back; or the
            method keeps the zeros of a ticket that has none.
    """
    mask = MaskSet.full(weights)
    if found is None:
        return mask
    if method.keeps_start and found.is_full:
        raise InputError("model.start_from: it has no zeros to keep; start from a sparse ticket.")
    freed = [name for name in found if name not in weights and not found[name].all()]
    if freed:
        raise InputError(
            f"pruning.protect: model.start_from has zeros in {freed[0]} and {len(freed) - 1} more weights that this "
            "recipe does not prune, so they would grow back; prune the same weights as the run it comes from."
        )
    # A weight that was not prunable there is alive here.
    return MaskSet({n: found[n].to(w.device) if n in found.masks else mask[n] for n, w in weights.items()})


def starting_density(weights: dict[str, nn.Parameter], found: MaskSet | None) -> float:
    """Density of the prunable weights at the start; works on `meta` too."""
    if found is None:
        return 1.0
    alive = sum(int(found[n].sum()) if n in found.masks else w.numel() for n, w in weights.items())
    return alive / sum(w.numel() for w in weights.values())


def check_start(method: Method, prunable: int, start: float, final: float) -> None:
    """Rejects a starting ticket that is already as sparse as the schedule ever gets.

    Raises:
        InputError: no round would remove anything.
    """
    if method.prunes and round(start * prunable) <= round(final * prunable) < prunable:
        raise InputError(
            f"model.start_from: its density is already {start:.4f} and the schedule ends at {final:.4f}, so no round "
            "would remove anything; raise pruning.schedule.final_sparsity, or fine-tune it with "
            "pruning.method=constant."
        )


def check_gradual(method: Method, progress: Progress) -> None:
    """Rejects a method that changes its mask within rounds, but at no step of this run.

    Raises:
        InputError: the interval is longer than the window, or the window is past the last step.
    """
    gradual = method.gradual if changes_within_rounds(method) else None
    steps = [epochs * progress.steps_per_epoch for epochs in progress.round_epochs]
    if gradual is not None and not any(map(gradual.due, steps)):
        raise InputError(
            f"pruning.method.interval: no step of the window {list(gradual.window)} of a run of {max(steps)} steps is "
            f"due with an interval of {gradual.interval}, so the mask would never change; lower the interval, or train "
            "longer."
        )


def build_selection(
    pruning: Pruning, net: nn.Module, weights: dict[str, nn.Parameter], groups: list[UnitGroup], image_size: int
) -> tuple[Selector, Callable[[float], Density]]:
    """The selector, and the target density as a function of the fraction of the schedule.

    Raises:
        InputError: the schedule cannot be met, or a glob matches no layer.
    """
    schedule, costs = pruning.schedule, {}
    if schedule.budget is not None:
        costs, final = spend(schedule.budget, net, groups, image_size)
        schedule = replace(schedule, budget=None, final_sparsity=final)
    allocation = Allocation(
        pruning.scope or "global",
        pruning.depth_ramp,
        pruning.layer_sparsity,
        schedule.density(1.0),
        never_above=bool(costs),
    )
    floors = Floors(pruning.min_neurons, pruning.max_layer_sparsity)
    criterion = CRITERIA[pruning.criterion]
    selector = Selector(criterion, pruning.granularity, groups, allocation, floors, costs)
    if pruning.method.prunes:
        selector.check(weights)
    return selector, schedule.density


def spend(
    budget: Mapping[str, float], net: nn.Module, groups: list[UnitGroup], image_size: int
) -> tuple[dict[str, float], float]:
    """Cost of a unit of each group, and the share of their total cost to remove to meet the budget.

    Raises:
        InputError: the parts that cannot be pruned exceed the budget.
    """
    [(what, share)] = budget.items()
    flops, params = unit_costs(net, groups, image_size)
    costs = flops if what == "flops" else params
    learnt = [p for p in net.parameters() if p.requires_grad]
    total = model_flops(net, image_size) if what == "flops" else sum(p.numel() for p in learnt)
    prunable = sum(costs[group.name] * group.units for group in groups)
    final = (1.0 - share) * total / prunable
    if final >= 1.0:
        raise InputError(
            f"pruning.schedule.budget.{what}: {share} of the model cannot be reached, since its parts that are not "
            f"prunable take {1 - prunable / total:.3f}; set a larger budget, or prune more kinds of units."
        )
    return costs, final
