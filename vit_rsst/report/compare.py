"""The report of several runs: means and spreads over seeds, Pareto fronts, budgets, and what follows from them."""

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence

from vit_rsst.analysis.subject import Subject
from vit_rsst.recipe.schema import deciding
from vit_rsst.report.document import Bullets, Code, Document, Gallery, Section, Table
from vit_rsst.report.fronts import images
from vit_rsst.report.groups import NOT_OF_THE_EXPERIMENT, Group, grouped, noise
from vit_rsst.report.history import History, at
from vit_rsst.report.story import has_content, measured, reproduction, state_text
from vit_rsst.text import duration, size
from vit_rsst.tickets.rounds import RoundRow

SAME = 0.02
"""Relative difference below which two budgets count as equal."""


def compare(histories: Sequence[History], is_timed: bool = False) -> Document:
    """The report of several runs.

    Args:
        is_timed: measure latency, which takes seconds per run.
    """
    groups = grouped(histories)
    timed = timings(groups) if is_timed else {}
    sections = [
        Section("Key findings", [Bullets(list(findings(groups)))]),
        Section("Results", list(result_blocks(groups, timed))),
        Section("Figures", [Gallery(images(groups, timed))]),
        Section("Tickets", list(ticket_blocks(groups))),
        Section("Recipe differences", list(difference_blocks(groups))),
        Section("Reproduce these runs", [Code("\n\n".join(reproduction(run) for run in histories))]),
    ]
    names = ", ".join(history.name for history in histories)
    title = f"Comparison of {len(histories)} runs"
    return Document(title, "", names, [section for section in sections if has_content(section)])


def timings(groups: Sequence[Group]) -> dict[int, list[Mapping]]:
    """Latency of each group's slim network by batch size, measured alternately; empty if image sizes differ."""
    subjects = [next((s for s in group.subjects if isinstance(s, Subject)), None) for group in groups]
    known = [subject for subject in subjects if subject is not None]
    if not known or len({subject.image_size for subject in known}) > 1:
        return {}
    place = {id(subject): i for i, subject in enumerate(known)}

    def of(found: Mapping, subject: Subject | None) -> Mapping:
        if subject is None:
            return {}
        i = place[id(subject)]
        return found.get(f"{i} slim", found[f"{i} dense"])

    return {batch: [of(found, subject) for subject in subjects] for batch, found in measured(known).items()}


def findings(groups: Sequence[Group]) -> Iterator[str]:
    """What follows from the numbers, and what does not."""
    known = [group for group in groups if group.scores]
    unfinished = [run for group in groups for run in group.runs if run.state != "finished"]
    if unfinished:
        names = ", ".join(f"{run.name} ({state_text(run)})" for run in unfinished)
        yield f"Unfinished runs: {names}. Their numbers are preliminary."
    if any(group.split == "validation" for group in known):
        yield "Some tickets have no test score yet, so all are compared on validation."
    for _, alike in itertools.groupby(sorted(known, key=lambda g: -g.density), key=lambda g: round(g.density, 2)):
        yield from leader(sorted(alike, key=lambda group: -group.mean))
    densities = {round(group.density, 2) for group in known}
    if len(densities) > 1:
        listed = ", ".join(f"{density:.2f}" for density in sorted(densities, reverse=True))
        yield f"Final densities differ ({listed}): compare along the Pareto front, not by the final scores."
    yield from budget_findings([group for group in groups if group.images])
    for group in known:
        gaps = [[row.what_if_gap for row in run.rows if row.what_if_gap is not None] for run in group.runs]
        sums = [sum(of_run) for of_run in gaps if of_run]
        if sums:
            mean = statistics.mean(sums)
            yield f"{group.label}: removal alone cost {mean:.2f} points in total over {len(gaps[0])} rounds."


def leader(groups: Sequence[Group]) -> Iterator[str]:
    """The best of two or more at one density, and whether its lead exceeds noise."""
    if len(groups) < 2:
        return
    first, second = groups[:2]
    lead = first.mean - second.mean
    seeds = min(len(first.scores), len(second.scores))
    spreads = [group.spread for group in (first, second) if group.spread is not None]
    bound = noise(spreads)
    verdict = (
        f"above noise ({bound:.2f} points)" if lead > bound else f"within noise ({bound:.2f} points), so far a tie"
    )
    seeds_text = "one seed" if seeds == 1 else f"{seeds} seeds"
    yield (
        f"At density {first.density:.2f}, {first.label} leads with {first.mean:.2f} %, {lead:.2f} points ahead of "
        f"{second.label} over {seeds_text}: {verdict}."
    )


