"""Recipes: the typed tree that fixes one experiment, and the way from a YAML file and overrides to it.

Dataclasses hold names, defaults and bounds; `load` collects every error of a file at once, with its place and a
suggestion, before anything heavy is imported. Rules that join several fields stand in `recipe_rules`.
"""

import difflib
import hashlib
import importlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, TypeAdapter, ValidationError

import vit_rsst.pruning.methods  # noqa: F401 - registers the methods
from vit_rsst import strict_yaml
from vit_rsst.data.catalog import CATALOG as SOURCES
from vit_rsst.errors import InputError, unknown
from vit_rsst.pruning.criteria import CRITERIA
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import METHODS, Method
from vit_rsst.schedules import SPARSITY_CURVES


def section(cls: type) -> type:
    """A frozen dataclass that pydantic validates without accepting unknown keys."""
    cls.__pydantic_config__ = {"extra": "forbid"}
    return dataclass(frozen=True)(cls)


@section
class Augment:
    """Random crop after zero padding by `padding` px; flip with probability `hflip` (default: by the source)."""

    padding: Annotated[int, Ge(0)] = 4
    hflip: Annotated[float, Ge(0), Le(1)] | None = None


@section
class Data:
    """What to train on."""

    source: str = "digits"
    path: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: Annotated[int, Ge(8)] | None = None
    val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    test_fraction: Annotated[float, Gt(0), Lt(1)] | None = None
    train_samples: Annotated[int, Ge(1)] | None = None
    augment: Augment = field(default_factory=Augment)


@section
class Model:
    """Which network: a catalogue name or any of timm's, with timm's own arguments."""

    name: str = "vit_tiny"
    pretrained: bool = False
    args: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None


@section
class StepDecay:
    """Times `gamma` at each of these epochs."""

    steps: tuple[Annotated[float, Gt(0)], ...]
    gamma: Annotated[float, Gt(0), Lt(1)] = 0.1


