"""Rules that join several fields of a recipe. Each says what does not fit, why, and the way out."""

from collections.abc import Iterator
from pathlib import Path

from vit_rsst.data.catalog import CATALOG as SOURCES
from vit_rsst.errors import unknown
from vit_rsst.models.catalog import CATALOG as MODELS
from vit_rsst.pruning.criteria import CRITERIA
from vit_rsst.pruning.methods.constant import Constant
from vit_rsst.pruning.methods.dense import Dense
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.methods.refill import Refill
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.methods.rst import Rst
from vit_rsst.pruning.methods.ste import StraightThrough
from vit_rsst.pruning.patterns import UNIT_KINDS, pattern
from vit_rsst.recipe.schema import Recipe, StepDecay
from vit_rsst.recipe.sentences import Problem

YAML_1_1_BOOLEANS = ("yes", "no", "on", "off", "y", "n")
"""Words that other readers of YAML take for true and false."""


def broken_rules(recipe: Recipe) -> list[Problem]:
    """Every rule that the recipe breaks."""
    pruning = (_schedule, _windows, _targets, _granularity, _allocation, _method)
    rules = (_name, *pruning, _data, _model, _distill, _other_runs, _optim, _epochs, idle_fields)
    return [problem for rule in rules for problem in rule(recipe)]


def _name(recipe: Recipe) -> Iterator[Problem]:
    if recipe.name.startswith("."):
        yield Problem("name", f"{recipe.name!r} is not usable as the name of a folder; leave out the dot before it")
    if len(recipe.name.encode()) > 200:
        yield Problem("name", f"takes {len(recipe.name.encode())} bytes, too many for a folder; expected 200 at most")


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    schedule = recipe.pruning.schedule
    place = "pruning.schedule"
    if schedule.rounds == 0 and not isinstance(recipe.pruning.method, Dense):
        yield Problem(f"{place}.rounds", f"0 is for dense alone; {recipe.pruning.method_name} needs at least 1")
    if schedule.name == "explicit":
        if not schedule.sparsities:
            yield Problem(
                f"{place}.sparsities", "missing; explicit needs the sparsity of each round, such as [0.5, 0.8, 0.9]"
            )
        elif list(schedule.sparsities) != sorted(set(schedule.sparsities)):
            yield Problem(
                f"{place}.sparsities", f"{list(schedule.sparsities)} does not rise; a removed weight stays removed"
            )
        if schedule.rounds is not None and schedule.sparsities and schedule.rounds != len(schedule.sparsities):
            yield Problem(
                f"{place}.rounds", f"{schedule.rounds} and {len(schedule.sparsities)} sparsities; leave rounds out"
            )
        for key in ("rate", "final_sparsity"):
            if getattr(schedule, key) is not None:
                yield Problem(f"{place}.{key}", "means nothing beside an explicit list of sparsities; leave it out")
        return
    if schedule.sparsities is not None:
        yield Problem(
            f"{place}.sparsities", f"means nothing to {schedule.name!r}; set {place}.name=explicit or leave it out"
        )
    if schedule.rate is not None and schedule.final_sparsity is not None:
        yield Problem(f"{place}.rate", "given together with final_sparsity, which follows from it; keep one of the two")
    if schedule.rate is not None and schedule.name != "geometric":
        yield Problem(
            f"{place}.rate", f"is a share of what remains, which is the geometric schedule, not {schedule.name!r}"
        )


