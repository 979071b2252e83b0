"""Rules across several fields of a recipe. Each message says what conflicts, why, and how to resolve it."""

from collections.abc import Iterator
from pathlib import Path

from vit_rsst.errors import unknown
from vit_rsst.models.catalog import CATALOG as MODELS
from vit_rsst.pruning.criteria import CRITERIA, OF_IMAGES
from vit_rsst.pruning.patterns import UNIT_KINDS, pattern
from vit_rsst.pruning.plan import Penalty
from vit_rsst.recipe.schema import Recipe, StepDecay
from vit_rsst.recipe.sentences import Problem

YAML_1_1_BOOLEANS = ("yes", "no", "on", "off", "y", "n")
"""Words that YAML 1.1 parsers read as true and false."""


def broken_rules(recipe: Recipe) -> list[Problem]:
    """Every rule that the recipe breaks."""
    rules = (_name, *PRUNING, _data, _model, _distill, _other_runs, _optim, _epochs, idle_fields)
    return [problem for rule in rules for problem in rule(recipe)]


def broken_pruning_rules(recipe: Recipe) -> list[Problem]:
    """Those of its section `pruning` alone, for callers that have no other."""
    found = [problem for rule in PRUNING for problem in rule(recipe)]
    return found + [problem for problem in idle_fields(recipe) if problem.path.startswith("pruning.")]


def _name(recipe: Recipe) -> Iterator[Problem]:
    if recipe.name.startswith("."):
        yield Problem("name", f"{recipe.name!r} is not a valid folder name; remove the leading dot")
    if len(recipe.name.encode()) > 200:
        yield Problem("name", f"too long for a folder name ({len(recipe.name.encode())} bytes); expected at most 200")


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    schedule = recipe.pruning.schedule
    place = "pruning.schedule"
    if schedule.rounds == 0 and recipe.pruning.method.prunes:
        yield Problem(f"{place}.rounds", f"0 prunes nothing; {recipe.pruning.method_name} needs at least 1")
    if schedule.name == "explicit":
        if not schedule.sparsities:
            yield Problem(
                f"{place}.sparsities",
                "missing; an explicit schedule lists the sparsity of each round, such as [0.5, 0.8, 0.9]",
            )
        elif list(schedule.sparsities) != sorted(set(schedule.sparsities)):
            yield Problem(
                f"{place}.sparsities", f"{list(schedule.sparsities)} does not increase; a removed weight stays removed"
            )
        if schedule.rounds is not None and schedule.sparsities and schedule.rounds != len(schedule.sparsities):
            yield Problem(
                f"{place}.rounds", f"{schedule.rounds} rounds but {len(schedule.sparsities)} sparsities; omit rounds"
            )
        for key in ("rate", "final_sparsity"):
            if getattr(schedule, key) is not None:
                yield Problem(f"{place}.{key}", "has no effect with an explicit list of sparsities; omit it")
        return
    if schedule.sparsities is not None:
        yield Problem(
            f"{place}.sparsities", f"has no effect with {schedule.name!r}; set {place}.name=explicit or omit it"
        )
    if schedule.rate is not None and schedule.final_sparsity is not None:
        yield Problem(f"{place}.rate", "conflicts with final_sparsity, which follows from it; keep one of the two")
    if schedule.rate is not None and schedule.name != "geometric":
        yield Problem(
            f"{place}.rate", f"only applies to the geometric schedule, not to {schedule.name!r}; set final_sparsity"
        )


def _n_of_m(recipe: Recipe) -> Iterator[Problem]:
    pruning, schedule = recipe.pruning, recipe.pruning.schedule
    n_of_m = pattern(pruning.granularity)
    if n_of_m is None:
        return
    n, m = n_of_m
    if not 1 <= n < m:
        yield Problem("pruning.granularity", f"{pruning.granularity} keeps {n} of {m}; expected 1 ≤ N < M")
        return
    final = 1.0 - n / m
    if schedule.rate is not None or schedule.sparsities or schedule.budget:
        yield Problem("pruning.schedule", f"{pruning.granularity} implies its own density; set only rounds")
    elif schedule.final_sparsity != final:
        yield Problem(
            "pruning.schedule.final_sparsity",
            f"{schedule.final_sparsity} does not match {pruning.granularity}, which implies {final:g}; omit it, or "
            "replace the whole schedule: pruning.schedule=linear",
        )
    if not recipe.pruning.method.one_round and schedule.num_rounds > m - n:
        yield Problem(
            "pruning.schedule.rounds",
            f"{schedule.num_rounds} rounds cannot each remove a weight from every window; use at most {m - n}, "
            "omit rounds, or replace the whole schedule: pruning.schedule=linear",
        )
    for field in ("scope", "depth_ramp", "layer_sparsity"):
        if getattr(pruning, field):
            yield Problem(
                f"pruning.{field}",
                f"has no effect with {pruning.granularity}: every window keeps the same number; omit it",
            )


