"""Recipes: the typed tree that fixes one experiment, with names, defaults and bounds of every field.

`recipe_file` reads a recipe from YAML and overrides, `recipe_errors` words what is wrong with it, and the rules that
join several fields stand in `recipe_rules`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from vit_rsst.data.catalog import CATALOG
from vit_rsst.data.options import MAX_PIXELS, Imbalance
from vit_rsst.pruning.methods.constant import Constant
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.patterns import pattern
from vit_rsst.pruning.plan import METHODS
from vit_rsst.training.schedules import SPARSITY_CURVES


def section(cls: type) -> type:
    """A frozen dataclass that pydantic validates without accepting unknown keys, infinity or NaN."""
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}
    return dataclass(frozen=True)(cls)


@section
class Augment:
    """How training images are varied.

    Attributes:
        crop: `pad`: a random place after zero padding; `resized`: a random part, resized; default: by the source.
        padding: px of zeros on each side.
        scale, ratio: of the random part: its share of the area, its width divided by its height.
        hflip: probability of a mirror image; default: by the source.
        auto_augment: timm's configuration of RandAugment, AutoAugment or AugMix.
        color_jitter: strength of brightness, contrast and saturation.
        aug_repeats: how often an image comes in a batch, varied anew each time; an epoch has as many fewer images.
        reprob: probability of erasing a rectangle, `rearea` of the image's area and at least `reaspect` as wide as high
            or as high as wide; filled with `const` zeros, with one normal colour (`rand`) or noise (`pixel`).
        mixup, cutmix: α of the share that an image has in its mixture; 0: not mixed so.
        mixup_prob: probability that a batch is mixed at all.
        mixup_switch_prob: that it is by CutMix, where both are on.
    """

    crop: Literal["pad", "resized"] | None = None
    padding: Annotated[int, Ge(0)] = 4
    scale: tuple[Annotated[float, Gt(0), Le(1)], Annotated[float, Gt(0), Le(1)]] = (0.08, 1.0)
    ratio: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]] = (0.75, 4 / 3)
    hflip: Annotated[float, Ge(0), Le(1)] | None = None
    auto_augment: str | None = None
    color_jitter: Annotated[float, Ge(0), Le(1)] = 0.0
    aug_repeats: Annotated[int, Ge(1)] = 1
    reprob: Annotated[float, Ge(0), Le(1)] = 0.0
    remode: Literal["const", "rand", "pixel"] = "pixel"
    rearea: tuple[Annotated[float, Gt(0), Le(0.8)], Annotated[float, Gt(0), Le(0.8)]] = (0.02, 1 / 3)
    reaspect: Annotated[float, Ge(0.05), Le(1)] = 0.3
    mixup: Annotated[float, Ge(0)] = 0.0
    cutmix: Annotated[float, Ge(0)] = 0.0
    mixup_prob: Annotated[float, Gt(0), Le(1)] = 1.0
    mixup_switch_prob: Annotated[float, Ge(0), Le(1)] = 0.5

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@section
class Data:
    """What to train on, and how it is read.

    Attributes:
        crop_pct: share of the shorter side that validation and test see, the middle; default: by the source.
        interpolation: how images are resized; default: by the source.
        num_classes: where labels are plain numbers, as in tars.
        streaming: read shards row after row, without a copy in the cache.
        shuffle_buffer: images that a stream is mixed with; encoded, in the memory of each process.
        in_memory: keep decoded images; default: where they are small and do not differ from epoch to epoch.
        workers: processes that decode, for each training process; default: by the machine.
        max_corrupt: share of images that may be corrupt; they are left out and counted.
        max_pixels: an image of more is corrupt, whatever its file's size.
        sampler: `class_balanced` draws with replacement, each class as often as any other.
    """

    source: str = "digits"
    path: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: Annotated[int, Ge(8)] | None = None
    crop_pct: Annotated[float, Ge(0.1), Le(1)] | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    val_fraction: Annotated[float, Gt(0), Lt(1)] | None = None
    test_fraction: Annotated[float, Gt(0), Lt(1)] | None = None
    train_samples: Annotated[int, Ge(1)] | None = None
    num_classes: Annotated[int, Ge(2)] | None = None
    streaming: bool = False
    shuffle_buffer: Annotated[int, Ge(1)] = 4096
    in_memory: bool | None = None
    workers: Annotated[int, Ge(0)] | None = None
    max_corrupt: Annotated[float, Ge(0), Lt(1)] = 0.0
    max_pixels: Annotated[int, Ge(64)] = MAX_PIXELS
    imbalance: Imbalance = field(default_factory=Imbalance)
    sampler: Literal["shuffle", "class_balanced"] = "shuffle"
    augment: Augment = field(default_factory=Augment)

    @property
    def crop(self) -> str:
        """How training images are cropped, here or by the source's habit."""
        return self.augment.crop or CATALOG[self.source].crop

    @property
    def redrawn(self) -> list[str]:
        """What makes each look at an image another one while it is decoded, so that decoded images cannot be kept."""
        settings = {
            "crop: resized": self.crop == "resized",
            "auto_augment": self.augment.auto_augment is not None,
            "color_jitter": self.augment.color_jitter > 0,
        }
        return [name for name, is_set in settings.items() if is_set]