def _windows(recipe: Recipe) -> Iterator[Problem]:
    pruning, schedule = recipe.pruning, recipe.pruning.schedule
    windows = pattern(pruning.granularity)
    if windows is None:
        return
    kept, window = windows
    if not 1 <= kept < window:
        yield Problem("pruning.granularity", f"{pruning.granularity} keeps {kept} of {window}; expected 1 ≤ N < M")
        return
    final = 1.0 - kept / window
    if schedule.rate is not None or schedule.sparsities or schedule.budget:
        yield Problem("pruning.schedule", f"{pruning.granularity} fixes its own density; give rounds alone")
    elif schedule.final_sparsity != final:
        yield Problem(
            "pruning.schedule.final_sparsity",
            f"{schedule.final_sparsity} is not that of {pruning.granularity}, {final:g}; leave it out, or replace "
            "the whole schedule: pruning.schedule=linear",
        )
    if not recipe.pruning.method.one_round and schedule.num_rounds > window - kept:
        yield Problem(
            "pruning.schedule.rounds",
            f"{schedule.num_rounds} rounds cannot each remove a weight of every window; at most {window - kept}; "
            "leave rounds out, or replace the whole schedule: pruning.schedule=linear",
        )
    for field in ("scope", "depth_ramp", "layer_sparsity"):
        if getattr(pruning, field):
            yield Problem(f"pruning.{field}", f"means nothing to {pruning.granularity}: every window keeps as many")


def _targets(recipe: Recipe) -> Iterator[Problem]:
    schedule, kinds = recipe.pruning.schedule, UNIT_KINDS.get(recipe.pruning.granularity, ())
    place = "pruning.schedule"
    if schedule.budget is not None:
        if len(schedule.budget) != 1:
            yield Problem(f"{place}.budget", "expected one of flops and params, such as {flops: 0.5}")
        if not kinds:
            yield Problem(
                f"{place}.budget",
                f"needs units that are really removed, and the granularity is {recipe.pruning.granularity!r}; use "
                "head, neuron, head+neuron or channel, or final_sparsity",
            )
        for key in ("final_sparsity", "rate", "sparsities"):
            if getattr(schedule, key) is not None:
                yield Problem(f"{place}.{key}", "follows from the budget; keep one of the two")
    for key in ("final_sparsity", "rate"):
        value = getattr(schedule, key)
        if isinstance(value, dict) and set(value) != set(kinds):
            needed = " and ".join(kinds) or "a single number"
            yield Problem(
                f"{place}.{key}", f"given for {' and '.join(value)}; {recipe.pruning.granularity} needs {needed}"
            )


def _granularity(recipe: Recipe) -> Iterator[Problem]:
    pruning = recipe.pruning
    granularity, method = pruning.granularity, pruning.method
    if granularity not in ("element", *UNIT_KINDS) and pattern(granularity) is None:
        yield Problem("pruning.granularity", unknown("value", granularity, ["element", *UNIT_KINDS, "N:M"]))
        return
    has_units = granularity in UNIT_KINDS
    if isinstance(method, Refill) and not has_units:
        yield Problem(
            "pruning.granularity",
            f"refill puts whole units back, and {granularity!r} has none; use head, neuron, head+neuron or channel",
        )
    elif pruning.criterion in CRITERIA and CRITERIA[pruning.criterion].elements is None and not has_units:
        yield Problem(
            "pruning.criterion",
            f"{pruning.criterion} scores units, and {granularity!r} has none; use magnitude, activation_l1, "
            "activation_l2 or saliency, or a granularity of head, neuron, head+neuron or channel",
        )
    if isinstance(method, StraightThrough) and pruning.criterion != "magnitude":
        yield Problem(
            "pruning.criterion", f"ste is straight-through magnitude pruning; {pruning.criterion!r} is not for it"
        )
    needs = CRITERIA[pruning.criterion].needs if pruning.criterion in CRITERIA else "weights"
    if needs in ("activations", "gradients") and not pruning.calibration_images:
        yield Problem(
            "pruning.calibration_images", f"is 0, and {pruning.criterion} looks at {needs}; set it, such as 2048"
        )


def _allocation(recipe: Recipe) -> Iterator[Problem]:
    pruning = recipe.pruning
    if pruning.scope == "erk" and pruning.granularity in UNIT_KINDS:
        yield Problem(
            "pruning.scope", f"erk divides single weights; with {pruning.granularity} use layer or isomorphic"
        )
    if pruning.depth_ramp is not None and pruning.scope in ("global", "isomorphic", "erk"):
        yield Problem(
            "pruning.depth_ramp", f"sets the sparsity of each layer, and the scope is {pruning.scope}; use scope layer"
        )
    if pruning.depth_ramp == (0.0, 0.0):
        yield Problem("pruning.depth_ramp", "[0, 0] prunes nothing; expected relative sparsities such as [0.5, 1.5]")