def _targets(recipe: Recipe) -> Iterator[Problem]:
    schedule, kinds = recipe.pruning.schedule, UNIT_KINDS.get(recipe.pruning.granularity, ())
    place = "pruning.schedule"
    if schedule.budget is not None:
        if len(schedule.budget) != 1:
            yield Problem(f"{place}.budget", "expected one of flops and params, such as {flops: 0.5}")
        if not kinds:
            yield Problem(
                f"{place}.budget",
                f"needs units that can be cut out, but the granularity is {recipe.pruning.granularity!r}; use "
                "head, neuron, head+neuron or channel, or set final_sparsity instead",
            )
        for key in ("final_sparsity", "rate", "sparsities"):
            if getattr(schedule, key) is not None:
                yield Problem(f"{place}.{key}", "conflicts with budget, which determines it; keep one of the two")
    for key in ("final_sparsity", "rate"):
        value = getattr(schedule, key)
        if isinstance(value, dict) and set(value) != set(kinds):
            needed = " and ".join(kinds) or "a single number"
            yield Problem(
                f"{place}.{key}", f"set for {' and '.join(value)}, but {recipe.pruning.granularity} needs {needed}"
            )


def _granularity(recipe: Recipe) -> Iterator[Problem]:
    pruning = recipe.pruning
    granularity = pruning.granularity
    if granularity not in ("element", *UNIT_KINDS) and pattern(granularity) is None:
        yield Problem("pruning.granularity", unknown("value", granularity, ["element", *UNIT_KINDS, "N:M"]))
        return
    has_units = granularity in UNIT_KINDS
    if pruning.criterion in CRITERIA and CRITERIA[pruning.criterion].elements is None and not has_units:
        yield Problem(
            "pruning.criterion",
            f"{pruning.criterion} scores units, and {granularity!r} has none; use magnitude, activation_l1, "
            "activation_l2 or saliency, or a granularity of head, neuron, head+neuron or channel",
        )
    needs = CRITERIA[pruning.criterion].needs if pruning.criterion in CRITERIA else "weights"
    if needs == "movement" and recipe.model.start_from and not pruning.method.one_round:
        yield Problem(
            "pruning.criterion",
            f"{pruning.criterion} adds up over the steps of the round before a removal, and round 0 has none with "
            "model.start_from; use saliency or magnitude, or a method of one round",
        )
    asking = pruning.criterion if needs in OF_IMAGES else pruning.compensate
    if asking is not None and not pruning.calibration_images:
        what = needs if asking == pruning.criterion else "inputs of layers"
        yield Problem("pruning.calibration_images", f"is 0, but {asking} needs {what}; set it, for example to 2048")


def _compensate(recipe: Recipe) -> Iterator[Problem]:
    pruning, method, place = recipe.pruning, recipe.pruning.method, "pruning.compensate"
    if pruning.compensate is None:
        return
    if not method.prunes:
        yield Problem(place, f"has no effect with {pruning.method_name}, which removes nothing; omit it")
    elif not method.removes_for_good:
        yield Problem(
            place,
            f"needs weights that leave for good, and with {pruning.method_name} they may come back; use imp, gmp, "
            "refill or rsst, or omit it",
        )
    elif pruning.rewind_epoch is not None and method.remove_at == 0:
        yield Problem(
            place,
            f"has no effect with pruning.rewind={pruning.rewind}, which overwrites the fitted weights after every "
            "removal; use rewind=lr or none, or omit it",
        )


def _allocation(recipe: Recipe) -> Iterator[Problem]:
    pruning = recipe.pruning
    if pruning.scope == "erk" and pruning.granularity in UNIT_KINDS:
        yield Problem(
            "pruning.scope", f"erk allocates single weights; with {pruning.granularity} use layer or isomorphic"
        )
    if pruning.depth_ramp is not None and pruning.scope in ("global", "isomorphic", "erk"):
        yield Problem(
            "pruning.depth_ramp",
            f"sets the sparsity per layer, but the scope is {pruning.scope}; use pruning.scope=layer",
        )
    if pruning.depth_ramp == (0.0, 0.0):
        yield Problem("pruning.depth_ramp", "[0, 0] prunes nothing; expected relative sparsities such as [0.5, 1.5]")