@section
class Optim:
    """The optimizer and its learning rate over a round."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 0.05
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    warmup_epochs: Annotated[float, Ge(0)] = 0.0
    min_lr: Annotated[float, Ge(0)] = 0.0
    schedule: Literal["cosine", "constant"] | StepDecay = "cosine"
    clip_grad_norm: Annotated[float, Gt(0)] | None = 1.0


@section
class Train:
    """How long, in which batches, in which precision."""

    epochs: Annotated[int, Ge(1)] = 100
    round_epochs: Annotated[int, Ge(1)] | None = None
    recovery_epochs: Annotated[int, Ge(0)] = 0
    global_batch: Annotated[int, Ge(1)] = 256
    batch_per_device: Annotated[int, Ge(1)] | None = None
    precision: Literal["no", "bf16"] = "no"
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    compile: bool = False
    steps_per_epoch: Annotated[int, Ge(1)] | None = None
    max_skipped_steps: Annotated[int, Ge(0)] = 0
    log_every_steps: Annotated[int, Ge(1)] = 50
    save_every_steps: Annotated[int, Ge(1)] | None = None
    keep_resume_points: Annotated[int, Ge(1)] = 2


@section
class Schedule:
    """Sparsity over the rounds: a curve to a final sparsity, a rate of what remains, or a list.

    Attributes:
        rounds: prune events, each followed by training; round 0, dense, comes on top.
        final_sparsity: of the prunable weights, after the last round.
        rate: share of the remaining that each round removes; geometric only.
        sparsities: of each round, rising; `explicit` only.
    """

    name: Literal["geometric", "cubic", "linear", "explicit"] = "geometric"
    rounds: Annotated[int, Ge(1)] | None = None
    final_sparsity: Annotated[float, Gt(0), Lt(1)] | None = None
    rate: Annotated[float, Gt(0), Lt(1)] | None = None
    sparsities: tuple[Annotated[float, Gt(0), Lt(1)], ...] | None = None

    @property
    def num_rounds(self) -> int:
        return len(self.sparsities) if self.sparsities else self.rounds or 10

    @property
    def final(self) -> float:
        """Sparsity after the last round."""
        if self.sparsities:
            return self.sparsities[-1]
        if self.rate is not None:
            return 1.0 - (1.0 - self.rate) ** self.num_rounds
        return 0.9 if self.final_sparsity is None else self.final_sparsity

    def density(self, fraction: float) -> float:
        """Density asked after a fraction (0 … 1) of the rounds, or of the steps of a method of one round."""
        if self.sparsities:
            done = round(fraction * self.num_rounds)
            sparsity = self.sparsities[done - 1] if done else 0.0
        else:
            sparsity = SPARSITY_CURVES[self.name](fraction, self.final)
        return round(1.0 - sparsity, 12)  # 0.1, not 0.09999999999999998


@section
class Pruning:
    """What is pruned, how much, by which method."""

    method: Any = field(default_factory=Rsst)
    criterion: str = "magnitude"
    granularity: Literal["element"] = "element"
    scope: Literal["global", "layer"] = "global"
    schedule: Schedule = field(default_factory=Schedule)
    rewind: Annotated[str, Field(pattern=r"^(init|lr|none|epoch:[0-9]+)$")] = "lr"
    include: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()

    @property
    def method_name(self) -> str:
        return next(name for name in METHODS if METHODS[name] is type(self.method))

    @property
    def rewind_epoch(self) -> int | None:
        """Epochs of round 0 after which the rewind point is taken; None without one."""
        if self.rewind == "init":
            return 0
        return int(self.rewind.split(":")[1]) if self.rewind.startswith("epoch:") else None


@section
class Tracking:
    """Where metrics go beside metrics.jsonl."""

    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(alias="with")] = ()
    project: str = "vit_rsst"


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
        later = self.train.round_epochs or self.train.epochs
        epochs = [0 if self.model.start_from else self.train.epochs]
        epochs += [later] * self.pruning.schedule.num_rounds
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
        """16 hexadecimal digits over all that decides the result; not where it is written or tracked."""
        return hashlib.sha256(json.dumps(deciding(self.tree()), sort_keys=True).encode()).hexdigest()[:16]


FREE_FIELDS = (
    "name",
    "output_dir",
    "tracking",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_resume_points",
)
"""Fields that may change between a run and its resumption: they decide nothing."""

SHORTHANDS = (("pruning", "method"), ("pruning", "schedule"))
"""Where `key: NAME` is short for `key: {name: NAME}`."""

AUGMENT_PRESETS = {"none": {"padding": 0, "hflip": 0.0}, "plain": {}}


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


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: dotted path and sentence."""

    path: str
    sentence: str


