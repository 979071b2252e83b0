"""The recipe: a typed tree that defines one experiment, with the default and the bounds of every field.

`loading` reads it from YAML and overrides, `sentences` words the errors, `rules` checks fields against each other.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from vit_rsst.data.options import Images
from vit_rsst.pruning.methods import METHODS
from vit_rsst.pruning.patterns import pattern
from vit_rsst.pruning.plan import RAMPS_OF_0_1
from vit_rsst.training.schedules import SPARSITY_CURVES


def section(cls: type) -> type:
    """A frozen dataclass; pydantic rejects unknown keys, infinity and NaN."""
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}
    return dataclass(frozen=True)(cls)


@section
class Augment:
    """How training images are varied.

    Attributes:
        crop: `pad`: random crop after zero padding; `resized`: random resized crop; default: that of the source.
        padding: zeros on each side, in px.
        scale, ratio: of the random resized crop: share of the image area, aspect ratio.
        hflip: probability of a horizontal flip; default: that of the source.
        auto_augment: timm's configuration string for RandAugment, AutoAugment or AugMix.
        color_jitter: strength of brightness, contrast and saturation.
        aug_repeats: repeats of an image within a batch, each augmented differently; an epoch covers fewer images.
        reprob: probability of erasing a rectangle: `rearea` is its share of the image, `reaspect` its smallest aspect
            ratio; `remode` fills it with zeros (`const`), one random colour (`rand`) or noise (`pixel`).
        mixup, cutmix: α of the Beta distribution of the mixing ratio; 0: off.
        mixup_prob: probability that a batch is mixed.
        mixup_switch_prob: probability of CutMix when both are on.
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
class Data(Images):
    """What to train on, and how it is read.

    Attributes:
        shuffle_buffer: encoded images a stream is shuffled with, over all processes; at least two row groups per lane.
        lanes: equal parts of a stream's epoch, read by one process each; default: by the data, at most 64.
        in_memory: keep decoded images; default: if they are small and the same in every epoch.
        workers: decoding processes per training process; default: depends on the machine.
        sampler: `class_balanced` draws with replacement, all classes equally often.
    """

    source: str = "digits"
    interpolation: Literal["bilinear", "bicubic"] | None = None
    shuffle_buffer: Annotated[int, Ge(1)] = 4096
    lanes: Annotated[int, Ge(1)] | None = None
    in_memory: bool | None = None
    workers: Annotated[int, Ge(0)] | None = None
    sampler: Literal["shuffle", "class_balanced"] = "shuffle"
    augment: Augment = field(default_factory=Augment)

    @property
    def crop(self) -> str:
        """How training images are cropped: as set here, or as usual for the source."""
        return self.augment.crop or self.info.crop

    @property
    def redrawn(self) -> list[str]:
        """Random augmentations applied during decoding, with which decoded images cannot be kept in memory."""
        settings = {
            "crop: resized": self.crop == "resized",
            "auto_augment": self.augment.auto_augment is not None,
            "color_jitter": self.augment.color_jitter > 0,
        }
        return [name for name, is_set in settings.items() if is_set]


@section
class Model:
    """The network: a name of the catalogue or of timm, with timm's arguments, or `hf:NAME` of transformers.

    Attributes:
        pretrained: initial weights: true for the published ones, or a timm tag, a safetensors file, or a folder of
            timm or transformers with `model.safetensors`.
        start_from: ticket, run or slim folder that provides the initial weights and mask, in place of a dense round.
        shape_from: ticket, run or slim folder whose slim shape is trained from random weights: the control for
            structured pruning (Liu et al. 2019).
    """

    name: str = "vit_tiny"
    pretrained: bool | str = False
    args: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    shape_from: str | None = None


@section
class StepDecay:
    """Multiplies the learning rate by `gamma` at each of these epochs."""

    steps: tuple[Annotated[float, Gt(0)], ...]
    gamma: Annotated[float, Gt(0), Lt(1)] = 0.1