def _method(recipe: Recipe) -> Iterator[Problem]:
    pruning, method, place = recipe.pruning, recipe.pruning.method, "pruning.method"
    yield from (Problem(*rule) for rule in method.rules(recipe.setting))
    if method.one_round and method.prunes and pruning.schedule.name == "explicit":
        yield Problem(
            "pruning.schedule.name",
            f"explicit lists one sparsity per round, and {pruning.method_name} has one round; use cubic or linear",
        )
    if method.one_round and pruning.rewind != method.default_rewind:
        yield Problem("pruning.rewind", f"has no effect with {pruning.method_name}, which has one round; omit it")
    if method.gradual is not None:
        yield from _window(method.gradual.window, f"{place}.window")
    if isinstance(method.penalty, Penalty):
        yield from _penalty(recipe, method.penalty)
    if recipe.train.recovery_epochs and not method.one_round and method.remove_at == 0:
        yield Problem(
            "train.recovery_epochs",
            f"has no effect with {pruning.method_name}, which removes before it trains; omit it",
        )
    elif (
        recipe.train.recovery_epochs and not method.one_round and method.remove_at is not None and method.remove_at < 1
    ):
        yield Problem(
            "train.recovery_epochs",
            f"only follow a removal at the end of a round, but remove_at is {method.remove_at}; set it to 1, or omit "
            "recovery_epochs",
        )
    elif recipe.train.recovery_epochs and method.keeps_start:
        yield Problem(
            "train.recovery_epochs", f"has no effect with {pruning.method_name}, which removes nothing; omit it"
        )


def _penalty(recipe: Recipe, penalty: Penalty) -> Iterator[Problem]:
    """Rules for the option `penalty` of any method."""
    place, remove_at = "pruning.method.penalty", recipe.pruning.method.remove_at
    yield from _window(penalty.window, f"{place}.window")
    if remove_at is not None and penalty.window[1] > remove_at > 0:
        yield Problem(
            "pruning.method.remove_at",
            f"{remove_at} is before the end of the penalty window {list(penalty.window)}; set it to "
            f"{penalty.window[1]} or later",
        )
    if penalty.coupling == "gradient" and recipe.optim.name != "sgd":
        yield Problem(
            f"{place}.coupling",
            f"gradient has no effect with {recipe.optim.name}, which rescales λ·w by its own size; use decoupled, "
            "or optim.name=sgd",
        )
    if penalty.coupling == "gradient" and recipe.optim.layer_decay < 1.0:
        yield Problem(
            f"{place}.coupling",
            "gradient shrinks weights in proportion to the learning rate, which optim.layer_decay varies by layer; use "
            "decoupled",
        )
    if penalty.coupling == "decoupled" and recipe.optim.name == "adam" and recipe.optim.weight_decay:
        yield Problem(
            "optim.weight_decay",
            "with adam, weight decay is part of the gradient and would move the condemned regardless of the penalty; "
            "use optim.name=adamw, or optim.weight_decay=0",
        )


def _window(window: tuple[float, float], place: str) -> Iterator[Problem]:
    start, end = window
    if not 0 <= start <= end <= 1:
        yield Problem(place, f"{list(window)} is not a window within the round; expected 0 ≤ start ≤ end ≤ 1")


def _data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if data.source == "folder" and data.path is None:
        yield Problem("data.path", "missing; data.source=folder needs the path of a local folder")
    if data.source == "digits" and data.path is not None:
        yield Problem("data.path", "has no effect with the built-in digits; set data.source=folder")
    if data.splits is not None and data.path is None:
        yield Problem("data.splits", "names files of a local folder; set data.path")
    if data.splits is not None and "train" not in data.splits:
        yield Problem("data.splits", "names no training split; add train: GLOB")
    if data.revision is not None and (data.path is not None or not data.info.hub_id):
        yield Problem("data.revision", "selects a version on the Hub, but the data are local; omit it")
    if data.streaming and data.source == "digits":
        yield Problem("data.streaming", "has no effect with the built-in digits, which are in memory; omit it")
    if data.streaming and data.train_samples:
        yield Problem(
            "data.train_samples", "cannot be applied to a stream; set train.steps_per_epoch, or data.streaming=false"
        )
    by_class = {
        "data.imbalance.kind": data.imbalance.kind is not None,
        "data.sampler": data.sampler != "shuffle",
        "train.loss": recipe.train.loss != "cross_entropy",
    }
    for place, is_set in by_class.items():
        if data.streaming and is_set:
            yield Problem(
                place, "needs the labels of all images, which a stream does not have; set data.streaming=false"
            )
    if data.sampler != "shuffle" and recipe.train.loss != "cross_entropy":
        yield Problem(
            "train.loss",
            f"{recipe.train.loss} and data.sampler={data.sampler} correct for the same imbalance; keep one of the two",
        )
    if data.streaming and data.in_memory:
        yield Problem("data.in_memory", "conflicts with data.streaming; keep one of the two")
    yield from _augment(recipe)


