"""From a recipe to a run: what the sections of a recipe become. Recipe objects stop here; what lies below takes plain
arguments."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from torch import nn

from vit_rsst import optim, results, resume, run_folder, tickets
from vit_rsst.best import Best
from vit_rsst.checkpoint import Checkpointer, ResumePoint
from vit_rsst.console import Console
from vit_rsst.data.catalog import CATALOG as SOURCES
from vit_rsst.data.decoding import Decoder, Window, auto_augment
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import (
    Dealing,
    DecodingLoader,
    InMemoryLoader,
    Loader,
    evaluation_batches,
    placed,
    steps_per_epoch,
)
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data
from vit_rsst.data.tables import Split, class_balanced
from vit_rsst.data.transforms import Augmentation, Erasing
from vit_rsst.ema import Ema
from vit_rsst.errors import Damaged, InputError
from vit_rsst.export.source import open_ticket
from vit_rsst.loop import Run
from vit_rsst.metrics.counters import RunningLoss, score
from vit_rsst.models import slim, zoo
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.models.complexity import flops as model_flops
from vit_rsst.models.complexity import unit_costs
from vit_rsst.models.hub import PLACE
from vit_rsst.objective import build_distillation, build_loss, build_mixing
from vit_rsst.progress import Progress
from vit_rsst.pruning.allocation import Allocation
from vit_rsst.pruning.calibration import collect
from vit_rsst.pruning.controller import Calibrate, Controller
from vit_rsst.pruning.criteria import CRITERIA, Statistics
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.methods.constant import Constant
from vit_rsst.pruning.methods.dense import Dense
from vit_rsst.pruning.plan import Density, Method
from vit_rsst.pruning.selector import Floors, Selector
from vit_rsst.pruning.units import UnitGroup
from vit_rsst.recipe import Optim, Recipe, StepDecay
from vit_rsst.run_folder import RunFolder
from vit_rsst.schedules import learning_rate
from vit_rsst.seeds import derived_seed
from vit_rsst.signals import StopFlag
from vit_rsst.tickets import Ticket
from vit_rsst.tracking import Tracker, to_stderr
from vit_rsst.watchdog import Watchdog

EVALUATION_BATCH = 500
CALIBRATION_BATCH = 128


def build(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder, stop: StopFlag, restart: bool = False
) -> tuple[Run, FileLock | None]:
    """Everything of a run at its first step. The folder is created once nothing can be wrong any more.

    Args:
        stop: installed, so that a signal ends the preparations.
        restart: keep an earlier run of this folder beside it and begin anew.
    """
    train, device, is_main = recipe.train, accelerator.device, accelerator.is_main_process
    with accelerator.main_process_first():  # one process makes the cache, the others read it
        data = open_data(data_options(recipe), recipe.seed, recipe.data.shuffle_buffer)
    dealing = Dealing.of(train.global_batch, train.batch_per_device, accelerator.num_processes)
    steps = steps_per_epoch(data.count("train"), train.global_batch, train.steps_per_epoch)
    progress = Progress(steps, recipe.round_epochs)
    net, start_mask = build_model(recipe, data)
    net.to(device)
    weights, groups = prunable_parts(net, recipe.pruning.granularity, recipe.pruning.include, recipe.pruning.protect)
    selector, density = build_selection(recipe, net, weights, groups, data.options.size)
    mask = starting_mask(weights, start_mask, recipe.pruning.method)
    optimizer = build_optimizer(net, recipe.optim)
    loader = build_loader(recipe, data, dealing, accelerator)
    distillation = build_distillation(recipe, data, progress, accelerator)
    if recipe.data.augment.mixes and dealing.batch_per_device == 1:
        raise InputError(
            f"data.augment: MixUp and CutMix mix the images of a device's batch, and of a global batch of {dealing} it "
            "has one; take a larger train.global_batch."
        )
    watchdog = Watchdog(folder.logs / f"stacks-{accelerator.process_index}.txt", train.rank_timeout)

    def give_up() -> bool:
        watchdog.beat()
        return stop.is_asked()

    evaluate = make_evaluate(net, data, accelerator, recipe, give_up)
    lock, record = None, run_folder.environment(accelerator.num_processes, str(device), data.identity)
    if hasattr(net, "loaded"):
        record["weights"] = net.loaded.record()
    if distillation is not None and distillation.source:
        record["teacher"] = distillation.source
    if is_main:
        if restart and (old := folder.set_aside()):
            print(f"kept the earlier run as {old}")
        lock = folder.open(recipe, record)
        folder.write_status("running")
    if train.compile:
        net.compile()  # in place: names stay, and masks written outside of it never recompile
    model, optimizer = accelerator.prepare(net, optimizer)
    console = Console(is_main, progress, train.global_batch)
    asked = mask.density if isinstance(recipe.pruning.method, Dense | Constant) else density(1.0)
    console.line(summary(recipe, data, net, weights, asked, dealing, progress, str(device)))
    tracker = Tracker(folder.path / "metrics.jsonl", is_main, to_stderr)
    tracker.start(recipe.tracking.trackers, recipe.tracking.project, recipe.name, recipe.tree(), folder.logs)
    run = Run(
        accelerator=accelerator,
        model=model,
        net=net,
        optimizer=optimizer,
        loader=loader,
        loss=build_loss(recipe, data, device),
        own_loss=getattr(net, "auxiliary_loss", None),
        mixing=build_mixing(recipe, data),
        distillation=distillation,
        best=Best(train.patience, train.keep_best),
        lr=make_lr(recipe),
        controller=Controller(
            model=net,
            weights=weights,
            optimizer=optimizer,
            method=recipe.pruning.method,
            rounds=recipe.pruning.schedule.num_rounds,
            density=density,
            selector=selector,
            rewind_epoch=recipe.pruning.rewind_epoch,
            seed=recipe.seed,
            evaluate=lambda: evaluate("val"),
            mask=mask,
            ema=Ema(net, train.ema_decay) if train.ema_decay else None,
            calibrate=make_calibrate(recipe, net, weights, groups, data, accelerator),
        ),
        progress=progress,
        evaluate=evaluate,
        folder=folder,
        checkpointer=Checkpointer(
            folder.checkpoints, train.keep_resume_points, lambda text: tracker.warning(progress.global_step, text)
        ),
        tracker=tracker,
        console=console,
        stop=stop,
        meter=RunningLoss(device),
        watchdog=watchdog,
        clip_grad_norm=recipe.optim.clip_grad_norm,
        max_skipped_steps=train.max_skipped_steps,
        log_every_steps=train.log_every_steps,
        save_every_steps=train.save_every_steps,
        seed=recipe.seed,
        recipe_fingerprint=recipe.fingerprint,
        header=ticket_header(recipe, data, net),
        environment=record,
    )
    return run, lock


def build_loader(recipe: Recipe, data: ImageData, dealing: Dealing, accelerator: Accelerator) -> Loader:
    """This rank's training batches, from decoded images or decoded as they are needed."""
    mean, std = channels(recipe)
    decoder, device = training_decoder(recipe, data), accelerator.device
    common = {
        "dealing": dealing,
        "rank": accelerator.process_index,
        "device": device,
        "seed": recipe.seed,
        "augmentation": augmentation(recipe),
        "mean": mean,
        "std": std,
        "repeats": recipe.data.augment.aug_repeats,
    }
    samples, weights = data.rows["train"], None
    if recipe.data.sampler == "class_balanced":
        weights = class_balanced(samples.labels)
    if not decoder.is_random:
        samples = data.samples("train", recipe.data.in_memory, 0.4 / local_processes(accelerator))
    if isinstance(samples, Split):
        return InMemoryLoader(split=placed(samples, device), weights=weights, **common)
    return DecodingLoader(
        rows=samples if weights is None else replace(samples, weights=weights),
        decoder=decoder,
        workers=num_workers(recipe, accelerator),
        max_corrupt=recipe.data.max_corrupt,
        **common,
    )