def budget_findings(groups: Sequence[Group]) -> Iterator[str]:
    if len(groups) < 2:
        return
    most = max(group.images for group in groups)
    less = [group for group in groups if group.images < (1 - SAME) * most]
    if not less:
        yield f"All experiments had the same training budget: {most:,} images."
        return
    names = ", ".join(f"{group.label} ({group.images / max(most, 1):.2f})" for group in less)
    yield f"Training budgets differ, so this is no fair comparison: {names} of the largest, {most:,} images."


def result_blocks(groups: Sequence[Group], timed: Mapping) -> Iterator[object]:
    heads = ["experiment", "method", "seeds", "density", "top-1", "what-if gaps", "budget", "time", "ticket"]
    heads += ["parameters", "MFLOPs", *(f"ms at batch {batch}" for batch in timed)]
    most = max((group.images for group in groups), default=0)
    rows = []
    for i, group in enumerate(groups):
        ms = [f"{1000 * found[i]['median']:.2f}" if found[i] else "–" for found in timed.values()]
        rows.append((group.label, *score_cells(group), *cost_cells(group, group.images / max(most, 1)), *ms))
    note = (
        f"Last tickets; {groups[0].split} top-1 ± one standard deviation over seeds. Budget: training images; ≠ marks "
        "a smaller one, with its share of the largest. Parameters, MFLOPs and latency with dead units cut out."
    )
    yield Table(heads, rows, note)


def score_cells(group: Group) -> Iterator[str]:
    gaps = [row.what_if_gap for run in group.runs for row in run.rows if row.what_if_gap is not None]
    yield str(at(group.runs[0].recipe, "pruning.method.name"))
    yield str(len(group.runs))
    yield f"{group.density:.3f}" if group.scores else "–"
    yield mean_and_spread(group.scores)
    yield f"{sum(gaps) / len(group.runs):+.2f}" if gaps else "–"


def mean_and_spread(scores: Sequence[float]) -> str:
    """`83.10 ± 0.10`; the mean alone for one seed."""
    if not scores:
        return "–"
    return f"{statistics.mean(scores):.2f}" + (f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else "")


def cost_cells(group: Group, share: float) -> Iterator[str]:
    """Budget with its share of the largest, time, size and complexity."""
    done = [run.rows for run in group.runs if run.rows]
    yield f"{group.images:,}" if share >= 1 - SAME else f"{group.images:,} ≠ {share:.2f}"
    yield duration(statistics.mean(sum(row.seconds for row in rows) for rows in done)) if done else "–"
    yield size(statistics.mean(rows[-1].ticket_bytes for rows in done)) if done else "–"
    yield f"{group.counted['parameters']['slim']:,}" if group.counted else "–"
    yield f"{group.counted['flops']['slim'] / 1e6:,.1f}" if group.counted else "–"


def ticket_blocks(groups: Sequence[Group]) -> Iterator[object]:
    """Every round of every experiment, averaged over seeds."""
    rows = []
    for group in groups:
        for of_round in itertools.zip_longest(*(run.rows for run in group.runs)):
            found: list[RoundRow] = [row for row in of_round if row is not None]
            scores = [group.top1(row) for row in found]
            rows.append(
                (
                    group.label,
                    str(found[0].round),
                    f"{statistics.mean(row.density for row in found):.4f}",
                    f"{statistics.mean(row.val_top1 for row in found):.2f}",
                    mean_and_spread(scores),
                    size(statistics.mean(row.ticket_bytes for row in found)),
                )
            )
    yield Table(("experiment", "round", "density", "val top-1", "top-1", "ticket"), rows)


def difference_blocks(groups: Sequence[Group]) -> Iterator[object]:
    """Fields in which the recipes differ."""
    fields = [deciding(dict(group.runs[0].recipe)) for group in groups]
    names = [name for name in dict.fromkeys(itertools.chain(*fields)) if name not in NOT_OF_THE_EXPERIMENT]
    rows = [(name, *(as_yaml(of[name]) if name in of else "–" for of in fields)) for name in names]
    yield Table(("field", *(group.label for group in groups)), [row for row in rows if len(set(row[1:])) > 1])


def as_yaml(value: object) -> str:
    """A value as a recipe spells it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
