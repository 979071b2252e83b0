"""The plan printed by `--dry-run`: rounds, densities, steps, penalty, memory, disk. Creates nothing."""

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn

from vit_rsst.assembly import sharding
from vit_rsst.assembly.data import count_rows
from vit_rsst.assembly.fitting import fit_needs
from vit_rsst.assembly.needs import needs
from vit_rsst.assembly.optim import make_lr
from vit_rsst.assembly.parts import Parts, Sizes, prepare
from vit_rsst.data.dealing import Dealing
from vit_rsst.data.streams import READER_BYTES, Stream
from vit_rsst.models import zoo
from vit_rsst.models.weights import is_path
from vit_rsst.progress import Progress
from vit_rsst.pruning.preview import RoundPreview
from vit_rsst.pruning.units import UnitGroup
from vit_rsst.recipe.schema import Recipe
from vit_rsst.text import aligned, size


def plan_text(recipe: Recipe, num_processes: int = 1) -> str:
    """The plan as text.

    Raises:
        InputError, MissingRequirement: whatever would stop a run of the recipe before its first step.
    """
    rows = count_rows(recipe)
    sizes = Sizes.of(recipe, rows, num_processes)
    parts, progress = prepare(recipe, sizes, torch.device("meta")), sizes.progress
    rounds, steps, total = parts.preview(progress), progress.steps_per_epoch, parts.num_parameters
    notes, shards = parts.notes, num_processes if sharding.is_asked() else 1
    if shards > 1:
        sharding.check(recipe, parts.net)
        notes.append(sharding.Units.of(parts.net).text(shards))
    architecture, _ = zoo.describe(recipe.model.name, recipe.model.args, rows.num_classes)
    lines = [
        f"plan of {recipe.name}: {recipe.pruning.method_name}, seed {recipe.seed}; nothing is created",
        f"data       {recipe.data.source}: {rows.text()}, "
        f"{rows.num_classes} classes ({'counted' if rows.are_counted else 'as published; dataset not reachable'})",
        *(f"           {line}" for line in rows.told),
        f"model      {recipe.model.name} = {architecture}: {total:,} parameters, {parts.num_prunable:,} prunable in "
        f"{len(parts.weights)} weights ({parts.num_prunable / total:.1%})",
        *weights_lines(recipe, parts.net),
        *(f"           {line}" for line in notes),
        f"batch      {sizes.dealing} with {num_processes} process(es); {dealing_text(parts.net)}",
        f"epoch      {steps:,} optimizer steps, {images_text(recipe, steps * recipe.train.global_batch, rows.train)}",
        *stream_lines(recipe, sizes.dealing, rows.stream),
        f"total      {progress.total_epochs:,} epochs, {progress.total_steps:,} steps, "
        f"{progress.total_steps * recipe.train.global_batch:,} images",
        "",
        aligned(round_lines(parts, progress, rounds)),
        "",
        *penalty_lines(recipe, progress, rounds),
        *compensation_lines(parts, progress, num_processes),
        *unit_lines(parts.groups),
        *resource_lines(parts, sizes, rounds, shards),
        f"run folder {recipe.run_folder}",
    ]
    return "\n".join(lines)


def dealing_text(net: nn.Module) -> str:
    """Whether the result depends on how the global batch is divided: dropout and drop path are drawn per process."""
    drops = {type(m).__name__ for m in net.modules() if getattr(m, "p", 0.0) or getattr(m, "drop_prob", 0.0)}
    drops = sorted(name for name in drops if "Drop" in name)
    if not drops:
        return "same result with any number that divides it"
    return f"same images with any number that divides it; {' and '.join(drops)} draw per process"


def images_text(recipe: Recipe, taken: int, there: int | None) -> str:
    """Share of the dataset that an epoch of `taken` images covers."""
    repeats = recipe.data.augment.aug_repeats
    times = f", each repeated {repeats} times" if repeats > 1 else ""
    if recipe.data.sampler == "class_balanced":
        return f"{taken // repeats:,} images drawn with replacement{times}, classes equally often"
    if repeats > 1:
        return f"{taken // repeats:,} images{times}"
    return f"{'all' if there is None else f'{there - taken:,}'} images of the incomplete last batch dropped"


def stream_lines(recipe: Recipe, dealing: Dealing, stream: Stream | None) -> list[str]:
    """How a stream is dealt to processes, and the host memory that takes."""
    if stream is None:
        return []
    lanes = stream.cut(dealing.global_batch, recipe.data.lanes)
    own, row_bytes = dealing.lanes_of(0, lanes.lanes), stream.num_bytes / max(stream.count, 1)
    windows = len(own) * lanes.tracks * lanes.largest_window * row_bytes
    lines = [
        f"stream     {lanes.lanes} lanes of {lanes.tracks} tracks over {int((lanes.counts > 0).sum()):,} blocks; a "
        f"process reads {len(own)} lanes and holds at most {size(windows)} of encoded images, plus "
        f"{size(READER_BYTES + 2 * stream.largest_block)} per worker"
    ]
    parts = dealing.num_processes * dealing.accumulation
    if lanes.lanes % parts:
        fitting = [d for d in range(parts, dealing.global_batch + 1, parts) if dealing.global_batch % d == 0]
        lines.append(
            f"           {parts} micro-batches per step do not divide the lanes, so several processes read the same "
            f"ones; data.lanes={fitting[0]} avoids it"
        )
    return lines


