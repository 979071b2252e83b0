"""The plan printed by `--dry-run`: rounds, densities, steps, penalty, memory, disk. Creates nothing."""

import math
from collections.abc import Callable

from torch import nn

from vit_rsst.assembly.build import count_text
from vit_rsst.assembly.data import Rows, count_rows
from vit_rsst.assembly.model import check_images, reshape_
from vit_rsst.assembly.needs import needs
from vit_rsst.assembly.optim import lr_scales, make_lr
from vit_rsst.assembly.pruning import build_selection, check_start, starting_density, starting_mask
from vit_rsst.data.catalog import CATALOG as SOURCES
from vit_rsst.data.loaders import Dealing, steps_per_epoch
from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.models.weights import is_path
from vit_rsst.progress import Progress, at_fraction
from vit_rsst.pruning.methods.constant import Constant
from vit_rsst.pruning.methods.dense import Dense
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.methods.rst import Rst
from vit_rsst.pruning.methods.ste import StraightThrough
from vit_rsst.pruning.plan import Density, Method
from vit_rsst.pruning.units import UnitGroup
from vit_rsst.recipe.schema import Recipe
from vit_rsst.text import aligned, size


def plan_text(recipe: Recipe, num_processes: int = 1) -> str:
    """The plan as text.

    Raises:
        InputError, MissingRequirement: whatever would stop a run of the recipe before its first step.
    """
    rows = count_rows(recipe)
    dealing = Dealing.of(recipe.train.global_batch, recipe.train.batch_per_device, num_processes)
    steps = steps_per_epoch(rows.train, recipe.train.global_batch, recipe.train.steps_per_epoch)
    progress = Progress(steps, recipe.round_epochs)
    architecture, args = zoo.describe(recipe.model.name, recipe.model.args, rows.num_classes)
    image_size = recipe.data.image_size or SOURCES[recipe.data.source].image_size
    check_images(recipe, image_size, rows.num_classes)
    local = is_path(recipe.model.pretrained)
    net = zoo.create(architecture, args, recipe.model.pretrained if local else False, device="meta")
    if recipe.train.grad_checkpointing:
        zoo.checkpoint_gradients_(net)
    lr_scales(net, recipe.optim)  # rejects a model without layers
    opened = reshape_(net, recipe, architecture, args)
    pruning = recipe.pruning
    weights, groups = prunable_parts(net, pruning.granularity, pruning.include, pruning.protect)
    selector, density = build_selection(recipe, net, weights, groups, image_size)
    start_mask = opened[1].mask if opened and recipe.model.start_from else None
    starting_mask(weights, start_mask, pruning.method)  # rejects zeros that would grow back
    start = starting_density(weights, start_mask)
    densities = [min(selector.mean_density(weights, asked), start) for asked in round_densities(recipe, density)]
    total, prunable = sum(p.numel() for p in net.parameters()), sum(w.numel() for w in weights.values())
    check_start(pruning.method, prunable, start, selector.mean_density(weights, density(1.0)))
    counts = ", ".join(f"{count_text(getattr(rows, split))} {split}" for split in ("train", "val", "test"))
    parts = [
        f"plan of {recipe.name}: {recipe.pruning.method_name}, seed {recipe.seed}; nothing is created",
        f"data       {recipe.data.source}: {counts}, "
        f"{rows.num_classes} classes ({'counted' if rows.are_counted else 'as published; dataset not reachable'})",
        f"model      {recipe.model.name} = {architecture}: {total:,} parameters, {prunable:,} prunable in "
        f"{len(weights)} weights ({prunable / total:.1%})",
        *weights_lines(recipe, net),
        f"batch      {dealing} with {num_processes} process(es); same result with any number that divides it",
        f"epoch      {steps:,} optimizer steps, {images_text(recipe, steps * recipe.train.global_batch, rows.train)}",
        f"total      {progress.total_epochs:,} epochs, {progress.total_steps:,} steps, "
        f"{progress.total_steps * recipe.train.global_batch:,} images",
        "",
        aligned(round_lines(recipe, progress, prunable, start, densities)),
        "",
        *penalty_lines(recipe, progress),
        *unit_lines(groups),
        *resource_lines(recipe, net, dealing, total, prunable, rows, densities),
        f"run folder {recipe.run_folder}",
    ]
    return "\n".join(parts)


def images_text(recipe: Recipe, taken: int, there: int | None) -> str:
    """Share of the dataset that an epoch of `taken` images covers."""
    repeats = recipe.data.augment.aug_repeats
    times = f", each repeated {repeats} times" if repeats > 1 else ""
    if recipe.data.sampler == "class_balanced":
        return f"{taken // repeats:,} images drawn with replacement{times}, classes equally often"
    if repeats > 1:
        return f"{taken // repeats:,} images{times}"
    return f"{'all' if there is None else f'{there - taken:,}'} images of the incomplete last batch dropped"


def weights_lines(recipe: Recipe, net: nn.Module) -> list[str]:
    """The initial weights; those on the Hub are not downloaded for a plan."""
    pretrained = recipe.model.pretrained
    if not pretrained:
        return []
    published = "published, from the Hub" if pretrained is True else f"tag {pretrained}, from the Hub"
    return [f"weights    {net.loaded.text() if is_path(pretrained) else published}"]