def _augment(recipe: Recipe) -> Iterator[Problem]:
    data, augment = recipe.data, recipe.data.augment
    for name in ("scale", "ratio", "rearea"):
        low, high = getattr(augment, name)
        if low > high:
            yield Problem(f"data.augment.{name}", f"[{low}, {high}] is reversed; put the smaller value first")
    if augment.aug_repeats > recipe.train.global_batch:
        yield Problem(
            "data.augment.aug_repeats",
            f"{augment.aug_repeats} repeats of an image do not fit a global batch of {recipe.train.global_batch}",
        )
    group, batch = 2 * augment.aug_repeats, recipe.train.batch_per_device or recipe.train.global_batch
    if augment.mixes and batch % group:
        yield Problem(
            "data.augment",
            f"MixUp and CutMix mix images within a device's batch, in groups of {group}, and {batch} images are no "
            f"multiple of that; set train.batch_per_device or train.global_batch to one",
        )
    if data.in_memory and data.redrawn:
        yield Problem(
            "data.in_memory",
            f"decoded images cannot be kept, since {data.redrawn[0]} draws a new one every epoch; omit in_memory",
        )
    if data.in_memory and data.max_corrupt:
        yield Problem(
            "data.in_memory",
            "conflicts with max_corrupt, which counts corrupt images as they are read; keep one of the two",
        )