def _method(recipe: Recipe) -> Iterator[Problem]:
    pruning, method, place = recipe.pruning, recipe.pruning.method, "pruning.method"
    if isinstance(method, Gmp | StraightThrough):
        if pruning.schedule.name == "explicit":
            yield Problem(
                "pruning.schedule.name",
                f"explicit lists sparsities of rounds, and {pruning.method_name} has one; use cubic or linear",
            )
        yield from _window(method.window, f"{place}.window")
    if isinstance(method, Constant) and not recipe.model.start_from:
        yield Problem(place, "constant keeps the zeros of a model; name it in model.start_from: a ticket or a run")
    if isinstance(method, Rst) and pruning.rewind != "init":
        yield Problem("pruning.rewind", f"rst begins from the initial weights, not {pruning.rewind!r}; leave it out")
    if isinstance(method, Refill) and method.feedback == "post" and pruning.rewind == "none":
        yield Problem("pruning.rewind", "none trains what was refilled at the last learning rate; use init or lr")
    if not isinstance(method, Rsst | Rst):
        return
    penalty = method.penalty
    yield from _window(penalty.window, f"{place}.penalty.window")
    if penalty.window[1] > method.remove_at > 0:
        yield Problem(
            f"{place}.remove_at",
            f"{method.remove_at} lies before the end of the window {list(penalty.window)}; remove then or later",
        )
    if penalty.coupling == "gradient" and recipe.optim.name != "sgd":
        yield Problem(
            f"{place}.penalty.coupling",
            f"gradient means nothing under {recipe.optim.name}, which divides λ·w by its own size; use decoupled, or "
            "optim.name=sgd",
        )
    if penalty.coupling == "gradient" and recipe.optim.layer_decay < 1.0:
        yield Problem(
            f"{place}.penalty.coupling",
            "gradient shrinks by the learning rate, which optim.layer_decay makes another in each layer; use decoupled",
        )
    if penalty.coupling == "decoupled" and recipe.optim.name == "adam" and recipe.optim.weight_decay:
        yield Problem(
            "optim.weight_decay",
            "under adam the decay is part of the gradient and would move the condemned whatever the penalty; "
            "use optim.name=adamw, or weight_decay 0",
        )
    if recipe.train.recovery_epochs and method.remove_at < 1:
        yield Problem(
            "train.recovery_epochs", f"follow a removal at the end of a round; remove_at is {method.remove_at}"
        )


def _window(window: tuple[float, float], place: str) -> Iterator[Problem]:
    start, end = window
    if not 0 <= start <= end <= 1:
        yield Problem(place, f"{list(window)} is not a part of the round; expected 0 ≤ start ≤ end ≤ 1")


def _data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if data.source == "folder" and data.path is None:
        yield Problem("data.path", "missing; the source 'folder' needs the path of a local folder")
    if data.source == "digits" and data.path is not None:
        yield Problem("data.path", "means nothing to the embedded digits; name the source of the folder")
    if data.revision is not None and (data.path is not None or not SOURCES[data.source].hub_id):
        yield Problem("data.revision", "is a version on the Hub, and the data come from this machine; leave it out")
    if data.streaming and data.source == "digits":
        yield Problem("data.streaming", "means nothing to the embedded digits, which are in memory")
    if data.streaming and data.train_samples:
        yield Problem(
            "data.train_samples", "a stream has no first rows to keep; set train.steps_per_epoch, or streaming to false"
        )
    by_class = {
        "data.imbalance.kind": data.imbalance.kind is not None,
        "data.sampler": data.sampler != "shuffle",
        "train.loss": recipe.train.loss != "cross_entropy",
    }
    for place, is_set in by_class.items():
        if data.streaming and is_set:
            yield Problem(place, "needs the labels of all images, and a stream's are not known; set streaming to false")
    if data.sampler != "shuffle" and recipe.train.loss != "cross_entropy":
        yield Problem(
            "train.loss", f"{recipe.train.loss} and data.sampler {data.sampler} correct the same imbalance; keep one"
        )
    if data.streaming and data.in_memory:
        yield Problem("data.in_memory", "and streaming exclude each other; keep one of the two")
    yield from _augment(recipe)