def round_lines(
    recipe: Recipe, progress: Progress, prunable: int, start: float, densities: list[float]
) -> list[tuple[str, ...]]:
    """One line per round: target density, weights kept and removed, epochs, steps, time of removal."""
    lines = [("round", "density", "kept", "removed", "epochs", "steps", "removal")]
    before = round(start * prunable)
    for number, (epochs, density) in enumerate(zip(progress.round_epochs, densities, strict=True)):
        kept, steps = round(density * prunable), epochs * progress.steps_per_epoch
        removal = removal_text(recipe.pruning.method, steps) if kept < before else "none"
        lines.append(
            (str(number), f"{density:.4f}", f"{kept:,}", f"{before - kept:,}", str(epochs), f"{steps:,}", removal)
        )
        before = kept
    return lines


def round_densities(recipe: Recipe, density: Callable[[float], Density]) -> list[Density]:
    """Target density at the end of each round."""
    method, rounds = recipe.pruning.method, recipe.pruning.schedule.num_rounds
    if isinstance(method, Dense | Constant):  # what constant starts from is read when it starts
        return [1.0]
    if method.one_round:
        return [density(1.0)]
    return [density(min(r / rounds, 1.0)) for r in range(len(recipe.round_epochs))]


def unit_lines(groups: list[UnitGroup]) -> list[str]:
    """Number of units by kind; which of them are removed, and so the exact density, depends on training."""
    kinds = dict.fromkeys(group.kind for group in groups)
    counts = [(kind, [group.units for group in groups if group.kind == kind]) for kind in kinds]
    return [
        f"units      {sum(units):,} {kind}s in {len(units)} groups of {min(units)}"
        + (f"–{max(units)}" if max(units) > min(units) else "")
        for kind, units in counts
    ]


def removal_text(method: Method, steps: int) -> str:
    """When the weights of a round are removed."""
    if isinstance(method, Gmp | StraightThrough):
        return f"every {method.interval} steps in {list(method.window)} of the run"
    if isinstance(method, Rsst | Rst) and method.remove_at > 0:
        return f"after step {max(at_fraction(method.remove_at, steps), 1):,}"
    return "before the first step"


def penalty_lines(recipe: Recipe, progress: Progress) -> list[str]:
    """Predicted size of the condemned at the end of the penalty window."""
    method = recipe.pruning.method
    if not isinstance(method, Rsst | Rst) or method.remove_at == 0:
        return []
    penalty, epochs = method.penalty, progress.round_epochs[1]
    steps = epochs * progress.steps_per_epoch
    window = penalty.steps(steps)
    if not window:
        return ["penalty    none: the window is empty"]
    shape = f"{penalty.ramp} ramp over steps {window.start:,}–{window.stop:,} of a round, once per {penalty.span}"
    if penalty.coupling == "decoupled":
        total = math.fsum(penalty.shrink_at(t, steps, progress.steps_per_epoch) for t in window)
        return [
            f"penalty    {shape}; decoupled: shrinks the condemned to {math.exp(-total):.2e} of their size at any lr"
        ]
    lr = make_lr(recipe)
    momentum = recipe.optim.momentum
    total = math.fsum(
        lr(Progress(progress.steps_per_epoch, progress.round_epochs, 1, *divmod(t, progress.steps_per_epoch)))
        * penalty.strength
        * penalty.ramp_at(t, steps, progress.steps_per_epoch)
        / (1 - momentum)
        for t in window
    )
    return [f"penalty    {shape}; gradient: leaves about {math.exp(-total):.2e} of the condemned (Σ lr·λ/(1−μ))"]


def resource_lines(
    recipe: Recipe,
    net: nn.Module,
    dealing: Dealing,
    total: int,
    prunable: int,
    rows: Rows,
    densities: list[float],
) -> list[str]:
    """Memory per process, and disk space of the run."""
    image_size = recipe.data.image_size or SOURCES[recipe.data.source].image_size
    counts = (rows.train, rows.val, rows.test)
    images = "decoded on the fly"
    if recipe.data.in_memory is not False and not recipe.data.redrawn and None not in counts:
        images = f"{size(sum(counts) * 3 * image_size**2)} if kept decoded"
    found = needs(recipe, net, prunable, image_size, dealing.batch_per_device)
    memory = ", ".join(
        f"{name} {'about ' if name == 'activations' else ''}{size(num_bytes)}"
        for name, num_bytes in found.device.items()
        if num_bytes
    )
    again = ", plus one block" if recipe.train.grad_checkpointing else ""
    best = f"; best epoch, on the host, {size(found.best)}" if found.best else ""
    ticket_bytes = sum(prunable * 4 * (d + 1 / 32) + (total - prunable) * 4 for d in densities)
    return [
        f"memory     per process: {memory} at {dealing.batch_per_device} images{again}{best}; images {images}",
        f"disk       {len(densities)} tickets {size(ticket_bytes)}; {recipe.train.keep_resume_points} resume points of "
        f"{size(found.resume_point)}, plus one while writing",
    ]