def starting_mask(weights: dict[str, nn.Parameter], found: MaskSet | None, method: Method) -> MaskSet:
    """Everything alive, less the zeros of the ticket that the run starts from.

    Raises:
        InputError: the ticket has zeros in a weight that this recipe does not prune, which would grow back; or the
            method is constant and it has none.
    """
    mask = MaskSet.full(weights)
    if found is None:
        return mask
    if isinstance(method, Constant) and found.is_full:
        raise InputError("model.start_from: it has no zeros, and constant keeps those; start from a sparse ticket.")
    freed = [name for name in found if name not in weights and not found[name].all()]
    if freed:
        raise InputError(
            f"pruning.protect: model.start_from has zeros in {freed[0]} and {len(freed) - 1} more weights that this "
            "recipe does not prune, so that they would grow back; prune the same weights as the run it comes from."
        )
    # A weight that was not prunable there is alive here.
    return MaskSet({n: found[n].to(w.device) if n in found.masks else mask[n] for n, w in weights.items()})


def build_selection(
    recipe: Recipe, net: nn.Module, weights: dict[str, nn.Parameter], groups: list[UnitGroup], image_size: int
) -> tuple[Selector, Callable[[float], Density]]:
    """Who chooses what stays, and the density that the schedule asks for at a fraction of it.

    Raises:
        InputError: the schedule cannot be reached, or a glob names no layer.
    """
    pruning = recipe.pruning
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
    if not isinstance(pruning.method, Dense | Constant):
        selector.check(weights)
    return selector, schedule.density


