"""Results of a study: one line per arm and point, means and spreads over seeds, paired differences."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from vit_rsst.experiments.study_file import PlannedRun, Study
from vit_rsst.report.groups import NOISE, noise
from vit_rsst.tickets.rounds import RoundRow, load_rows

HEADS = ("arm", "point", "n", "density", "val top-1", "test top-1", "what-if gaps", "epochs", "minutes")


@dataclass(frozen=True)
class Result:
    """A finished run, summarised.

    Attributes:
        gaps: sum of the what-if gaps in points; None if the method has none.
        minutes: of its own rounds.
        epochs: of all rounds, a shared one included.
    """

    run: PlannedRun
    rows: Sequence[RoundRow]

    @property
    def density(self) -> float:
        return self.rows[-1].density

    @property
    def val(self) -> float:
        return self.rows[-1].val_top1

    @property
    def test(self) -> float:
        return self.rows[-1].test_top1

    @cached_property
    def gaps(self) -> float | None:
        found = [row.what_if_gap for row in self.rows if row.what_if_gap is not None]
        return sum(found) if found else None

    @property
    def minutes(self) -> float:
        return sum(row.seconds for row in self.rows) / 60

    @property
    def epochs(self) -> int:
        return sum(self.run.epochs)


def results(runs: Iterable[PlannedRun]) -> list[Result]:
    """Results of the finished runs."""
    return [Result(run, load_rows(run.folder)) for run in runs if run.is_finished]


def grouped(found: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """(arm, point) → results of its seeds."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in found:
        groups.setdefault((result.run.arm, result.run.point), []).append(result)
    return groups


def spread_text(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation; the mean alone for a single value."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def difference_text(group: Sequence[Result], reference: Sequence[Result]) -> tuple[str, str]:
    """Mean difference in test top-1 over common seeds, and whether it is noise.

    Pairs share data, data order and dense round, so the spread of their differences decides.
    """
    scores = {result.run.seed: result.test for result in reference}
    pairs = [result.test - scores[result.run.seed] for result in group if result.run.seed in scores]
    if not pairs:
        return "–", "–"
    bound = noise([statistics.stdev(pairs)] if len(pairs) > 1 else [])
    mean = statistics.mean(pairs)
    verdict = f"within noise ({bound:.2f})" if abs(mean) <= bound else f"above noise ({bound:.2f})"
    return spread_text(pairs, "+"), verdict


def cells(study: Study) -> list[tuple[str, ...]]:
    """The table: header, then one line per arm and point; empty until a run has finished."""
    groups = grouped(results(study.compared))
    if not groups:
        return []
    against = (f"test − {study.reference}", "verdict") if study.reference else ()
    lines = [(*HEADS, *against)]
    for arm, point in dict.fromkeys((run.arm, run.point) for run in study.compared):
        if group := groups.get((arm, point)):
            line = (arm, point or "default", *_numbers(group))
            if arm == study.reference:
                line += ("–", "–")
            elif study.reference:
                line += difference_text(group, groups.get((study.reference, point), ()))
            lines.append(line)
    return lines


def _numbers(group: Sequence[Result]) -> tuple[str, ...]:
    gaps = [result.gaps for result in group if result.gaps is not None]
    return (
        str(len(group)),
        f"{statistics.mean(r.density for r in group):.3f}",
        spread_text([r.val for r in group]),
        spread_text([r.test for r in group]),
        spread_text(gaps) if gaps else "–",
        str(group[0].epochs),
        f"{statistics.mean(r.minutes for r in group):.1f}",
    )


def summary(study: Study) -> str:
    """The table as Markdown, below the number of comparisons; a sentence until a run has finished."""
    lines = cells(study)
    if not lines:
        return "no run has finished yet"
    if not study.reference:
        return markdown(lines)
    compared = sum(line[-1] != "–" for line in lines[1:])
    head = (
        f"Paired comparisons with {study.reference}: {compared}. The more there are, the more likely one exceeds "
        f"noise by chance. Noise: three standard deviations of the paired differences, at least {NOISE:g} point."
    )
    return f"{head}\n\n{markdown(lines)}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is the header."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    escaped.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def rows(study: Study, reasons: Mapping[str, str]) -> list[dict[str, object]]:
    """One row per run, for --csv."""
    found = {result.run.name: result for result in results(study.runs)}
    return [_row(run, found.get(run.name), reasons.get(run.name, "")) for run in study.runs]


def _row(run: PlannedRun, result: Result | None, why: str) -> dict[str, object]:
    numbers = ("density", "val", "test", "gaps", "minutes")
    return {
        "run": run.name,
        "arm": run.arm,
        "point": run.point,
        "seed": run.seed,
        "state": "finished" if result else "failed" if why else "open",
        **{name: None if result is None else getattr(result, name) for name in numbers},
        "epochs": sum(run.epochs),
        "reason": why,
    }