@section
class Optim:
    """The optimizer and its learning rate schedule within a round.

    Attributes:
        layer_decay: learning rate of a layer relative to the layer above it; 1: the same for all layers.
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
    """Knowledge distillation: the teacher's predictions as a second target (Hinton et al. 2015).

    Attributes:
        teacher: `dense`: this run's round 0 teaches the later rounds; or a ticket, run or slim folder.
        weight: the teacher's share of the loss.
        temperature: divides the logits of both; the teacher's part is multiplied by its square.
    """

    teacher: str | None = None
    weight: Annotated[float, Gt(0), Le(1)] = 0.5
    temperature: Annotated[float, Gt(0)] = 2.0


@section
class Train:
    """Epochs, batches, precision, loss and limits.

    Attributes:
        precision: `no`: fp32 throughout; `tf32`: fp32 with products in TF32 on GPUs; `bf16`: autocast.
        compile: the mode of `torch.compile`, block by block; true is `default`.
        deterministic: algorithms that give the same bits each time, on a GPU too; slower.
        loss: `class_weighted`: images of rare classes weigh more; `balanced_softmax`: the log of each class's image
            count is added to its logit during training (Ren et al. 2020).
        ema_decay: of the moving average of the weights, which is evaluated and saved in tickets.
        patience: end a round after this many epochs without a better val/top1, once all removals are done.
        keep_best: end a round with the weights of its best epoch since the last removal.
    """

    epochs: Annotated[int, Ge(1)] = 100
    round_epochs: Annotated[int, Ge(1)] | None = None
    recovery_epochs: Annotated[int, Ge(0)] = 0
    global_batch: Annotated[int, Ge(1)] = 256
    batch_per_device: Annotated[int, Ge(1)] | None = None
    precision: Literal["no", "tf32", "bf16"] = "no"
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    loss: Literal["cross_entropy", "class_weighted", "balanced_softmax"] = "cross_entropy"
    distill: Distill = field(default_factory=Distill)
    ema_decay: Annotated[float, Gt(0), Lt(1)] | None = None
    patience: Annotated[int, Ge(1)] | None = None
    keep_best: bool = False
    compile: bool | Literal["default", "reduce-overhead", "max-autotune"] = False
    deterministic: bool | None = None
    grad_checkpointing: bool = False
    steps_per_epoch: Annotated[int, Ge(1)] | None = None
    max_skipped_steps: Annotated[int, Ge(0)] = 0
    max_minutes: Annotated[float, Gt(0)] | None = None
    rank_timeout: Annotated[float, Ge(1)] = 600.0
    log_every_steps: Annotated[int, Ge(1)] = 50
    save_every_steps: Annotated[int, Ge(1)] | None = None
    keep_resume_points: Annotated[int, Ge(1)] = 2

    def __post_init__(self) -> None:
        """Gives what has two spellings one, so that the fingerprint does not depend on them."""
        if self.compile == "default":
            object.__setattr__(self, "compile", True)
        if self.deterministic is False:
            object.__setattr__(self, "deterministic", None)

    @property
    def mixed_precision(self) -> str:
        """In Accelerate's terms."""
        return "bf16" if self.precision == "bf16" else "no"


ROUNDS = 10
"""Of a schedule that does not say."""

Share = Annotated[float, Gt(0), Lt(1)]
ByKind = dict[Literal["head", "neuron"], Share]


@section
class Schedule:
    """Sparsity over the rounds: a curve up to a final sparsity, a rate per round, an explicit list, or a budget.

    Attributes:
        rounds: pruning rounds, each followed by training, after the dense round 0; 0 only if nothing is pruned.
        final_sparsity: of the prunable weights after the last round; or per kind, `{head: 0.5, neuron: 0.7}`.
        rate: share of the remaining weights removed per round; geometric only; or per kind.
        sparsities: of each round, increasing; `explicit` only.
        budget: instead of a sparsity, the share of the model's FLOPs or parameters left in the slim model, such as
            `{flops: 0.5}`; only for granularities of units.
    """

    name: Literal["geometric", "cubic", "linear", "explicit"] = "geometric"
    rounds: Annotated[int, Ge(0)] | None = None
    final_sparsity: Share | ByKind | None = None
    rate: Share | ByKind | None = None
    sparsities: tuple[Share, ...] | None = None
    budget: dict[Literal["flops", "params"], Share] | None = None

    @property
    def num_rounds(self) -> int:
        return len(self.sparsities) if self.sparsities else ROUNDS if self.rounds is None else self.rounds

    @property
    def final(self) -> float | dict[str, float]:
        """Sparsity after the last round; that of a budget depends on the model and is filled in later."""
        if self.sparsities:
            return self.sparsities[-1]
        if self.rate is not None:
            return _each(self.rate, lambda rate: 1.0 - (1.0 - rate) ** self.num_rounds)
        return 0.9 if self.final_sparsity is None else self.final_sparsity

    def density(self, fraction: float) -> float | dict[str, float]:
        """Target density after a fraction (0 … 1) of the rounds, or of the steps of a single-round method."""
        if self.sparsities:
            done = round(fraction * self.num_rounds)
            sparsity = self.sparsities[done - 1] if done else 0.0
        else:
            sparsity = _each(self.final, lambda final: SPARSITY_CURVES[self.name](fraction, final))
        return _each(sparsity, lambda value: round(1.0 - value, 12))  # 0.1, not 0.09999999999999998


