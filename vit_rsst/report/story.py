"""The report of one run: question, key findings, rounds, figures, complexity, recipe, how to reproduce it."""

import itertools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from vit_rsst.analysis.counts import count
from vit_rsst.analysis.subject import Subject, open_subject
from vit_rsst.analysis.tables import spread
from vit_rsst.errors import RunError
from vit_rsst.pruning.methods import METHODS
from vit_rsst.pruning.plan import Method
from vit_rsst.recipe import strict_yaml
from vit_rsst.report import canvas, curves
from vit_rsst.report.diagnosis import PREFIX, diagnose
from vit_rsst.report.document import Bullets, Code, Document, Facts, Gallery, Image, Section, Table, Text, shown_path
from vit_rsst.report.findings import findings
from vit_rsst.report.history import History, at
from vit_rsst.report.pictures import PICTURES
from vit_rsst.text import duration, size
from vit_rsst.tickets.trained import default_device
from vit_rsst.timing import latency

BATCHES = (1, 32)
"""Batch sizes at which latency is measured."""

Guard = Callable[[str, Callable[[], object]], object]
"""(what, call) → what the call returns; None if it failed and may."""


def plainly(what: str, call: Callable[[], object]) -> object:
    """The guard that lets every error through."""
    return call()


def tell(history: History, is_timed: bool = False, guard: Guard = plainly) -> Document:
    """The report of a run in any state.

    Args:
        is_timed: measure latency, which takes seconds.
        guard: called around each figure.
    """
    subject = last_subject(history)
    counted = count(subject) if isinstance(subject, Subject) else {}
    timed = measured([subject]) if is_timed and counted else {}
    sections = [
        Section("Question", [Text(question(history))]),
        Section("Key findings", [Bullets(list(findings(history, counted)))]),
        Section("Diagnosis", [Bullets([str(found) for found in diagnose(history)])]),
        Section("Rounds", list(round_blocks(history))),
        Section("Figures", [Gallery(images(history, guard))]),
        Section("Classes", list(class_blocks(history))),
        Section("Complexity", list(complexity_blocks(subject, counted, timed))),
        Section("Warnings", [Bullets(list(warnings(history)))]),
        Section("Recipe", [Facts(recipe_facts(history.recipe)), Code(strict_yaml.dump(dict(history.recipe)))]),
        Section("Data and environment", [Facts(environment_facts(history.environment))]),
        Section("Reproduce this run", [Code(reproduction(history))]),
    ]
    return Document(history.name, state_text(history), lead(history), [s for s in sections if has_content(s)])


def warnings(history: History) -> Iterator[str]:
    """Logged warnings, repeats counted; diagnoses have a section of their own."""
    for text, events in itertools.groupby(history.warnings, key=lambda event: str(event.get("text"))):
        steps = [event["step"] for event in events]
        if not text.startswith(PREFIX):
            yield f"Step {steps[0]:,}{f' (and {len(steps) - 1} more)' if len(steps) > 1 else ''}: {text}"


def has_content(section: Section) -> bool:
    """Whether the section has anything below its title."""

    def content(block: object) -> object:
        return next(getattr(block, name) for name in ("items", "rows", "images", "text") if hasattr(block, name))

    return any(content(block) for block in section.blocks)


def state_text(history: History) -> str:
    code = history.status.get("exit_code")
    return f"failed ({code})" if history.state == "failed" else history.state


def lead(history: History) -> str:
    r = history.recipe
    method = at(r, "pruning.method.name")
    updated = str(history.status.get("updated", "")).replace("T", " ").replace("+00:00", " UTC")
    what = f"{at(r, 'model.name')} on {at(r, 'data.source')}, pruned with {method}, seed {at(r, 'seed')}."
    return f"{what} Updated {updated}." if updated else what


def question(history: History) -> str:
    """In the words of the method: as the run recorded them, for the method may come from a plugin."""
    recorded = at(history.environment, "question", None)
    if isinstance(recorded, str):
        return recorded
    name = str(at(history.recipe, "pruning.method.name"))
    method = METHODS.get(name, Method)
    return method.question(lambda path: at(history.recipe, path))


def round_blocks(history: History) -> Iterator[object]:
    heads = ("round", "density", "val top-1", "val loss", "test top-1", "test loss", "what-if gap", "epochs", "time",
             "ticket")  # fmt: skip
    rows = [
        (
            str(row.round),
            f"{row.density:.4f}",
            f"{row.val_top1:.2f}",
            f"{row.val_loss:.4f}",
            maybe(row.test_top1, ".2f"),
            maybe(row.test_loss, ".4f"),
            maybe(row.what_if_gap, "+.2f"),
            str(row.epochs),
            duration(row.seconds),
            size(row.ticket_bytes),
        )
        for row in history.rows
    ]
    note = "What-if gap: validation top-1 just before a removal minus just after it, in points."
    yield Table(heads, rows, note if any(row.what_if_gap is not None for row in history.rows) else "")