def spend(
    budget: Mapping[str, float], net: nn.Module, groups: list[UnitGroup], image_size: int
) -> tuple[dict[str, float], float]:
    """Cost of a unit of each group, and the share of all units' cost that must go to meet the budget.

    Raises:
        InputError: what cannot be pruned is more than the budget already.
    """
    [(what, share)] = budget.items()
    flops, params = unit_costs(net, groups, image_size)
    costs = flops if what == "flops" else params
    total = model_flops(net, image_size) if what == "flops" else sum(p.numel() for p in net.parameters())
    prunable = sum(costs[group.name] * group.units for group in groups)
    final = (1.0 - share) * total / prunable
    if final >= 1.0:
        raise InputError(
            f"pruning.schedule.budget.{what}: {share} of the model cannot be reached, since what is not prunable "
            f"takes {1 - prunable / total:.3f} of it; ask for more than that, or prune more kinds of units."
        )
    return costs, final


def make_calibrate(
    recipe: Recipe,
    net: nn.Module,
    weights: dict[str, nn.Parameter],
    groups: list[UnitGroup],
    data: ImageData,
    accelerator: Accelerator,
) -> Calibrate | None:
    """Statistics over calibration images of the training split, the same ones in every round; None: not needed."""
    needs = CRITERIA[recipe.pruning.criterion].needs
    if needs not in ("activations", "gradients") or isinstance(recipe.pruning.method, Dense | Constant):
        return None
    images = data.balanced("train", recipe.pruning.calibration_images, derived_seed(recipe.seed, "calibration"))
    split = placed(images, accelerator.device)
    mean, std = channels(recipe)

    def calibrate() -> Statistics:
        batches = evaluation_batches(
            split,
            CALIBRATION_BATCH,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
            mean,
            std,
        )
        return collect(net, batches, weights, groups, needs == "gradients")

    return calibrate