def _each(value: float | Mapping[str, float], function: Callable[[float], float]) -> float | dict[str, float]:
    return {k: function(v) for k, v in value.items()} if isinstance(value, Mapping) else function(value)


DEFAULT_METHOD = "rsst"
"""The one method that is named outside of its file: what a recipe without `pruning.method` trains by."""


@section
class Pruning:
    """What is pruned, how far, and by which method.

    Attributes:
        granularity: element, head, neuron, head+neuron, channel or N:M, such as 2:4 along the input dimension.
        criterion: how weights or units are scored; default: that of the method.
        scope: which units compete; default: isomorphic for head+neuron, none for N:M, otherwise global, or for element
            that of the method.
        depth_ramp: with scope layer, sparsity of the first and the last block relative to the mean.
        layer_sparsity: glob of layers → final sparsity of those layers.
        max_layer_sparsity: upper bound of every layer.
        min_neurons: neurons kept in every MLP.
        compensate: what becomes of the weights that stay when others leave: least_squares fits them to what their
            layer computed before, on the calibration images; default: none.
        calibration_images: class-balanced training images, for criteria that need activations or gradients, and for
            compensation.
        rewind: weights and learning rate that a round starts from; default: that of the method.
    """

    method: Any = field(default_factory=lambda: METHODS[DEFAULT_METHOD]())
    criterion: str | None = None
    granularity: str = "element"
    scope: Literal["global", "layer", "isomorphic", "erk"] | None = None
    depth_ramp: tuple[Annotated[float, Ge(0)], Annotated[float, Ge(0)]] | None = None
    layer_sparsity: dict[str, Annotated[float, Ge(0), Lt(1)]] = field(default_factory=dict)
    max_layer_sparsity: Annotated[float, Gt(0), Le(1)] = 0.99
    min_neurons: Annotated[int, Ge(1)] = 8
    compensate: Literal["none", "least_squares"] | None = None
    calibration_images: Annotated[int, Ge(0)] = 2048
    schedule: Schedule = field(default_factory=Schedule)
    rewind: Annotated[str, Field(pattern=r"^(init|lr|none|epoch:[0-9]+)$")] | None = None
    include: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Fills in the defaults of method and granularity, so that the saved recipe is complete."""
        schedule = self.schedule
        if not self.method.prunes and schedule == Schedule():  # rounds count as a control's budget only if named
            schedule = replace(schedule, rounds=0)
        n_of_m = pattern(self.granularity)
        scope = "isomorphic" if self.granularity == "head+neuron" else "global"
        if self.granularity == "element":
            scope = self.method.default_scope or scope
        derived = {
            "criterion": self.criterion or self.method.default_criterion,
            "rewind": self.rewind or self.method.default_rewind,
            "scope": self.scope or (None if n_of_m else scope),
            "compensate": None if self.compensate == "none" else self.compensate,
            "schedule": _n_of_m_schedule(schedule, *n_of_m) if n_of_m else schedule,
        }
        for key, value in derived.items():
            object.__setattr__(self, key, value)

    @property
    def method_name(self) -> str:
        return next(name for name in METHODS if METHODS[name] is type(self.method))

    @property
    def rewind_epoch(self) -> int | None:
        """Epoch of round 0 whose weights are the rewind point; None: no rewind point."""
        if self.method.one_round:
            return None
        if self.rewind == "init":
            return 0
        return int(self.rewind.split(":")[1]) if self.rewind.startswith("epoch:") else None


def _n_of_m_schedule(schedule: Schedule, n: int, m: int) -> Schedule:
    """N:M implies its density: each round lowers N by one, from M − 1."""
    if n >= m:  # rejected by a rule
        return schedule
    name = "linear" if schedule.name == "geometric" else schedule.name
    final = 1.0 - n / m if schedule.final_sparsity is None else schedule.final_sparsity
    return replace(
        schedule, name=name, rounds=m - n if schedule.rounds is None else schedule.rounds, final_sparsity=final
    )


@section
class Tracking:
    """Trackers in addition to metrics.jsonl.

    Attributes:
        figures: draw figures and a report into the run folder, if matplotlib is installed.
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
        """Epochs of each round; a single-round method gets the sum, so that budgets are equal."""
        method, rounds = self.pruning.method, self.pruning.schedule.num_rounds
        if method.keeps_start:
            return (self.train.epochs,)
        later = self.train.round_epochs or self.train.epochs
        epochs = [0 if self.model.start_from and rounds else self.train.epochs]
        epochs += [later] * (rounds + method.extra_rounds)
        if self.train.recovery_epochs:
            epochs.append(self.train.recovery_epochs)
        return (sum(epochs),) if method.one_round else tuple(epochs)

    def setting(self, path: str) -> Any:
        """A field of the tree by its dotted name, such as `pruning.rewind`."""
        node: Any = self.tree()
        for key in path.split("."):
            node = node[key]
        return node

    def tree(self) -> dict:
        """The complete recipe as plain data, as saved in `recipe.yaml` and hashed."""
        tree = json.loads(json.dumps(asdict(self)))
        tree["pruning"]["method"] = {"name": self.pruning.method_name, **tree["pruning"]["method"]}
        tree["tracking"]["with"] = tree["tracking"].pop("trackers")
        return tree

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over every field that affects the result.

        Null fields are excluded: an optional field of a later version changes no fingerprint.
        """
        return fingerprint(deciding(self.tree()))


FREE_FIELDS = (
    "name",
    "output_dir",
    "tracking",
    "data.path",
    "data.in_memory",
    "data.workers",
    "data.max_corrupt",
    "train.batch_per_device",
    "train.max_minutes",
    "train.max_skipped_steps",
    "train.rank_timeout",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_resume_points",
)
"""Fields that do not affect the result and may change when a run is resumed; data are identified by their content.