def _augment(recipe: Recipe) -> Iterator[Problem]:
    data, augment = recipe.data, recipe.data.augment
    for name in ("scale", "ratio", "rearea"):
        low, high = getattr(augment, name)
        if low > high:
            yield Problem(f"data.augment.{name}", f"[{low}, {high}] begins above its end; the smaller comes first")
    if augment.aug_repeats > recipe.train.global_batch:
        yield Problem(
            "data.augment.aug_repeats",
            f"{augment.aug_repeats} times an image is more than a global batch of {recipe.train.global_batch}",
        )
    if augment.mixes and 1 in (recipe.train.global_batch, recipe.train.batch_per_device):
        yield Problem("data.augment", "MixUp and CutMix mix the images of a device's batch, and it has one; take more")
    if data.in_memory and data.redrawn:
        yield Problem("data.in_memory", f"{data.redrawn[0]} makes another image in each epoch; leave in_memory out")
    if data.in_memory and data.max_corrupt:
        yield Problem("data.in_memory", "and max_corrupt exclude each other: corrupt images are counted while read")


def _model(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    if isinstance(model.pretrained, str) and (not model.pretrained or model.pretrained.lower() in YAML_1_1_BOOLEANS):
        yield Problem(
            "model.pretrained", f"{model.pretrained!r} is not true or false, a tag of timm, a file or a folder"
        )
    if model.pretrained is True and model.name in MODELS and not MODELS[model.name].has_weights:
        having = ", ".join(name for name in MODELS if MODELS[name].has_weights)
        yield Problem(
            "model.pretrained",
            f"{model.name} has no published weights; set it to false or to a file or folder of your own, or use "
            f"{having} or a timm name",
        )
    if model.pretrained and model.start_from:
        yield Problem(
            "model.pretrained", "given together with start_from, which brings all weights; keep one of the two"
        )
    if model.shape_from and (model.start_from or model.pretrained):
        yield Problem(
            "model.shape_from", "is trained from random weights, and start_from or pretrained bring others; keep one"
        )
    if "num_classes" in model.args:
        yield Problem("model.args.num_classes", "follows from the data; leave it out")
    for name, value in {} if model.name.startswith("hf:") else model.args.items():
        place = f"model.args.{name}"
        if value is None:
            yield Problem(place, "has no value, which timm would pass over; a blank follows the colon: {depth: 6}")
        elif "drop" in name and name.endswith("_rate") and isinstance(value, int | float) and not 0 <= value < 1:
            yield Problem(place, f"{value!r} is no share; expected a number of at least 0 and below 1")


def _distill(recipe: Recipe) -> Iterator[Problem]:
    distill, place = recipe.train.distill, "train.distill"
    if distill.teacher == "":
        yield Problem(f"{place}.teacher", "is empty; expected dense, a ticket, a run or a slim folder")
    elif distill.teacher not in (None, "dense") and distill.teacher.lower() == "dense":
        yield Problem(f"{place}.teacher", f"{distill.teacher!r} is not the word dense; did you mean that?")
    elif distill.teacher == "dense" and len(recipe.round_epochs) == 1:
        yield Problem(
            f"{place}.teacher",
            f"dense is the model of round 0, and {recipe.pruning.method_name} trains one round; name a ticket or a run",
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
            way_out = "; dense means the model of its round 0" if field == "train.distill.teacher" else ""
            yield Problem(field, f"{place} lies in this run's own folder; give this run another name (name=…){way_out}")


def _optim(recipe: Recipe) -> Iterator[Problem]:
    optim, train = recipe.optim, recipe.train
    if optim.warmup_epochs >= train.epochs:
        yield Problem(
            "optim.warmup_epochs", f"{optim.warmup_epochs} of {train.epochs} epochs leaves none after the warm-up"
        )
    if isinstance(optim.schedule, StepDecay) and max(optim.schedule.steps, default=0) >= train.epochs:
        yield Problem("optim.schedule.steps", f"{list(optim.schedule.steps)} go past the {train.epochs} epochs")
    if optim.min_lr > optim.lr:
        yield Problem("optim.min_lr", f"{optim.min_lr} is more than lr {optim.lr}")
    if recipe.pruning.rewind == "none" and optim.schedule == "cosine" and optim.min_lr == 0:
        yield Problem(
            "pruning.rewind",
            "none trains later rounds at the rate where the cosine ends, optim.min_lr, which is 0; set it, or use lr",
        )


def _epochs(recipe: Recipe) -> Iterator[Problem]:
    rewind_epoch = recipe.pruning.rewind_epoch
    if rewind_epoch is not None and rewind_epoch >= recipe.train.epochs:
        yield Problem(
            "pruning.rewind", f"epoch {rewind_epoch} is not before the end of round 0 ({recipe.train.epochs} epochs)"
        )
    if rewind_epoch and recipe.model.start_from:
        yield Problem("pruning.rewind", "round 0 is not trained when model.start_from is given; use lr, init or none")
    if recipe.train.recovery_epochs and isinstance(recipe.pruning.method, Imp | Refill | Constant):
        yield Problem("train.recovery_epochs", f"{recipe.pruning.method_name} removes before it trains; leave them out")


def idle_fields(recipe: Recipe) -> Iterator[Problem]:
    """Fields of another value than their default where they have no meaning."""
    for place, section, names, has_meaning, needed in _meanings(recipe):
        for name in names:
            if not has_meaning and getattr(section, name) != getattr(type(section), name):
                yield Problem(f"{place}.{name}", f"means nothing {needed}; set that, or leave it out")


def _meanings(recipe: Recipe) -> Iterator[tuple[str, object, tuple[str, ...], bool, str]]:
    """(place, section, names of fields, whether they mean something here, what they need)."""
    data, augment, optim = recipe.data, recipe.data.augment, recipe.optim
    is_of_files = ("image_column", "label_column", "num_classes", "max_pixels")
    yield "data", data, is_of_files, data.source != "digits", "to the embedded digits; they are for data.source=folder"
    yield "data", data, ("shuffle_buffer",), data.streaming, "without data.streaming"
    imbalance = data.imbalance
    yield "data.imbalance", imbalance, ("ratio",), imbalance.kind is not None, "without kind: long_tail or step"
    for names, has_meaning, needed in (
        (("scale", "ratio"), data.crop == "resized", "without crop: resized"),
        (("padding",), data.crop == "pad", "without crop: pad"),
        (("remode", "rearea", "reaspect"), augment.reprob > 0, "without reprob"),
        (("mixup_prob",), augment.mixes, "without mixup or cutmix"),
        (("mixup_switch_prob",), augment.mixup > 0 and augment.cutmix > 0, "without mixup and cutmix"),
    ):
        yield "data.augment", augment, names, has_meaning, needed
    yield "optim", optim, ("momentum",), optim.name == "sgd", f"to {optim.name}; it is for optim.name=sgd"
    yield "optim", optim, ("betas",), optim.name != "sgd", "to sgd, which has momentum; they are for adam and adamw"
    yield "optim", optim, ("min_lr",), optim.schedule == "cosine", "without optim.schedule=cosine"
    distill = recipe.train.distill
    yield "train.distill", distill, ("weight", "temperature"), distill.teacher is not None, "without a teacher"
    penalty = getattr(recipe.pruning.method, "penalty", None)
    if penalty is not None:
        is_of_ramp = penalty.ramp == "exp_custom_exponents"
        yield "pruning.method.penalty", penalty, ("exponent",), is_of_ramp, "without ramp: exp_custom_exponents"
        shrinks = penalty.coupling == "decoupled"
        yield "pruning.method.penalty", penalty, ("residual",), shrinks, "without coupling: decoupled"