def maybe(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def images(history: History, guard: Guard = plainly) -> list[Image]:
    """Curves redrawn from the numbers; figures that need the model as the run saved them."""
    found = []
    with canvas.drawing():
        for drawing in curves.DRAWINGS:

            def as_svg(drawing: curves.Drawing = drawing) -> str | None:
                figure = drawing.draw(history)
                return None if figure is None else canvas.svg(figure)

            if (svg := guard(drawing.name, as_svg)) is not None:
                found.append(Image(drawing.name, drawing.title, drawing.caption, svg))
    for picture in PICTURES:
        path = history.path / "figures" / f"{picture.name}.svg"
        if path.is_file():
            svg = path.read_text(encoding="utf-8", errors="replace")
            found.append(Image(picture.name, picture.title, picture.caption, svg))
    return found


def class_blocks(history: History, most: int = 20) -> Iterator[object]:
    """Recall and precision by class; the worst first if there are many."""
    counts, names = history.scores.get("confusion", ()), history.scores.get("classes", ())
    taken = [sum(column) for column in zip(*counts, strict=True)]
    rows = []
    for i, name in enumerate(names):
        hits, images = counts[i][i], sum(counts[i])
        rows.append((name, hits / max(images, 1), hits / max(taken[i], 1), images))
    shown = rows if len(rows) <= most else sorted(rows, key=lambda row: row[1])[:most]
    cells = [(name, f"{100 * recall:.2f}", f"{100 * precision:.2f}", f"{n:,}") for name, recall, precision, n in shown]
    which = "" if len(rows) <= most else f"The {most} of {len(rows)} classes with the lowest recall. "
    note = f"{which}Test split, ticket {history.scores.get('ticket', '')}." if cells else ""
    yield Table(("class", "recall", "precision", "images"), cells, note)


def last_subject(history: History) -> Subject | str:
    """The network of the last ticket, or why there is none."""
    if not history.rows:
        return "No ticket yet."
    try:
        return open_subject(str(history.path))
    except RunError as error:
        return f"Cannot open the last ticket: {error}"


def measured(subjects: Sequence[Subject]) -> dict[int, dict[str, dict]]:
    """Latency by batch size of `dense` (zeros included) and `slim` networks, measured alternately."""
    device = default_device()
    networks = {}
    for i, subject in enumerate(subjects):
        networks[f"{i} dense"] = subject.net.to(device)
        if subject.slim.is_narrower:
            networks[f"{i} slim"] = subject.slim.net.to(device).eval()
    return {batch: latency(networks, subjects[0].image_size, batch, device) for batch in BATCHES}


def complexity_blocks(subject: Subject | str, counted: Mapping, timed: Mapping) -> Iterator[object]:
    if isinstance(subject, str):
        yield Text(subject)
        return
    parameters, flops = counted["parameters"], counted["flops"]
    rows = [
        ("parameters", f"{parameters['total']:,}", f"{parameters['slim']:,}"),
        ("MFLOPs per image", f"{flops['dense'] / 1e6:,.1f}", f"{flops['slim'] / 1e6:,.1f}"),
        ("size in fp32", size(counted["bytes"]["dense_fp32"]), size(counted["bytes"]["slim_fp32"])),
    ]
    for batch, found in timed.items():
        dense, slim = found["0 dense"], found.get("0 slim", found["0 dense"])
        rows.append((f"latency at batch {batch}, ms", spread(dense), spread(slim)))
        rows.append((f"images/s at batch {batch}", *(f"{part['images_per_s']:,.0f}" for part in (dense, slim))))
    note = f"Last ticket at {counted['image_size']} px. Slim: dead heads, neurons and channels cut out."
    if timed:
        note += f" Latency: median [quartiles] on {default_device().type}, {torch.get_num_threads()} thread(s)."
    yield Table(("", "masked", "slim"), rows, note)


def recipe_facts(recipe: Mapping) -> list[tuple[str, str]]:
    optim, pruning = at(recipe, "optim", {}), at(recipe, "pruning", {})
    method = at(pruning, "method", {})
    method = dict(method) if isinstance(method, Mapping) else {"name": method}
    options = ", ".join(f"{key} {value}" for key, value in method.items() if key not in ("name", "penalty"))
    penalty = method.get("penalty") or {}
    facts = {
        "model": at(recipe, "model.name"),
        "starts from": at(recipe, "model.start_from", ""),
        "method": " ".join(filter(None, (str(method.get("name", "?")), f"({options})" if options else ""))),
        "penalty": ", ".join(f"{key} {value}" for key, value in penalty.items()),
        "selection": ", ".join(f"{key} {at(pruning, key)}" for key in ("criterion", "granularity", "scope")),
        "optimizer": f"{at(optim, 'name')}, learning rate {at(optim, 'lr')}, weight decay {at(optim, 'weight_decay')}",
        "batch": f"{at(recipe, 'train.global_batch')} images per step, precision {at(recipe, 'train.precision')}",
    }
    return [(name, str(value)) for name, value in facts.items() if value] if recipe else []


def environment_facts(environment: Mapping) -> list[tuple[str, str]]:
    facts = [(f"data: {key.replace('_', ' ')}", str(value)) for key, value in at(environment, "data", {}).items()]
    for key in ("device", "processes", "sharding", "threads", "host", "commit"):
        facts.append((key, str(at(environment, key, ""))))
    versions = ", ".join(f"{name} {version}" for name, version in at(environment, "versions", {}).items() if version)
    facts += [("versions", versions), ("command", shlex.join(map(str, at(environment, "command", []))))]
    return [(name, value) for name, value in facts if value not in ("", "None")]


def reproduction(history: History) -> str:
    """Commands that repeat the run from its saved recipe."""
    recipe = shlex.quote(shown_path(history.path / "recipe.yaml"))
    name, processes = shlex.quote(f"name={history.name}-again"), at(history.environment, "processes", 1)
    lines = []
    if commit := at(history.environment, "commit", ""):
        changed = "   # plus uncommitted changes" if str(commit).endswith("+") else ""
        lines.append(f"git checkout {str(commit).rstrip('+')}{changed}")
    sharded = " --use_fsdp --fsdp_version 2" if at(history.environment, "sharding", "") else ""
    many = f"accelerate launch --num_processes {processes}{sharded} -m vit_rsst.train"
    launch = "vit-rsst train" if processes == 1 else many
    lines.append(f"{launch} {recipe} {name}")
    lines.append(f"vit-rsst evaluate {shlex.quote(shown_path(history.path))}")
    return "\n".join(lines)