def resume_if_possible(s: Run, allow_world_size_change: bool = False, allow_data_change: bool = False) -> None:
    """Sets the run to its newest sound resume point, on every rank, and says so.

    Raises:
        InputError: the point is of another recipe, or of other data or, within an epoch, of another number of
            processes, and that is not allowed.
        Damaged: no point is sound, or the ranks read different ones.
    """
    point = s.checkpointer.load() if s.accelerator.is_main_process else None
    if s.accelerator.num_processes > 1:
        [step] = broadcast_object_list([None if point is None else point.step])
        if step is not None and point is None:  # the points lie on a file system that all ranks share
            point = s.checkpointer.load()
        if step != (None if point is None else point.step):
            raise Damaged(f"the ranks read different resume points from {s.folder.checkpoints}; is it shared by all?")
    if point is None:
        return
    drift = run_folder.drift(point.numbers.get("environment", s.environment), s.environment)
    check_same_run(s, point, drift, allow_world_size_change, allow_data_change)
    resume.restore_(s, point)
    p = s.progress
    if s.accelerator.is_main_process:
        results.forget_from(s.folder.path, p.round)
    processes = drift.get("processes")
    changed = f", with {processes[1]} processes instead of {processes[0]}: not bit-exact" if processes else ""
    s.tracker.log("resume", p.global_step, {"round": p.round, "epoch": p.epoch, "bit_exact": not processes})
    s.console.line(f"resumed at round {p.round}, epoch {p.epoch}, step {p.global_step} of {p.total_steps}{changed}")
    if told := [f"{key} {then} → {now}" for key, (then, now) in drift.items() if key != "processes"]:
        s.tracker.warning(p.global_step, f"the environment is not the one that the run began in: {'; '.join(told)}")


def check_same_run(
    s: Run, point: ResumePoint, drift: dict[str, tuple], allow_world_size_change: bool, allow_data_change: bool
) -> None:
    """Refuses a point that this run cannot go on from as the same run.

    Raises:
        InputError: see `resume_if_possible`.
    """
    if point.numbers["recipe"] != s.recipe_fingerprint:
        raise InputError(
            f"{s.folder.path}: its resume point {point.step} is of another recipe, whatever recipe.yaml says now; "
            "give this run another name (name=…), or begin anew with --restart."
        )
    then, now = drift.get("processes", (1, 1))
    if then != now and point.numbers["progress"]["step"] and not allow_world_size_change:
        raise InputError(
            f"{s.folder.path}: the run stopped within an epoch, at step {point.step}, with {then} processes, and now "
            f"has {now}. Start it with {then}, or pass --allow-world-size-change: every image still has its turn, but "
            "sums are rounded in another order, so that the result is no longer the same to the last bit."
        )
    other = [f"data.{key}" for key in run_folder.DATA_IDENTITY if f"data.{key}" in drift]
    if other and not allow_data_change:
        told = "; ".join(f"{key} {drift[key][0]} there, {drift[key][1]} now" for key in other)
        raise InputError(
            f"{s.folder.path}: the data are not those that the run began with ({told}). Bring them back, give this run "
            "another name (name=…), or pass --allow-data-change: then it is no longer one experiment."
        )


def data_options(recipe: Recipe) -> DataOptions:
    data = recipe.data
    return DataOptions(**{field.name: getattr(data, field.name) for field in fields(DataOptions)})