@section
class Model:
    """Which network: a catalogue name or any of timm's, with timm's own arguments; `hf:` names one of transformers.

    Attributes:
        pretrained: weights to begin with: true for the published ones, else a tag of timm's, a safetensors file, or a
            folder of timm or transformers with `model.safetensors`.
        start_from: ticket, run or slim folder whose weights and mask the run begins with, instead of a dense round.
        shape_from: ticket, run or slim folder whose slim shape is trained from random weights: the control of a
            structured pruning (Liu et al. 2019).
    """

    name: str = "vit_tiny"
    pretrained: bool | str = False
    args: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    shape_from: str | None = None


@section
class StepDecay:
    """Times `gamma` at each of these epochs."""

    steps: tuple[Annotated[float, Gt(0)], ...]
    gamma: Annotated[float, Gt(0), Lt(1)] = 0.1


@section
class Optim:
    """The optimizer and its learning rate over a round.

    Attributes:
        layer_decay: factor of the learning rate from each layer to the one before it; 1: all layers have the same.
    """

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 0.05
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    warmup_epochs: Annotated[float, Ge(0)] = 0.0
    min_lr: Annotated[float, Ge(0)] = 0.0
    schedule: Literal["cosine", "constant"] | StepDecay = "cosine"
    clip_grad_norm: Annotated[float, Gt(0)] | None = 1.0
    layer_decay: Annotated[float, Gt(0), Le(1)] = 1.0


@section
class Distill:
    """A teacher's answers as a second target (Hinton et al. 2015).

    Attributes:
        teacher: `dense`: the ticket of this run's round 0, for the later rounds; or a ticket, run or slim folder.
        weight: share of the teacher in the loss.
        temperature: that divides both logits; its square multiplies the teacher's part.
    """

    teacher: str | None = None
    weight: Annotated[float, Gt(0), Le(1)] = 0.5
    temperature: Annotated[float, Gt(0)] = 2.0


@section
class Train:
    """How long, in which batches, in which precision, towards what.

    Attributes:
        loss: `class_weighted`: the rarer a class, the more its images count; `balanced_softmax`: the logarithm of each
            class's number of images is added to its logit in training (Ren et al. 2020).
        ema_decay: of the moving average of the weights, which is what is evaluated and what tickets hold.
        patience: a round ends after so many epochs without a better val/top1, once nothing is to be removed any more.
        keep_best: a round ends with the weights of its best epoch since the last removal.
    """

    epochs: Annotated[int, Ge(1)] = 100
    round_epochs: Annotated[int, Ge(1)] | None = None
    recovery_epochs: Annotated[int, Ge(0)] = 0
    global_batch: Annotated[int, Ge(1)] = 256
    batch_per_device: Annotated[int, Ge(1)] | None = None
    precision: Literal["no", "bf16"] = "no"
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    loss: Literal["cross_entropy", "class_weighted", "balanced_softmax"] = "cross_entropy"
    distill: Distill = field(default_factory=Distill)
    ema_decay: Annotated[float, Gt(0), Lt(1)] | None = None
    patience: Annotated[int, Ge(1)] | None = None
    keep_best: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    steps_per_epoch: Annotated[int, Ge(1)] | None = None
    max_skipped_steps: Annotated[int, Ge(0)] = 0
    max_minutes: Annotated[float, Gt(0)] | None = None
    rank_timeout: Annotated[float, Ge(1)] = 60.0
    log_every_steps: Annotated[int, Ge(1)] = 50
    save_every_steps: Annotated[int, Ge(1)] | None = None
    keep_resume_points: Annotated[int, Ge(1)] = 2


