"""Experiments: runs that differ only in their seed, under a label that sets each apart."""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vit_rsst.analysis.counts import count
from vit_rsst.analysis.subject import Subject
from vit_rsst.errors import InputError
from vit_rsst.recipe.schema import deciding
from vit_rsst.report.history import History, at, common_split, read, top1
from vit_rsst.report.story import last_subject
from vit_rsst.tickets.rounds import RoundRow

NOT_OF_THE_EXPERIMENT = ("seed",)
"""Fields in which runs of one experiment may differ."""

OTHER_RUNS = ("model.start_from", "model.shape_from", "train.distill.teacher")
"""Fields that name another run, which may differ in the same fields."""


@dataclass(frozen=True)
class Group:
    """Runs of one experiment over seeds, each with the network of its last ticket.

    Attributes:
        label: what sets the experiment apart.
        subjects: one per run; a sentence if the ticket cannot be opened.
        split: on which all experiments are compared.
    """

    label: str
    runs: Sequence[History]
    subjects: Sequence[Subject | str]
    split: str

    def top1(self, row: RoundRow) -> float:
        """Of a ticket, on the common split."""
        return top1(row, self.split)

    @cached_property
    def scores(self) -> list[float]:
        """Top-1 of the last ticket of each run that has one."""
        return [self.top1(run.rows[-1]) for run in self.runs if run.rows]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores) if self.scores else math.nan

    @property
    def spread(self) -> float | None:
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def density(self) -> float:
        found = [run.rows[-1].density for run in self.runs if run.rows]
        return statistics.mean(found) if found else math.nan

    @property
    def images(self) -> int:
        """Training images over all rounds: the budget."""
        steps = max((run.steps_taken for run in self.runs), default=0)
        return steps * int(at(self.runs[0].recipe, "train.global_batch", 0))

    @cached_property
    def counted(self) -> Mapping:
        subject = next((subject for subject in self.subjects if isinstance(subject, Subject)), None)
        return count(subject) if subject is not None else {}


def grouped(histories: Sequence[History]) -> list[Group]:
    """Runs grouped by experiment, in the order given."""
    found: dict[tuple, list[History]] = {}
    for history in histories:
        found.setdefault(experiment(history.recipe), []).append(history)
    labels = shortened([_common([run.name for run in runs]) for runs in found.values()])
    split = common_split(row for history in histories for row in history.rows)
    return [
        Group(label, runs, [last_subject(run) for run in runs], split)
        for label, runs in zip(labels, found.values(), strict=True)
    ]


def experiment(recipe: Mapping, seen: tuple[Path, ...] = ()) -> tuple:
    """What identifies an experiment: every field that affects results except the seed, also of the runs it names.

    Args:
        seen: runs visited on the way; copied or edited folders may name each other.
    """
    fields = {k: v for k, v in deciding(dict(recipe)).items() if k not in NOT_OF_THE_EXPERIMENT}
    for key in OTHER_RUNS:
        if fields.get(key) in (None, "dense"):
            continue
        path = Path(str(fields[key])).expanduser()
        folder = (path.parent.parent if path.is_file() else path).resolve()  # a ticket lies two levels below its run
        if folder not in seen:
            with suppress(InputError):
                fields[key] = (path.name if path.is_file() else "", experiment(read(folder).recipe, (*seen, folder)))
    return tuple(sorted((k, repr(v)) for k, v in fields.items()))


def _beginning(names: Sequence[str]) -> str:
    """The common prefix."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike)


def _common(names: Sequence[str]) -> str:
    """The name of a single run; otherwise the common prefix without the word before the seed."""
    if len(names) == 1:
        return names[0]
    found = _beginning(names).rstrip(" -_.0123456789")
    return re.sub(r"[ \-_.]+(seed|s)$", "", found) or names[0]


def shortened(labels: Sequence[str]) -> list[str]:
    """Labels without their common leading words; numbered if two would be equal."""
    shared = re.search(r".*[ \-_/]", _beginning(labels)) if len(labels) > 1 else None
    short = [label[shared.end() :] if shared and len(label) > shared.end() else label for label in labels]
    return [label if short.count(label) == 1 else f"{label} ({i})" for i, label in enumerate(short, 1)]


NOISE = 1.0
"""Points of top-1; smaller differences count as noise, however close the seeds are."""


def noise(spreads: Sequence[float]) -> float:
    """Points up to which a difference is noise: three standard deviations over seeds, at least one point.

    Args:
        spreads: standard deviations over seeds; empty for a single seed.
    """
    return max([NOISE, *(3 * spread for spread in spreads)])
