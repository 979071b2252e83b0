"""A study file: arms, points and seeds, and the runs that follow from them.

    name: cifar10-penalty                  # runs lie in <output_dir>/<name>/
    recipe: recipes/cifar10/study.yaml     # base recipe of all runs
    seeds: [0, 1, 2]
    common: {optim.lr: 2e-3}               # fields of all runs
    dense: {train.epochs: 12}              # a dense round per seed, shared by all arms; default: each its own
    arms:                                  # what to compare: name → fields
      imp: {pruning.method: imp}
      rsst: {pruning.method: rsst}
    grid: {optim.lr: [1e-3, 3e-3]}         # every arm at every combination
    points:                                # variations of the default, for some arms or (without `arms`) all
      long: {set: {train.round_epochs: 10}, arms: [imp]}
    budget: equal                          # refuse to start unless all arms of a point train the same number of epochs
    reference: imp                         # arm that the others are compared with, seed by seed

Nothing heavy is imported here: an invalid study is rejected at once.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen
from pydantic import Field, TypeAdapter, ValidationError

from vit_rsst.errors import InputError, unknown
from vit_rsst.recipe import loading, strict_yaml
from vit_rsst.recipe.schema import Recipe, deciding, section
from vit_rsst.recipe.sentences import sentences
from vit_rsst.run.folder import RunFolder

OWN_FIELDS = ("name", "seed", "output_dir")
"""Recipe fields that the study sets in each run."""

Fields = dict[str, Any]


@section
class Point:
    """Fields that differ from the default (a single one, to vary one factor at a time), and the arms they apply to."""

    set: Annotated[Fields, MinLen(1)]
    arms: tuple[str, ...] | None = None


@section
class StudyFile:
    """The file as written; the module docstring shows each field."""

    name: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")]
    recipe: str
    arms: Annotated[dict[str, Fields], MinLen(1)]
    seeds: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] = (0,)
    common: Fields = field(default_factory=dict)
    dense: Fields | None = None
    grid: dict[str, Annotated[tuple[Any, ...], MinLen(1)]] = field(default_factory=dict)
    points: dict[str, Point] = field(default_factory=dict)
    budget: Literal["equal"] | None = None
    reference: str | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        arm: empty for a shared dense round.
        point: place in the grid, in words; empty at the default.
        file, overrides: arguments of the trainer.
        after: the dense round that it starts from, which must finish first.
    """

    arm: str
    point: str
    seed: int
    file: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    after: "PlannedRun | None" = None

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def folder(self) -> Path:
        return self.recipe.run_folder

    @property
    def epochs(self) -> tuple[int, ...]:
        """Epochs of each round, the shared one first."""
        own = self.recipe.round_epochs
        return own if self.after is None else (*self.after.epochs, *own)

    @property
    def is_finished(self) -> bool:
        return RunFolder(self.folder).status().get("state") == "finished"


@dataclass(frozen=True)
class Study:
    """A study and its runs in starting order: dense rounds, then seed by seed."""

    name: str
    folder: Path
    reference: str | None
    runs: list[PlannedRun]

    @property
    def compared(self) -> list[PlannedRun]:
        return [run for run in self.runs if run.arm]


def read(file: Path, overrides: Sequence[str] = ()) -> Study:
    """Reads a study file and every recipe that follows from it.

    Args:
        overrides: `key=value` for all runs; arms and points take precedence.

    Raises:
        InputError: the file or a recipe is invalid, or a folder holds a different experiment.
    """
    written = parse(file)
    base = loading.find(written.recipe)
    _refuse_own_fields(file, written, overrides)
    overrides = [*as_overrides(written.common), *overrides]
    whole = loading.load(base, overrides)
    folder = Path(whole.output_dir) / written.name
    maker = _Maker(file, written, base, [*overrides, f"output_dir={value_text(str(folder))}"])
    runs = [maker.run(arm, place, seed) for seed in written.seeds for arm, place in _pairs(file, written)]
    study = Study(written.name, folder, written.reference, [*maker.dense.values(), *runs])
    _check_names(file, study)
    if written.budget == "equal":
        _check_budget(file, study)
    for run in study.runs:
        check_folder(run)
    return study


