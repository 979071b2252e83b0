"""Builds a run from a recipe, ready for its first step."""

from collections.abc import Mapping, Sequence

from accelerate import Accelerator
from filelock import FileLock
from torch import nn

from vit_rsst.assembly import sharding
from vit_rsst.assembly.calibration import make_calibration
from vit_rsst.assembly.data import Rows, build_loader, data_options, make_evaluate
from vit_rsst.assembly.model import ticket_header
from vit_rsst.assembly.objective import build_distillation, build_loss, build_mixing
from vit_rsst.assembly.optim import build_optimizer, make_lr
from vit_rsst.assembly.parts import Parts, Sizes, prepare
from vit_rsst.data.sources import open_data
from vit_rsst.models.observation import freeze_
from vit_rsst.pruning.controller import Controller
from vit_rsst.pruning.plan import Density
from vit_rsst.recipe.schema import Recipe
from vit_rsst.run.checkpoint import Checkpointer
from vit_rsst.run.console import Console
from vit_rsst.run.environment import environment
from vit_rsst.run.folder import RunFolder
from vit_rsst.run.ranks import Ranks, once_a_node
from vit_rsst.run.rehearsal import unreached
from vit_rsst.run.signals import StopFlag
from vit_rsst.run.state import Run
from vit_rsst.run.tracking import Tracker, to_stderr
from vit_rsst.training import switches
from vit_rsst.training.best import Best
from vit_rsst.training.counters import RunningLoss
from vit_rsst.training.ema import Ema


def build(
    recipe: Recipe,
    accelerator: Accelerator,
    folder: RunFolder,
    stop: StopFlag,
    ranks: Ranks,
    restart: bool = False,
) -> tuple[Run, FileLock | None]:
    """A run before its first step. The folder is created last, once everything else has succeeded.

    Args:
        stop: already installed, so that a signal also ends the preparation.
        restart: set an existing run folder aside and start over.
    """
    train, device, is_main = recipe.train, accelerator.device, accelerator.is_main_process
    with once_a_node(accelerator):  # one process builds the cache, the others read it
        data = open_data(data_options(recipe), recipe.seed, recipe.data.shuffle_buffer)
    sizes = Sizes.of(recipe, Rows.counted(data), accelerator.num_processes)
    parts, progress = prepare(recipe, sizes, device), sizes.progress
    net, notes, is_sharded = parts.net, parts.notes, sharding.is_on(accelerator)
    if is_sharded:
        sharding.check(recipe, net)
    optimizer = build_optimizer(net, recipe.optim)
    loader = build_loader(recipe, data, sizes.dealing, accelerator)
    loader.mixing = build_mixing(recipe, data)
    distillation = build_distillation(recipe, data, progress, accelerator)

    def give_up() -> bool:
        ranks.heartbeat.move()
        return stop.is_asked()

    score = make_evaluate(net, data, accelerator, recipe, give_up)

    def evaluate(split: str) -> dict[str, float]:
        ranks.heartbeat.enter(f"evaluating {split}")
        return score(split)

    lock, is_exact = None, bool(train.deterministic)
    record = environment(accelerator.num_processes, str(device), data.identity, str(sizes.dealing), is_exact)
    record["order"] = loader.order()
    record["attention"] = switches.attention_backend(device, train.precision)
    record["fingerprints"] = [recipe.fingerprint] if restart else folder.fingerprints(recipe)
    record["question"] = recipe.pruning.method.question(recipe.setting)
    if hasattr(net, "loaded"):
        record["weights"] = net.loaded.record()
    if distillation is not None and distillation.source:
        record["teacher"] = distillation.source
    if is_main:
        if restart and (old := folder.set_aside()):
            print(f"kept the earlier run as {old}")
        lock = folder.open()
    if ranks.world > 1 and net.observed.applied is None:
        freeze_unused_(net, data.options.size, is_main)
    switches.compile_(net, train.compile)  # keeps parameter names; masking stays outside the graphs
    if is_sharded:
        units = sharding.Units.of(net)
        sharding.name_blocks_(accelerator, units)
        notes.append(units.text(accelerator.num_processes))
        record["sharding"] = "FSDP2"
    model, optimizer = accelerator.prepare(net, optimizer)
    if is_sharded:
        parts = sharding.sharded(parts)
    console = Console(is_main, progress, train.global_batch)
    console.line(summary(parts, sizes, str(device), notes))
    tracker = Tracker(folder.path / "metrics.jsonl", is_main, to_stderr)
    tracker.start(recipe.tracking.trackers, recipe.tracking.project, recipe.name, recipe.tree(), folder.logs)
    calibrate, compensate = make_calibration(parts, data, accelerator)
    run = Run(
        accelerator=accelerator,
        model=model,
        net=net,
        optimizer=optimizer,
        loader=loader,
        loss=build_loss(recipe, data, device),
        auxiliary_loss=getattr(net, "auxiliary_loss", None),
        distillation=distillation,
        best=Best(train.patience, train.keep_best),
        lr=make_lr(recipe),
        controller=Controller(
            model=net,
            weights=parts.weights,
            optimizer=optimizer,
            method=recipe.pruning.method,
            rounds=recipe.pruning.schedule.num_rounds,
            density=parts.density,
            selector=parts.selector,
            rewind_epoch=recipe.pruning.rewind_epoch,
            seed=recipe.seed,
            evaluate=lambda: evaluate("val"),
            mask=parts.mask,
            ema=Ema(net, train.ema_decay) if train.ema_decay else None,
            calibrate=calibrate,
            compensate=compensate,
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
        ranks=ranks,
        batch_shape=(sizes.dealing.batch_per_device, 3, data.options.size, data.options.size),
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


def freeze_unused_(net: nn.Module, image_size: int, is_main: bool) -> None:
    """Freezes parameters that no gradient reaches, such as DINOv2's `mask_token`: DDP waits for them in vain.

    `build_model` has done so unless the forward pass depends on values, which only a pass with numbers shows. Nothing
    else changes: an optimizer leaves a parameter without a gradient as it is.
    """
    unused = unreached(net, image_size)
    freeze_(net, unused)
    if unused and is_main:
        to_stderr(f"{', '.join(unused[:3])}{' …' if len(unused) > 3 else ''}: no gradient reaches them; frozen.")


def summary(parts: Parts, sizes: Sizes, device: str, notes: Sequence[str]) -> str:
    """The run in a few lines, with notes, a line each."""
    recipe, progress, total, prunable = parts.recipe, sizes.progress, parts.num_parameters, parts.num_prunable
    begins = f"  initial weights: {parts.net.loaded.text()}\n" if hasattr(parts.net, "loaded") else ""
    told = "".join(f"  {line}\n" for line in sizes.rows.told)
    begins += "".join(f"  {line}\n" for line in notes)
    return (
        f"{recipe.name}: {recipe.pruning.method_name} on {recipe.data.source} ({sizes.rows.text()})\n{told}"
        f"  {recipe.model.name}: {total:,} parameters, {prunable:,} prunable ({prunable / total:.1%}), "
        f"final density {density_text(parts.final_density)}\n{begins}"
        f"  {len(progress.round_epochs)} round(s), {progress.total_epochs} epochs of {progress.steps_per_epoch} steps; "
        f"global batch {sizes.dealing}; {device}, precision {recipe.train.precision}\n"
        f"  run folder {recipe.run_folder}"
    )


def density_text(density: Density) -> str:
    """`0.100`, or `head 0.500, neuron 0.300`."""
    if isinstance(density, Mapping):
        return ", ".join(f"{kind} {share:.3f}" for kind, share in density.items())
    return f"{density:.3f}"