def weights_lines(recipe: Recipe, net: nn.Module) -> list[str]:
    """The initial weights; those on the Hub are not downloaded for a plan."""
    pretrained = recipe.model.pretrained
    if not pretrained:
        return []
    published = "published, from the Hub" if pretrained is True else f"tag {pretrained}, from the Hub"
    return [f"weights    {net.loaded.text() if is_path(pretrained) else published}"]


def round_lines(parts: Parts, progress: Progress, rounds: Sequence[RoundPreview]) -> list[tuple[str, ...]]:
    """One line per round: target density, weights kept and removed, epochs, steps, time of removal."""
    lines = [("round", "density", "kept", "removed", "epochs", "steps", "removal")]
    before = round(parts.start_density * parts.num_prunable)
    for number, (epochs, one) in enumerate(zip(progress.round_epochs, rounds, strict=True)):
        density = min(one.density, parts.start_density)
        kept, steps = round(density * parts.num_prunable), epochs * progress.steps_per_epoch
        removal = one.removal() if kept < before else "none"
        cells = (f"{density:.4f}", f"{kept:,}", f"{before - kept:,}", str(epochs), f"{steps:,}", removal)
        lines.append((str(number), *cells))
        before = kept
    return lines


def unit_lines(groups: list[UnitGroup]) -> list[str]:
    """Number of units by kind; which of them are removed, and so the exact density, depends on training."""
    kinds = dict.fromkeys(group.kind for group in groups)
    counts = [(kind, [group.units for group in groups if group.kind == kind]) for kind in kinds]
    return [
        f"units      {sum(units):,} {kind}s in {len(units)} groups of {min(units)}"
        + (f"–{max(units)}" if max(units) > min(units) else "")
        for kind, units in counts
    ]


def penalty_lines(recipe: Recipe, progress: Progress, rounds: Sequence[RoundPreview]) -> list[str]:
    """Predicted size of the condemned at the end of the penalty window, in the first round that has one."""
    number = next((i for i, one in enumerate(rounds) if one.penalty is not None), None)
    if number is None:
        return []
    penalty, steps = rounds[number].penalty, rounds[number].round_steps
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
        lr(Progress(progress.steps_per_epoch, progress.round_epochs, number, *divmod(t, progress.steps_per_epoch)))
        * penalty.strength
        * penalty.ramp_at(t, steps, progress.steps_per_epoch)
        / (1 - momentum)
        for t in window
    )
    return [f"penalty    {shape}; gradient: leaves about {math.exp(-total):.2e} of the condemned (Σ lr·λ/(1−μ))"]


def compensation_lines(parts: Parts, progress: Progress, num_processes: int) -> list[str]:
    """What a fit takes beside what training holds, and how many there are."""
    pruning, net = parts.recipe.pruning, parts.net
    if pruning.compensate is None:
        return []
    images = pruning.calibration_images
    needed = fit_needs(net, parts.weights, parts.image_size, images, num_processes)
    gradual = pruning.method.gradual
    fits = pruning.schedule.num_rounds if gradual is None else len(gradual.due(progress.total_steps))
    average = ", and as much for the moving average" if parts.recipe.train.ema_decay else ""
    return [
        f"fits       {fits:,} by {pruning.compensate}: {images:,} images at once, per process {needed.text()} "
        f"each{average}"
    ]


def runs_on_gpu(recipe: Recipe) -> bool:
    """Whether the run is meant for one: what is planned on a login node runs elsewhere."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return False
    return torch.cuda.is_available() or recipe.train.precision != "no"


def uses_text(uses: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in uses.items() if num_bytes)


def resource_lines(parts: Parts, sizes: Sizes, rounds: Sequence[RoundPreview], shards: int) -> list[str]:
    """Memory per process, and disk space of the run."""
    recipe, dealing = parts.recipe, sizes.dealing
    counts = (sizes.rows.train, sizes.rows.val, sizes.rows.test)
    images = "decoded on the fly"
    if recipe.data.in_memory is not False and not recipe.data.redrawn and None not in counts:
        images = f"{size(sum(counts) * 3 * parts.image_size**2)} if kept decoded"
    on_gpu = runs_on_gpu(recipe)
    found = needs(parts, rounds, dealing, counts[1:], shards, on_gpu)
    place = "a GPU" if on_gpu else "the CPU"
    prunable, others = parts.num_prunable, parts.num_parameters - parts.num_prunable
    densities = [min(one.density, parts.start_density) for one in rounds]
    ticket_bytes = sum(prunable * 4 * (density + 1 / 32) + others * 4 for density in densities)
    return [
        f"memory     about {size(found.peak)} per process on {place}, with {dealing.batch_per_device} images per pass: "
        f"{uses_text(found.device)}",
        f"           on the host: {uses_text(found.host)}; images {images}",
        f"disk       {len(densities)} tickets {size(ticket_bytes)}; {recipe.train.keep_resume_points} resume points of "
        f"{size(found.resume_point)}, plus one while writing",
    ]