Share = Annotated[float, Gt(0), Lt(1)]
ByKind = dict[Literal["head", "neuron"], Share]


@section
class Schedule:
    """Sparsity over the rounds: a curve to a final sparsity, a rate of what remains, a list, or a budget.

    Attributes:
        rounds: prune events, each followed by training; round 0, dense, comes on top; 0 for dense alone.
        final_sparsity: of the prunable weights, after the last round; also by kind, `{head: 0.5, neuron: 0.7}`.
        rate: share of the remaining that each round removes; geometric only; also by kind.
        sparsities: of each round, rising; `explicit` only.
        budget: instead, the share of the whole model's FLOPs or parameters that the slim model may have, such as
            `{flops: 0.5}`; granularities of units.
    """

    name: Literal["geometric", "cubic", "linear", "explicit"] = "geometric"
    rounds: Annotated[int, Ge(0)] | None = None
    final_sparsity: Share | ByKind | None = None
    rate: Share | ByKind | None = None
    sparsities: tuple[Share, ...] | None = None
    budget: dict[Literal["flops", "params"], Share] | None = None

    @property
    def num_rounds(self) -> int:
        return len(self.sparsities) if self.sparsities else 10 if self.rounds is None else self.rounds

    @property
    def final(self) -> float | dict[str, float]:
        """Sparsity after the last round. A budget's is known with the model alone, which puts it here."""
        if self.sparsities:
            return self.sparsities[-1]
        if self.rate is not None:
            return _each(self.rate, lambda rate: 1.0 - (1.0 - rate) ** self.num_rounds)
        return 0.9 if self.final_sparsity is None else self.final_sparsity

    def density(self, fraction: float) -> float | dict[str, float]:
        """Density asked after a fraction (0 … 1) of the rounds, or of the steps of a method of one round."""
        if self.sparsities:
            done = round(fraction * self.num_rounds)
            sparsity = self.sparsities[done - 1] if done else 0.0
        else:
            sparsity = _each(self.final, lambda final: SPARSITY_CURVES[self.name](fraction, final))
        return _each(sparsity, lambda value: round(1.0 - value, 12))  # 0.1, not 0.09999999999999998


def _each(value: float | Mapping[str, float], function: Callable[[float], float]) -> float | dict[str, float]:
    return {k: function(v) for k, v in value.items()} if isinstance(value, Mapping) else function(value)


