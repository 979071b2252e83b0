"""A search: trials sampled by optuna's TPE, each trained as an ordinary run, stored in SQLite so that it can resume.

An interrupted trial is enqueued again with the same values and the same run folder, which the trainer resumes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from vit_rsst import files
from vit_rsst.errors import InputError, MissingRequirement, Stopped
from vit_rsst.experiments.running import Crew
from vit_rsst.experiments.space import Field
from vit_rsst.experiments.study_file import PlannedRun, differences, load, value_text
from vit_rsst.recipe import loading, strict_yaml
from vit_rsst.recipe.schema import Recipe
from vit_rsst.report import history
from vit_rsst.seeds import derived_seed

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

METRICS = {"val/top1": "maximize", "val/top5": "maximize", "val/loss": "minimize"}
"""Metric → direction; the test split decides nothing."""


@dataclass
class Search:
    """A search over fields of one recipe.

    Attributes:
        overrides: for all trials.
        is_pruning: stop trials that fall behind the median of the others.
        study: optuna's study, while the search is open.
    """

    base: Path
    overrides: Sequence[str]
    fields: Sequence[Field]
    metric: str = "val/top1"
    is_pruning: bool = False
    recipe: Recipe = field(init=False)
    study: "Study" = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = loading.load(self.base, self.overrides)

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir).expanduser() / f"{self.recipe.name}-search"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Opens or creates the search, exclusively.

        Raises:
            InputError: the folder holds a different search.
            MissingRequirement: optuna is missing, or another process runs this search.
        """
        optuna = import_optuna()
        if differ := differences(self.folder / "base.yaml", self.recipe):
            raise self._is_another(differ)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / ".lock").acquire(timeout=0)
        except Timeout as error:
            raise MissingRequirement(f"{self.folder}: another process is running this search; wait for it.") from error
        with lock:
            files.write_text(self.folder / "base.yaml", strict_yaml.dump(self.recipe.tree()))
            pruner = optuna.pruners.MedianPruner() if self.is_pruning else optuna.pruners.NopPruner()
            self.study = optuna.create_study(
                storage=f"sqlite:///{self.folder / 'search.db'}", study_name="search", load_if_exists=True,
                direction=METRICS[self.metric], pruner=pruner,
            )  # fmt: skip
            self._check_question()
            self._take_up()
            yield

    def _check_question(self) -> None:
        """Checks that fields and metric are those of the existing trials."""
        asked = {"metric": self.metric, "fields": sorted(map(str, self.fields))}
        there = {key: self.study.user_attrs.get(key, value) for key, value in asked.items()}
        if there != asked:
            raise self._is_another(f"{there['metric']} over {' '.join(there['fields'])}")
        for key, value in asked.items():
            self.study.set_user_attr(key, value)

    def _is_another(self, how: str) -> InputError:
        return InputError(f"{self.folder} holds a different search: {how}. Give this one another name (name=…).")

    def _take_up(self) -> None:
        """Enqueues the trials that were running when an earlier process was killed."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self._again(trial)

    def _again(self, trial: "Trial | FrozenTrial") -> None:
        from optuna.trial import TrialState

        self.study.tell(trial.number, state=TrialState.FAIL)
        if "run" in trial.user_attrs:
            self.study.enqueue_trial(trial.params, user_attrs={"run": trial.user_attrs["run"]})

    def run(self, num_trials: int, say: Callable[[str], None]) -> None:
        """Runs trials until `num_trials` have ended.

        Raises:
            Stopped: on a signal; the running trial resumes next time.
        """
        while (number := len(self.ended())) < num_trials:
            trial = self.draw()
            say(f"[{number}/{num_trials}] {trial.user_attrs['run']}  " + "  ".join(self.chosen(trial.params)))
            try:
                outcome = self.train(trial)
            except Stopped:
                self._again(trial)
                raise
            say(f"[{number + 1}/{num_trials}] {trial.user_attrs['run']}  {outcome}")

    def draw(self) -> "Trial":
        """The next trial; its values depend on the seed and the trials so far, not on this process."""
        from optuna.samplers import TPESampler

        runs = {trial.user_attrs.get("run") for trial in self.study.get_trials(deepcopy=False)} - {None}
        self.study.sampler = TPESampler(seed=derived_seed(self.recipe.seed, "search", len(runs)) % 2**32)
        trial = self.study.ask({one.key: one.distribution() for one in self.fields})
        if "run" not in trial.user_attrs:
            trial.set_user_attr("run", f"trial-{len(runs):03d}")
        return trial

    def train(self, trial: "Trial") -> str:
        """Trains a trial and records the result; returns it in words."""
        from optuna.trial import TrialState

        try:
            run = self.planned(trial)
        except InputError as error:  # incompatible values
            return self._failed(trial, str(error))
        watched, crew = Watched(trial, self.metric, run), Crew()
        crew.train([run], lambda *_: None, watched.is_hopeless)
        if run.is_finished:
            watched.report()
            value = watched.values[-1]
            self.study.tell(trial, value)
            return f"{self.metric} {value:.4g}"
        if watched.is_ended:
            self.study.tell(trial, state=TrialState.PRUNED)
            return f"pruned after {len(watched.values)} epochs, {self.metric} {watched.values[-1]:.4g}"
        return self._failed(trial, crew.failed[run.name])

    def _failed(self, trial: "Trial", why: str) -> str:
        from optuna.trial import TrialState

        trial.set_user_attr("reason", why)
        self.study.tell(trial, state=TrialState.FAIL)
        return f"failed: {why}"

    def planned(self, trial: "Trial") -> PlannedRun:
        name = trial.user_attrs["run"]
        own = [f"output_dir={value_text(str(self.folder))}", f"name={name}"]
        overrides = (*self.overrides, *self.chosen(trial.params), *own)
        recipe = load(name, self.base, overrides)
        return PlannedRun(name, "", recipe.seed, self.base, overrides, recipe)

    def chosen(self, params: dict[str, Any]) -> list[str]:
        """The values of a trial as overrides."""
        return [one.override(params[one.key]) for one in self.fields]

    def ended(self) -> list["FrozenTrial"]:
        """Trials that finished, were pruned or failed on their own; best first."""
        from optuna.trial import TrialState

        ends = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        found = [trial for trial in self.study.get_trials(deepcopy=False, states=ends)]
        found = [t for t in found if t.state != TrialState.FAIL or "reason" in t.user_attrs]
        sign = -1 if METRICS[self.metric] == "maximize" else 1

        def rank(trial: "FrozenTrial") -> tuple:
            return (ends.index(trial.state), sign * (last_value(trial) or 0.0), trial.number)

        return sorted(found, key=rank)

    def table(self) -> list[tuple[str, ...]]:
        """Trials as lines, finished ones first, best first."""
        lines = [("trial", self.metric, "epochs", "state", *(one.key for one in self.fields))]
        words = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
        for trial in self.ended():
            value = last_value(trial)
            numbers = ("–" if value is None else f"{value:.4g}", str(len(trial.intermediate_values)))
            values = [text.partition("=")[2] for text in self.chosen(trial.params)]
            lines.append((trial.user_attrs["run"], *numbers, words[trial.state.name], *values))
        return lines

    def best_overrides(self) -> list[str] | None:
        """The overrides of the best trial, with its own name; None if none has finished."""
        best = next((trial for trial in self.ended() if trial.state.name == "COMPLETE"), None)
        name = f"name={value_text(f'{self.recipe.name}-best')}"
        return None if best is None else [*self.overrides, *self.chosen(best.params), name]


@dataclass
class Watched:
    """A running trial whose epochs are reported to the pruner.

    Attributes:
        values: of the metric, one per epoch.
        is_ended: the pruner has stopped it.
    """

    trial: "Trial"
    metric: str
    run: PlannedRun
    values: list[float] = field(default_factory=list)
    is_ended: bool = False

    def report(self) -> None:
        """Reports new epochs from metrics.jsonl."""
        if not (self.run.folder / "metrics.jsonl").exists():
            return
        found = [history.number(event, self.metric) for event in history.read(self.run.folder).epochs]
        for epoch, value in enumerate(found[len(self.values) :], len(self.values) + 1):
            if not math.isnan(value):
                self.trial.report(value, epoch)
            self.values.append(value)

    def is_hopeless(self, run: PlannedRun) -> bool:
        before = len(self.values)
        self.report()
        if len(self.values) > before and self.trial.should_prune():
            self.is_ended = True
            return True
        return False


def last_value(trial: "FrozenTrial") -> float | None:
    """The result of a trial; so far, if it was stopped."""
    if trial.value is not None:
        return trial.value
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None


def import_optuna() -> Any:
    """optuna, quiet.

    Raises:
        MissingRequirement: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingRequirement(f"a search needs optuna ({error}): pip install 'vit_rsst[hpo]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