def parse(file: Path) -> StudyFile:
    """The fields of the file.

    Raises:
        InputError: with every problem and its line.
    """
    try:
        document = strict_yaml.parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot read it ({error}); expected a study file.") from error
    problems = [(line, f"{'.'.join(path)}: {text}" if path else text) for path, line, text in document.problems]
    written = None
    try:
        written = TypeAdapter(StudyFile).validate_json(json.dumps(document.tree), strict=True)
    except ValidationError as error:
        for problem in sentences(error, StudyFile, document.tree, ()):
            line = document.lines.get((problem.path.split(".")[0],), 1)
            problems.append((line, f"{problem.path}: {problem.sentence}".replace("every recipe", "every study")))
    if problems or written is None:
        raise InputError("\n".join(f"{file}:{line}  {text}" for line, text in problems))
    return written


def value_text(value: object) -> str:
    """A value as a command-line override spells it."""
    if isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value) and strict_yaml.parse_scalar(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def as_overrides(fields: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value_text(value)}" for key, value in fields.items()]


def load(where: str, base: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe; errors name the place in the study that asks for it.

    Raises:
        InputError: naming that place.
    """
    try:
        return loading.load(base, overrides)
    except InputError as error:
        lines = str(error).splitlines()
        raise InputError("\n".join(f"{where}: {line}" for line in lines[1:] or lines)) from error


@dataclass(frozen=True)
class Place:
    """A point in the grid: its words and overrides."""

    words: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(self.words)


def _pairs(file: Path, written: StudyFile) -> Iterator[tuple[str, Place]]:
    """Every arm at each of its places.

    Raises:
        InputError: an unknown arm is named.
    """
    named = {f"points.{name}.arms": point.arms or () for name, point in written.points.items()}
    for place, arms in (named | {"reference": filter(None, [written.reference])}).items():
        for arm in arms:
            if arm not in written.arms:
                raise InputError(f"{file}: {place}: {unknown('arm', arm, written.arms)}")
    for arm in written.arms:
        for place in _grid(written):
            yield arm, place
            for name, point in written.points.items():
                if point.arms is None or arm in point.arms:
                    yield arm, Place((*place.words, name), (*place.overrides, *as_overrides(point.set)))


def _grid(written: StudyFile) -> list[Place]:
    """All combinations; without a grid, only the default."""
    combinations = itertools.product(*written.grid.values())
    texts = [[value_text(value) for value in values] for values in combinations]
    return [
        Place(
            tuple(f"{key.rsplit('.', 1)[-1]}={text}" for key, text in zip(written.grid, of_one, strict=True)),
            tuple(f"{key}={text}" for key, text in zip(written.grid, of_one, strict=True)),
        )
        for of_one in texts
    ]


def _refuse_own_fields(file: Path, written: StudyFile, overrides: Sequence[str]) -> None:
    """Rejects fields that the study sets itself.

    Raises:
        InputError: naming the field and where to set it.
    """
    asked = {f"arm {arm!r}": fields for arm, fields in written.arms.items()}
    asked |= {f"point {name!r}": point.set for name, point in written.points.items()}
    asked |= {"grid": written.grid, "dense": written.dense or {}, "common": written.common}
    shared = ("train.epochs", "model.start_from") if written.dense is not None else ()
    for seed in written.seeds:
        if written.seeds.count(seed) > 1:
            raise InputError(f"{file}: seeds: {seed} is given twice; list each seed once.")
    for key in written.dense or {}:
        if key.split(".")[0] == "pruning":
            raise InputError(f"{file}: dense: {key} has no effect: the shared round removes nothing; delete it.")
    for place, fields in asked.items():
        for key in fields:
            if key in OWN_FIELDS:
                raise InputError(f"{file}: {place}: the study sets {key} in each run; delete it.")
            if key in shared and place != "dense":
                raise InputError(
                    f"{file}: {place}: {key} has no effect, because all arms start from a shared dense round; set "
                    "train.epochs in dense, or delete dense."
                )
    for item in overrides:
        if item.partition("=")[0] in ("name", "seed"):
            raise InputError(f"command line ({item}): the study sets names and seeds; change {file} instead.")


class _Maker:
    """Makes the runs, and each shared dense round once."""

    def __init__(self, file: Path, written: StudyFile, base: Path, overrides: list[str]):
        self.file, self.written, self.base, self.overrides = file, written, base, overrides
        self.dense: dict[tuple, PlannedRun] = {}

    def run(self, arm: str, place: Place, seed: int) -> PlannedRun:
        fields = [*as_overrides(self.written.arms[arm]), *place.overrides]
        where = f"{self.file}: arm {arm!r}" + (f" at {place}" if place.words else "")
        dense = None
        overrides = [*self.overrides, f"seed={seed}"]
        if self.written.dense is not None:
            dense = self.dense_round(fields, seed)
            overrides += [f"train.epochs={sum(dense.epochs)}", f"model.start_from={value_text(str(dense.folder))}"]
        overrides += [*fields, f"name={value_text(slug('-'.join((arm, *place.words)), seed))}"]
        recipe = load(where, self.base, overrides)
        return PlannedRun(arm, str(place), seed, self.base, tuple(overrides), recipe, dense)

    def dense_round(self, fields: Sequence[str], seed: int) -> PlannedRun:
        """The dense round of a seed for one model and dataset; other fields of an arm do not affect it."""
        own = [item for item in fields if item.partition("=")[0].split(".")[0] in ("data", "model")]
        key = (seed, *own)
        if key not in self.dense:
            asked = [*self.overrides, f"seed={seed}", *own, *as_overrides(self.written.dense)]
            epochs = load(f"{self.file}: dense", self.base, asked).train.epochs
            if epochs < 2:
                raise InputError(
                    f"{self.file}: dense: train.epochs is {epochs}; a shared dense round needs at least 2."
                )
            number = sum(run.seed == seed for run in self.dense.values())
            name = slug(f"dense-round{number + 1 if number else ''}", seed)
            # A dense run is a single round of all epochs, those of its pruning rounds included.
            asked += ["pruning={method: dense, schedule: {rounds: 1}}", f"train.epochs={epochs - 1}"]
            asked += ["train.round_epochs=1", "train.recovery_epochs=0", f"name={name}"]
            recipe = load(f"{self.file}: dense", self.base, asked)
            self.dense[key] = PlannedRun("", "", seed, self.base, tuple(asked), recipe)
        return self.dense[key]


def slug(text: str, seed: int) -> str:
    """Name of a run folder."""
    return f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', text).strip('-.')}-s{seed}"


def _check_names(file: Path, study: Study) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in study.runs:
        if run.name in seen:
            other = seen[run.name]
            raise InputError(
                f"{file}: {run.arm!r} {run.point} and {other.arm!r} {other.point} would share the folder {run.folder}; "
                "rename one of the arms, and list each seed once."
            )
        seen[run.name] = run


def _check_budget(file: Path, study: Study) -> None:
    """Checks that all arms of a point train the same number of epochs.

    Raises:
        InputError: with the sums that differ.
    """
    for point, runs in itertools.groupby(sorted(study.compared, key=lambda r: r.point), key=lambda r: r.point):
        sums = {run.arm: run.epochs for run in runs}
        if len({sum(epochs) for epochs in sums.values()}) > 1:
            listed = "; ".join(f"{arm} {' + '.join(map(str, e))} = {sum(e)}" for arm, e in sums.items())
            raise InputError(
                f"{file}: budget: arms train different numbers of epochs{f' at {point}' if point else ''}: {listed}. "
                "Change train.round_epochs or the rounds of an arm, or delete budget."
            )


def check_folder(run: PlannedRun) -> None:
    """Checks that the run's folder, if it exists, holds this run.

    Raises:
        InputError: it holds a different one; names the fields that differ.
    """
    if differ := differences(run.folder / "recipe.yaml", run.recipe):
        raise InputError(
            f"{run.folder} holds a run of a different recipe: {differ}. Rename the study, or move that folder away."
        )


def differences(saved: Path, recipe: Recipe) -> str:
    """Fields in which a saved recipe differs; fields added since then take their defaults."""
    if not saved.exists():
        return ""
    try:
        then, now = (deciding(one.tree()) for one in (loading.load(saved), recipe))
    except InputError:
        return "this version cannot read it"
    fields = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    return ", ".join(f"{key} (was {then.get(key)!r}, now {now.get(key)!r})" for key in fields)