def _model(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    if isinstance(model.pretrained, str) and (not model.pretrained or model.pretrained.lower() in YAML_1_1_BOOLEANS):
        yield Problem(
            "model.pretrained",
            f"{model.pretrained!r} is not valid; expected true, false, a timm tag, a file or a folder",
        )
    if model.pretrained is True and model.name in MODELS and not MODELS[model.name].has_weights:
        having = ", ".join(name for name in MODELS if MODELS[name].has_weights)
        yield Problem(
            "model.pretrained",
            f"{model.name} has no published weights; set it to false or to your own file or folder, or use "
            f"{having} or a timm name",
        )
    if model.pretrained and model.start_from:
        yield Problem("model.pretrained", "conflicts with start_from, which provides all weights; keep one of the two")
    if model.shape_from and (model.start_from or model.pretrained):
        yield Problem(
            "model.shape_from",
            "trains from random weights and conflicts with start_from and pretrained; keep one of them",
        )
    if "num_classes" in model.args:
        yield Problem("model.args.num_classes", "is determined by the data; omit it")
    for name, value in {} if model.name.startswith("hf:") else model.args.items():
        place = f"model.args.{name}"
        if value is None:
            yield Problem(place, "has no value, which timm would ignore; put a space after the colon: {depth: 6}")
        elif "drop" in name and name.endswith("_rate") and isinstance(value, int | float) and not 0 <= value < 1:
            yield Problem(place, f"{value!r} is not a rate; expected at least 0 and less than 1")


def _distill(recipe: Recipe) -> Iterator[Problem]:
    distill, place = recipe.train.distill, "train.distill"
    if distill.teacher == "":
        yield Problem(f"{place}.teacher", "is empty; expected 'dense', a ticket, a run or a slim folder")
    elif distill.teacher not in (None, "dense") and distill.teacher.lower() == "dense":
        yield Problem(f"{place}.teacher", f"unknown teacher {distill.teacher!r}. Did you mean 'dense'?")
    elif distill.teacher == "dense" and len(recipe.round_epochs) == 1:
        yield Problem(
            f"{place}.teacher",
            f"'dense' is this run's round 0, and {recipe.pruning.method_name} has one round; name a ticket or a run",
        )


def _other_runs(recipe: Recipe) -> Iterator[Problem]:
    named = {
        "model.start_from": recipe.model.start_from,
        "model.shape_from": recipe.model.shape_from,
        "train.distill.teacher": recipe.train.distill.teacher,
    }
    for field, place in named.items():
        if not place or (field == "train.distill.teacher" and place == "dense"):
            continue
        if Path(place).expanduser().resolve().is_relative_to(recipe.run_folder.resolve()):
            way_out = "; 'dense' is the model of its round 0" if field == "train.distill.teacher" else ""
            yield Problem(
                field, f"{place} is inside this run's own folder; give this run another name (name=…){way_out}"
            )


def _optim(recipe: Recipe) -> Iterator[Problem]:
    optim, train = recipe.optim, recipe.train
    if optim.warmup_epochs >= train.epochs:
        yield Problem("optim.warmup_epochs", f"warm-up takes all {train.epochs} epochs; expected fewer than that")
    if isinstance(optim.schedule, StepDecay) and max(optim.schedule.steps, default=0) >= train.epochs:
        yield Problem(
            "optim.schedule.steps", f"{list(optim.schedule.steps)} extend past the last of {train.epochs} epochs"
        )
    if optim.min_lr > optim.lr:
        yield Problem("optim.min_lr", f"{optim.min_lr} is greater than optim.lr ({optim.lr})")
    pruning = recipe.pruning
    is_rewound = not pruning.method.one_round
    if is_rewound and pruning.rewind == "none" and optim.schedule == "cosine" and optim.min_lr == 0:
        yield Problem(
            "pruning.rewind",
            "with none, later rounds train at the end of the cosine, optim.min_lr, which is 0; set it, or use lr",
        )


def _epochs(recipe: Recipe) -> Iterator[Problem]:
    rewind_epoch = recipe.pruning.rewind_epoch
    if rewind_epoch is not None and rewind_epoch >= recipe.train.epochs:
        yield Problem(
            "pruning.rewind", f"epoch {rewind_epoch} is not within round 0, which has {recipe.train.epochs} epochs"
        )
    if rewind_epoch and recipe.model.start_from:
        yield Problem("pruning.rewind", "round 0 is not trained with model.start_from; use lr, init or none")


PRUNING = (_schedule, _n_of_m, _targets, _granularity, _allocation, _compensate, _method)
"""Rules about the section `pruning`."""


def idle_fields(recipe: Recipe) -> Iterator[Problem]:
    """Fields that are set but have no effect."""
    for place, section, names, has_meaning, needed in _meanings(recipe):
        for name in names:
            if not has_meaning and getattr(section, name) != getattr(type(section), name):
                yield Problem(f"{place}.{name}", f"has no effect {needed} omit it")


def _meanings(recipe: Recipe) -> Iterator[tuple[str, object, tuple[str, ...], bool, str]]:
    """(place, section, field names, whether they have an effect here, when they do not)."""
    data, augment, optim = recipe.data, recipe.data.augment, recipe.optim
    is_of_files = ("image_column", "label_column", "num_classes", "max_pixels")
    yield "data", data, is_of_files, data.source != "digits", "with the built-in digits; use another data.source, or"
    yield "data", data, ("shuffle_buffer", "lanes"), data.streaming, "without data.streaming; set it, or"
    imbalance = data.imbalance
    yield (
        "data.imbalance",
        imbalance,
        ("ratio",),
        imbalance.kind is not None,
        "without data.imbalance.kind; set it to long_tail or step, or",
    )
    for names, has_meaning, needed in (
        (("scale", "ratio"), data.crop == "resized", "without data.augment.crop=resized; set it, or"),
        (("padding",), data.crop == "pad", "without data.augment.crop=pad; set it, or"),
        (("remode", "rearea", "reaspect"), augment.reprob > 0, "without data.augment.reprob; set it, or"),
        (("mixup_prob",), augment.mixes, "without mixup or cutmix; set one, or"),
        (
            ("mixup_switch_prob",),
            augment.mixup > 0 and augment.cutmix > 0,
            "unless both mixup and cutmix are set; set them, or",
        ),
    ):
        yield "data.augment", augment, names, has_meaning, needed
    yield "optim", optim, ("momentum",), optim.name == "sgd", f"with {optim.name}; set optim.name=sgd, or"
    yield (
        "optim",
        optim,
        ("betas",),
        optim.name != "sgd",
        "with sgd, which uses optim.momentum; set optim.name=adamw, or",
    )
    yield "optim", optim, ("min_lr",), optim.schedule == "cosine", "without optim.schedule=cosine; set it, or"
    distill = recipe.train.distill
    yield (
        "train.distill",
        distill,
        ("weight", "temperature"),
        distill.teacher is not None,
        "without train.distill.teacher; set it, or",
    )
    penalty = recipe.pruning.method.penalty
    if isinstance(penalty, Penalty):
        is_of_ramp = penalty.ramp == "exponential"
        yield (
            "pruning.method.penalty",
            penalty,
            ("exponent",),
            is_of_ramp,
            "without ramp: exponential; set it, or",
        )
        shrinks = penalty.coupling == "decoupled"
        yield "pruning.method.penalty", penalty, ("residual",), shrinks, "without coupling: decoupled; set it, or"