A tolerance is one of them: it decides whether a run stops, and no number before that.
"""

_NEW_FREE_FIELDS = ("data.path", "data.max_corrupt", "train.batch_per_device", "train.max_skipped_steps")
FREE_FIELDS_OF_0_1 = tuple(name for name in FREE_FIELDS if name not in _NEW_FREE_FIELDS)
"""Those of version 0.1, whose resume points have fingerprints without the others."""


def deciding(tree: Mapping) -> dict[str, Any]:
    """The fields that affect the result, flattened: dotted path → value; one spelling for what means the same."""
    fields = _flat(tree, FREE_FIELDS)
    for option, value in RAMPS_OF_0_1.get(str(fields.get("pruning.method.penalty.ramp")), {}).items():
        fields[f"pruning.method.penalty.{option}"] = value
    name = fields.get("pruning.method.name")
    if "pruning.rewind" in fields and name in METHODS and METHODS[name].one_round:  # not used; version 0.1 took any
        fields["pruning.rewind"] = METHODS[name].default_rewind
    if fields.get("pruning.schedule.rounds") is None and not fields.get("pruning.schedule.sparsities"):
        fields["pruning.schedule.rounds"] = ROUNDS
    return fields


def fingerprint(fields: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of a recipe's deciding fields; null ones do not count."""
    given = {key: value for key, value in fields.items() if value is not None}
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_of_0_1(tree: Mapping) -> str:
    """What version 0.1 wrote into the resume points of a run whose folder has this recipe."""
    return fingerprint(_flat(tree, FREE_FIELDS_OF_0_1))


def _flat(tree: Mapping, without: Sequence[str]) -> dict[str, Any]:
    """Dotted path → value, less the fields named and what is in them."""
    flat = {}

    def walk(prefix: str, value: Any) -> None:
        if prefix in without:
            return
        if isinstance(value, Mapping):
            for key, child in value.items():
                walk(f"{prefix}.{key}" if prefix else key, child)
        else:
            flat[prefix] = value

    walk("", tree)
    return flat