class Source:
    """A recipe's raw tree, and where each of its keys was given."""

    def __init__(self, file: Path, overrides: Sequence[str]):
        self.file = file
        try:
            self.document = strict_yaml.parse(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
        self.problems = [Problem(".".join(path), sentence) for path, _, sentence in self.document.problems]
        self._problem_lines = {(".".join(p), s): line for p, line, s in self.document.problems}
        self.overridden: dict[str, str] = {}
        for item in overrides:
            self._override(item)
        self.tree = _spelled_out(self.document.tree)

    def _override(self, item: str) -> None:
        key, equals, text = item.partition("=")
        if not equals or not key or not all(key.split(".")):
            self.overridden[item] = item
            self.problems.append(Problem(item, "expected key=value, such as train.epochs=60"))
            return
        self.overridden[key] = item
        try:
            value = strict_yaml.parse_scalar(text)
        except ValueError as error:
            self.problems.append(Problem(key, str(error)))
            return
        *parents, last = key.split(".")
        node = self.document.tree
        for depth, parent in enumerate(parents):
            child = node.get(parent)
            if isinstance(child, str) and tuple(parents[: depth + 1]) in SHORTHANDS:
                child = {"name": child}
            node[parent] = child if isinstance(child, dict) else {}
            node = node[parent]
        node[last] = value

    def place(self, problem: Problem) -> str:
        """`file:line`, or the override on the command line that gave the key or what it stands in."""
        for key, item in self.overridden.items():
            if problem.path == key or problem.path.startswith(f"{key}."):
                return f"command line ({item})"
        line = self._problem_lines.get((problem.path, problem.sentence))
        path = tuple(problem.path.split("."))
        while line is None and path:
            line = self.document.lines.get(path)
            path = path[:-1]
        return f"{self.file}:{line}" if line else str(self.file)


def find(name: str) -> Path:
    """A recipe file by path, or by its name among the recipes that come with the package.

    Raises:
        InputError: neither exists.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    wanted = name.removeprefix("recipes/").removesuffix(".yaml")
    builtin = {str(p.relative_to(builtin_folder()).with_suffix("")): p for p in builtin_recipes()}
    if wanted in builtin:
        return builtin[wanted]
    near = difflib.get_close_matches(wanted, builtin, n=1, cutoff=0.4)
    raise InputError(
        f"{name}: there is no such recipe file, nor a recipe of that name in the package; see `vit-rsst recipes`."
        + (f" Did you mean {near[0]!r}?" if near else "")
    )


def builtin_folder() -> Path:
    """Where the recipes lie: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def builtin_recipes() -> list[Path]:
    return sorted(builtin_folder().rglob("*.yaml"))


def load(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe with `key=value` overrides.

    Raises:
        InputError: with every problem, each with its place, the value, the choices and the nearest.
    """
    from vit_rsst.recipe_rules import broken_rules

    source = Source(file, overrides)
    _load_plugins(source)
    recipe, problems = _validate(source.tree)
    problems = [*source.problems, *problems]
    told = {problem.path for problem in problems}
    # The rules are told of a recipe whose faulty fields went back to their defaults, so that nothing waits its turn.
    whole = recipe or _validate(_without(source.tree, told))[0]
    if whole is not None:
        problems += [problem for problem in broken_rules(whole) if problem.path not in told]
    if problems:
        lines = [f"{source.place(p)}  {p.path + ': ' if p.path else ''}{p.sentence}" for p in problems]
        count = f"{len(lines)} problems" if len(lines) > 1 else "1 problem"
        raise InputError("\n".join([f"{count} in the recipe; nothing was started.", *lines]))
    return recipe


def _spelled_out(tree: dict) -> dict:
    """Replaces shorthands by what they are short for."""
    tree = dict(tree)
    for parent, key in SHORTHANDS:
        if isinstance(tree.get(parent), dict) and isinstance(tree[parent].get(key), str):
            tree[parent] = {**tree[parent], key: {"name": tree[parent][key]}}
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("augment"), str) and data["augment"] in AUGMENT_PRESETS:
        tree["data"] = {**data, "augment": AUGMENT_PRESETS[data["augment"]]}
    return tree


def _without(tree: dict, paths: Iterable[str]) -> dict:
    """A copy of the tree less the named keys."""
    tree = json.loads(json.dumps(tree))
    tree.setdefault("name", "unnamed")
    for path in paths:
        *parents, last = path.split(".")
        node: Any = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    return tree


def _load_plugins(source: Source) -> None:
    plugins = source.tree.get("plugins", [])
    for module in plugins if isinstance(plugins, list) else []:
        try:
            importlib.import_module(str(module))
        except ImportError as error:
            source.problems.append(
                Problem("plugins", f"module {module!r} cannot be imported ({error}); it must be on PYTHONPATH")
            )


def _validate(tree: dict) -> tuple[Recipe | None, list[Problem]]:
    """Checks types, bounds and names; the method's options by the dataclass that its name stands for."""
    problems: list[Problem] = []
    tree = json.loads(json.dumps(tree))
    method = _take_method(tree, problems)
    try:
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        recipe = None
        problems += _sentences(error, Recipe, tree, ())
    for path, value, what, choices in _names(tree):
        if isinstance(value, str) and value not in choices:
            problems.append(Problem(path, unknown(what, value, choices)))
    if problems or recipe is None:
        return None, problems
    return replace(recipe, pruning=replace(recipe.pruning, method=method)), []


def _names(tree: dict) -> Iterable[tuple[str, Any, str, Iterable[str]]]:
    def get(*path: str) -> Any:
        node: Any = tree
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    yield "data.source", get("data", "source"), "source", SOURCES
    yield "pruning.criterion", get("pruning", "criterion"), "criterion", CRITERIA
    yield "data.augment", get("data", "augment"), "preset", AUGMENT_PRESETS


def _take_method(tree: dict, problems: list[Problem]) -> Method | None:
    """Validates `pruning.method` on its own and takes it out of the tree."""
    pruning = tree.get("pruning")
    options = pruning.pop("method", {"name": "rsst"}) if isinstance(pruning, dict) else {"name": "rsst"}
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        problems.append(Problem("pruning.method", f"expected the name of a method: {', '.join(METHODS)}"))
        return None
    name = options["name"]
    if name not in METHODS:
        problems.append(Problem("pruning.method", unknown("method", name, METHODS)))
        return None
    rest = {key: value for key, value in options.items() if key != "name"}
    try:
        return TypeAdapter(METHODS[name]).validate_json(json.dumps(rest), strict=True)
    except ValidationError as error:
        problems += _sentences(error, METHODS[name], rest, ("pruning", "method"))
        return None


def _sentences(error: ValidationError, root: type, tree: dict, prefix: tuple[str, ...]) -> list[Problem]:
    """pydantic's errors in the project's words; one for each place, however many branches of a union failed there."""
    found: dict[str, Problem] = {}
    for item in error.errors(include_url=False):
        is_new_key = item["type"] in ("unexpected_keyword_argument", "missing")
        path = _real_path(tuple(str(part) for part in item["loc"]), tree, is_new_key)
        dotted = ".".join((*prefix, *path))
        if path == ("data", "augment") and isinstance(item["input"], str):
            continue  # said as an unknown preset
        found.setdefault(dotted, Problem(dotted, _sentence(item, _siblings(root, path), root)))
    # A mapping that fails one branch of a union by its keys fails the others as a whole: the keys say more.
    return [p for path, p in found.items() if not any(other.startswith(f"{path}.") for other in found)]


def _real_path(inside: tuple[str, ...], tree: Any, ends_in_new_key: bool) -> tuple[str, ...]:
    """Drops the parts of a location that name a branch of a union and not a key."""
    path, node = [], tree
    for i, part in enumerate(inside):
        if isinstance(node, dict) and (part in node or (ends_in_new_key and i == len(inside) - 1)):
            path.append(part)
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            path.append(part)
            node = node[int(part)]
    return tuple(path)


def _siblings(root: type, path: tuple[str, ...]) -> list[str]:
    """Field names of the dataclass that should hold `path`."""
    cls: Any = root
    for part in path[:-1]:
        hint = next((f.type for f in fields(cls) if f.name == part), None) if is_dataclass(cls) else None
        cls = hint if is_dataclass(hint) else None
        if cls is None:
            return []
    return ["with" if f.name == "trackers" else f.name for f in fields(cls)]


def _everywhere(root: type, prefix: str = "") -> Iterable[tuple[str, str]]:
    for f in fields(root):
        yield f.name, f"{prefix}{f.name}"
        if is_dataclass(f.type):
            yield from _everywhere(f.type, f"{prefix}{f.name}.")


def _sentence(item: dict, siblings: list[str], root: type) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        key = str(item["loc"][-1])
        near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
        if near:
            return f"unknown key; did you mean {near[0]!r}?"
        elsewhere = [path for name, path in _everywhere(root) if name == key]
        return (
            f"unknown key; did you mean {elsewhere[0]!r}?"
            if elsewhere
            else (f"unknown key; expected one of {', '.join(siblings)}")
        )
    if kind == "missing":
        return "missing; every recipe needs it"
    if kind == "literal_error":
        choices = [c.strip("'") for c in context["expected"].replace(" or ", ", ").split(", ")]
        return unknown("value", value, choices)
    if kind == "string_pattern_mismatch":
        return _pattern_sentence(item, value)
    bound = {
        "greater_than": "more than",
        "greater_than_equal": "at least",
        "less_than": "less than",
        "less_than_equal": "at most",
    }.get(kind)
    if bound:
        limit = next(iter(context.values()))
        return f"{value!r} is out of range; expected {bound} {limit}"
    wanted = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "a text",
        "tuple": "a list",
        "dict": "a mapping",
        "dataclass": "a mapping",
    }.get(kind.split("_")[0])
    if wanted:
        return f"{value!r} is not {wanted}"
    return f"{value!r}: {item['msg']}"


def _pattern_sentence(item: dict, value: object) -> str:
    if item["loc"][-1] == "rewind":
        return f"unknown value {value!r}; expected init, lr, none or epoch:K, such as epoch:5"
    return f"{value!r} is not usable as the name of a folder; leave out slashes and control characters"