def channels(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the source's channels."""
    info = SOURCES[recipe.data.source]
    return info.mean, info.std


def augmentation(recipe: Recipe) -> Augmentation:
    """What is done to whole batches on the device."""
    augment = recipe.data.augment
    hflip = 0.5 * SOURCES[recipe.data.source].hflip if augment.hflip is None else augment.hflip
    erasing = None
    if augment.reprob:
        erasing = Erasing(augment.reprob, augment.remode, augment.rearea, augment.reaspect)
    return Augmentation(augment.padding if crop(recipe) == "pad" else 0, hflip, erasing)


def crop(recipe: Recipe) -> str:
    return recipe.data.augment.crop or SOURCES[recipe.data.source].crop


def training_decoder(recipe: Recipe, data: ImageData) -> Decoder:
    """What is done to each training image while it is decoded.

    Raises:
        InputError: timm knows no such augmentation.
    """
    augment, mean = recipe.data.augment, channels(recipe)[0]
    if augment.auto_augment is not None:
        auto_augment(augment.auto_augment, data.options.size, mean)
    return replace(
        data.decoder("train"),
        window=Window(augment.scale, augment.ratio) if crop(recipe) == "resized" else None,
        auto_augment=augment.auto_augment,
        color_jitter=augment.color_jitter,
        mean=mean,
    )


def num_workers(recipe: Recipe, accelerator: Accelerator) -> int:
    """Processes that decode for this one; without a GPU the model needs the cores itself."""
    if recipe.data.workers is not None:
        return recipe.data.workers
    if accelerator.device.type == "cpu":
        return 0
    return min(8, (os.cpu_count() or 1) // local_processes(accelerator))


def local_processes(accelerator: Accelerator) -> int:
    """Training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def build_model(recipe: Recipe, data: ImageData) -> tuple[nn.Module, MaskSet | None]:
    """The network, seeded; with the weights and the mask of `model.start_from` where it is given.

    Raises:
        InputError: the model does not take images of this size.
    """
    architecture, args = zoo.describe(recipe.model.name, recipe.model.args, len(data.classes))
    torch.manual_seed(derived_seed(recipe.seed, "model"))
    net = zoo.create(architecture, args, recipe.model.pretrained)
    if recipe.train.grad_checkpointing:
        zoo.checkpoint_gradients_(net)
    expected = getattr(getattr(net, "patch_embed", None), "img_size", None)
    size = data.options.size
    if expected is not None and tuple(expected) != (size, size):
        raise InputError(
            f"data.image_size: {recipe.model.name} takes images of {expected[0]} px and the data have {size} px; set "
            f"data.image_size={expected[0]}, or model.args.img_size={size}."
        )
    opened = reshape_(net, recipe, architecture, args)
    if opened is None or not recipe.model.start_from:
        return net, None
    path, ticket = opened
    tickets.load_into_(net, ticket, str(path))
    return net, ticket.mask


def reshape_(net: nn.Module, recipe: Recipe, architecture: str, args: dict) -> tuple[Path, Ticket] | None:
    """Gives the network the shape of what it starts from, or of what its shape is taken from, and names that.

    Raises:
        Damaged: it cannot be read, or is of another model.
    """
    source = recipe.model.start_from or recipe.model.shape_from
    if not source:
        return None
    path, ticket = open_ticket(Path(source).expanduser())
    check_same_model(path, ticket, architecture, args)
    if recipe.model.shape_from or "widths" in ticket.metadata:
        slim.shape_like_(net, slim.shape_of(net, ticket.mask, ticket.metadata), str(path))
    return path, ticket


def check_same_model(path: Path, ticket: Ticket, architecture: str, args: dict) -> None:
    """Refuses a ticket of another model even where all shapes fit: as many rows may be other heads.

    Raises:
        Damaged: architecture or arguments differ, but for dropout and the place of published weights.
    """
    their_architecture, their_args = zoo.description(ticket.metadata, str(path))
    theirs = {"architecture": their_architecture, **their_args}
    ours = json.loads(json.dumps({"architecture": architecture, **args}))
    for key in sorted(theirs.keys() | ours.keys()):
        if "drop" not in key and key != PLACE and theirs.get(key) != ours.get(key):
            raise Damaged(
                f"{path}: it is of another model: {key} is {theirs.get(key, 'not given')} there and "
                f"{ours.get(key, 'not given')} in this recipe; name the same model in model.name and model.args."
            )


def build_optimizer(net: nn.Module, options: Optim) -> torch.optim.Optimizer:
    return optim.create_optimizer(
        net,
        options.name,
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        betas=options.betas,
        lr_scales=lr_scales(net, options),
    )


def lr_scales(net: nn.Module, options: Optim) -> dict[str, float] | None:
    """Share of the learning rate of each parameter; None: all have all of it."""
    return zoo.lr_scales(net, options.layer_decay) if options.layer_decay < 1.0 else None


def make_lr(recipe: Recipe) -> Callable[[Progress], float]:
    """The learning rate at a progress: one schedule a round, replayed; from epoch K on with `rewind: epoch:K`."""
    options, epochs = recipe.optim, recipe.train.epochs
    decay = options.schedule if isinstance(options.schedule, StepDecay) else None
    one_round = recipe.pruning.method.one_round
    rewind = recipe.pruning.rewind
    # A method of one round has one schedule over all its epochs: warm-up and milestones keep their place in epochs.
    length = recipe.round_epochs[0] if one_round else epochs

    def lr(progress: Progress) -> float:
        start = 0.0
        if progress.round > 0:
            if rewind == "none":
                return at(1.0, 1)
            start = (recipe.pruning.rewind_epoch or 0) / epochs
        x = start + (1.0 - start) * progress.round_step / max(progress.round_steps, 1)
        return at(x, progress.round_steps)

    def at(fraction: float, num_steps: int) -> float:
        return learning_rate(
            fraction * num_steps,
            num_steps,
            lr=options.lr,
            warmup=options.warmup_epochs / length,
            schedule="steps" if decay else options.schedule,
            min_lr=options.min_lr,
            milestones=tuple(epoch / length for epoch in decay.steps) if decay else (),
            gamma=decay.gamma if decay else 1.0,
        )

    return lr


def make_evaluate(
    net: nn.Module, data: ImageData, accelerator: Accelerator, recipe: Recipe, give_up: Callable[[], bool]
) -> Callable[[str], dict[str, float]]:
    """Scores a split of the data with the network as it stands, over all ranks.

    Args:
        give_up: asked before every batch.
    """
    mean, std = channels(recipe)
    # What fits is decoded now: an image that cannot be is found before the first step, not after the last.
    share = 0.4 / local_processes(accelerator)
    splits = {name: data.samples(name, recipe.data.in_memory, share) for name in ("val", "test")}
    splits |= {name: placed(split, accelerator.device) for name, split in splits.items() if isinstance(split, Split)}
    workers = num_workers(recipe, accelerator)

    def evaluate(split: str) -> dict[str, float]:
        batches = evaluation_batches(
            splits[split], EVALUATION_BATCH, accelerator.process_index, accelerator.num_processes,
            accelerator.device, mean, std, data.decoder(split), workers, recipe.data.max_corrupt,
        )  # fmt: skip
        return score(net, batches, accelerator.device, give_up)

    return evaluate


def ticket_header(recipe: Recipe, data: ImageData, net: nn.Module) -> dict[str, str]:
    """What every ticket of the run says of itself: enough to build the model and to prepare its images."""
    architecture, args = zoo.describe(recipe.model.name, recipe.model.args, len(data.classes))
    widths = slim.narrowed(net, zoo.create(architecture, args, device="meta"))
    mean, std = channels(recipe)
    info = {"image_size": data.options.size, "mean": mean, "std": std, "classes": data.classes}
    return {
        "model": recipe.model.name,
        "architecture": architecture,
        "model_args": json.dumps(args),
        "data": json.dumps({**asdict(data.options), **info}),
        "seed": str(recipe.seed),
        "method": recipe.pruning.method_name,
        "precision": recipe.train.precision,
        "ema": str(recipe.train.ema_decay or "false"),
        "recipe": recipe.fingerprint,
        **({"widths": json.dumps(widths)} if widths else {}),
        **({"pretrained": net.loaded.sha256} if hasattr(net, "loaded") else {}),
    }


def density_text(density: Density) -> str:
    """`0.100`, or `head 0.500, neuron 0.300`."""
    if isinstance(density, Mapping):
        return ", ".join(f"{kind} {share:.3f}" for kind, share in density.items())
    return f"{density:.3f}"


def count_text(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def summary(
    recipe: Recipe,
    data: ImageData,
    net: nn.Module,
    weights: dict,
    density: Density,
    dealing: Dealing,
    progress: Progress,
    device: str,
) -> str:
    """What is about to happen, in a few lines."""
    begins = f"  begins with {net.loaded.text()}\n" if hasattr(net, "loaded") else ""
    total = sum(p.numel() for p in net.parameters())
    prunable = sum(w.numel() for w in weights.values())
    rows = ", ".join(f"{count_text(data.count(split))} {split}" for split in ("train", "val", "test"))
    return (
        f"{recipe.name}: {recipe.pruning.method_name} on {recipe.data.source} ({rows})\n"
        f"  {recipe.model.name}: {total:,} parameters, {prunable:,} prunable ({prunable / total:.1%}), "
        f"final density {density_text(density)}\n{begins}"
        f"  {len(progress.round_epochs)} round(s), {progress.total_epochs} epochs of {progress.steps_per_epoch} steps; "
        f"global batch {dealing}; {device}, precision {recipe.train.precision}\n"
        f"  run folder {recipe.run_folder}"
    )