@section
class Pruning:
    """What is pruned, how much, by which method.

    Attributes:
        granularity: element, head, neuron, head+neuron, channel or N:M, such as 2:4 along the input dimension.
        criterion: scores; default: the method's.
        scope: where units compete; default: isomorphic for head+neuron, else global; N:M has none.
        depth_ramp: scope layer: sparsity of the first and of the last block, relative to the mean.
        layer_sparsity: glob of layers → their own final sparsity.
        max_layer_sparsity: what no layer's sparsity exceeds.
        min_neurons: how many every MLP keeps.
        calibration_images: of the training split, balanced over classes, for criteria that look at activations.
        rewind: where a round starts; default: the method's.
    """

    method: Any = field(default_factory=Rsst)
    criterion: str | None = None
    granularity: str = "element"
    scope: Literal["global", "layer", "isomorphic", "erk"] | None = None
    depth_ramp: tuple[Annotated[float, Ge(0)], Annotated[float, Ge(0)]] | None = None
    layer_sparsity: dict[str, Annotated[float, Ge(0), Lt(1)]] = field(default_factory=dict)
    max_layer_sparsity: Annotated[float, Gt(0), Le(1)] = 0.99
    min_neurons: Annotated[int, Ge(1)] = 8
    calibration_images: Annotated[int, Ge(0)] = 2048
    schedule: Schedule = field(default_factory=Schedule)
    rewind: Annotated[str, Field(pattern=r"^(init|lr|none|epoch:[0-9]+)$")] | None = None
    include: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Fills in what follows from method and granularity, so that the saved recipe is complete."""
        windows = pattern(self.granularity)
        scope = "isomorphic" if self.granularity == "head+neuron" else None if windows else "global"
        derived = {
            "criterion": self.criterion or getattr(type(self.method), "default_criterion", "magnitude"),
            "rewind": self.rewind or getattr(type(self.method), "default_rewind", "lr"),
            "scope": self.scope or scope,
        }
        if windows:
            derived["schedule"] = _window_schedule(self.schedule, *windows)
        for key, value in derived.items():
            object.__setattr__(self, key, value)

    @property
    def method_name(self) -> str:
        return next(name for name in METHODS if METHODS[name] is type(self.method))

    @property
    def rewind_epoch(self) -> int | None:
        """Epochs of round 0 after which the rewind point is taken; None without one."""
        if self.rewind == "init":
            return 0
        return int(self.rewind.split(":")[1]) if self.rewind.startswith("epoch:") else None


def _window_schedule(schedule: Schedule, kept: int, window: int) -> Schedule:
    """N:M fixes its own density: rounds step N down from M − 1."""
    if kept >= window:  # a rule refuses it
        return schedule
    name = "linear" if schedule.name == "geometric" else schedule.name
    final = 1.0 - kept / window if schedule.final_sparsity is None else schedule.final_sparsity
    return replace(
        schedule, name=name, rounds=window - kept if schedule.rounds is None else schedule.rounds, final_sparsity=final
    )


@section
class Tracking:
    """Where metrics go beside metrics.jsonl.

    Attributes:
        figures: draw figures and a report into the run folder, where matplotlib is installed.
    """

    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(alias="with")] = ()
    project: str = "vit_rsst"
    figures: bool = True


@section
class Recipe:
    """One experiment, independent of the machine."""

    name: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]+$")]
    seed: Annotated[int, Ge(0)] = 0
    output_dir: str = "runs"
    plugins: tuple[str, ...] = ()
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    pruning: Pruning = field(default_factory=Pruning)
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir).expanduser() / self.name

    @property
    def round_epochs(self) -> tuple[int, ...]:
        """Epochs of each round; a method of one round gets those of all together, so that budgets are equal."""
        if isinstance(self.pruning.method, Constant):
            return (self.train.epochs,)
        later = self.train.round_epochs or self.train.epochs
        epochs = [0 if self.model.start_from else self.train.epochs]
        epochs += [later] * (self.pruning.schedule.num_rounds + getattr(self.pruning.method, "extra_rounds", 0))
        if self.train.recovery_epochs:
            epochs.append(self.train.recovery_epochs)
        return (sum(epochs),) if self.pruning.method.one_round else tuple(epochs)

    def tree(self) -> dict:
        """The complete recipe as plain data, as `recipe.yaml` and the hash see it."""
        tree = json.loads(json.dumps(asdict(self)))
        tree["pruning"]["method"] = {"name": self.pruning.method_name, **tree["pruning"]["method"]}
        tree["tracking"]["with"] = tree["tracking"].pop("trackers")
        return tree

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over all that decides the result; not where it is written or tracked.

        What is null is left out: an optional field of a later version changes no fingerprint.
        """
        given = {key: value for key, value in deciding(self.tree()).items() if value is not None}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


FREE_FIELDS = (
    "name",
    "output_dir",
    "tracking",
    "data.in_memory",
    "data.workers",
    "train.max_minutes",
    "train.rank_timeout",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_resume_points",
)
"""Fields that may change between a run and its resumption: they decide nothing."""


def deciding(tree: dict) -> dict[str, Any]:
    """The fields that decide a result, flat: dotted path → value."""
    flat = {}

    def walk(prefix: str, value: Any) -> None:
        if prefix in FREE_FIELDS:
            return
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{prefix}.{key}" if prefix else key, child)
        else:
            flat[prefix] = value

    walk("", tree)
    return flat
