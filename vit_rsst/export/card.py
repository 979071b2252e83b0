"""The model card of an export: its content, its scores, and how to load it. README.md with YAML front matter."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import vit_rsst
from vit_rsst.data.catalog import CATALOG
from vit_rsst.data.decoding import resized_side
from vit_rsst.export.semi_structured import note
from vit_rsst.export.work import Section, Work
from vit_rsst.models.anatomy import unit_groups
from vit_rsst.recipe import strict_yaml
from vit_rsst.text import size

MOST_CLASSES = 20


@dataclass(frozen=True)
class Card:
    """Content of a model card.

    Attributes:
        name: of the folder.
        library: that loads it, by its name on the Hub.
        net: the exported network.
        file: the file that holds it.
        compared: a sentence on the comparison with the ticket; may be empty.
        usage: Python code that loads it.
        measured: sections on speed and accuracy.
    """

    work: Work
    name: str
    library: str
    net: nn.Module
    file: Path
    compared: str
    usage: str
    measured: Sequence[Section] = ()

    def text(self) -> str:
        """README.md, with its YAML front matter."""
        work, header, mask = self.work, self.work.header, self.work.trained.mask
        parts = [
            f"---\n{strict_yaml.dump(_front(self))}---",
            f"# {self.name}",
            f"An image classifier, `{header.get('model', work.architecture)}` (`{work.architecture}`), trained and "
            f"pruned with vit_rsst using the method `{header.get('method', 'unknown')}`. It keeps {mask.density:.2%} "
            f"of its prunable weights (sparsity {1 - mask.density:.2%}). {_scores(work)}",
            _sizes(self),
            self.compared,
            note(work),
            *map(_section, self.measured),
            _units(work),
            _data(work),
            f"## Usage\n\n```python\n{self.usage}```",
            _origin(work),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def of_ticket(work: Work, name: str) -> str:
    """The card of a ticket pushed without conversion."""
    usage = (
        "from pathlib import Path\n\nfrom vit_rsst.models import zoo\nfrom vit_rsst.tickets import ticket_file\n\n"
        f'ticket = ticket_file.load(Path("{work.path.name}"))\n'
        'model = zoo.described(ticket.metadata, "ticket").eval()\n'
        'ticket_file.load_into_(model, ticket, "ticket")\n'
    )
    return Card(work, name, "vit_rsst", work.net, work.path, "", usage).text()


def _front(card: Card) -> dict:
    source = card.work.trained.data.source
    hub_id = CATALOG[source].hub_id if source in CATALOG else None
    tags = ["image-classification", "pruning", "sparse", "vit_rsst"]
    front = {"library_name": card.library, "pipeline_tag": "image-classification", "tags": tags}
    if hub_id:
        front["datasets"] = [hub_id]
    if (top1 := card.work.measured().get("test_top1")) is not None:
        metric = {"type": "accuracy", "name": "test top-1", "value": round(top1 / 100, 6)}
        dataset, task = {"name": source, "type": hub_id or source}, {"type": "image-classification"}
        front["metrics"] = ["accuracy"]
        result = {"task": task, "dataset": dataset, "metrics": [metric]}
        front["model-index"] = [{"name": card.name, "results": [result]}]
    return front


def _scores(work: Work) -> str:
    scores = work.measured()
    if "test_top1" not in scores:
        return "Its test accuracy was not measured."
    precision = work.header.get("precision", "no")
    return (
        f"Test top-1: {scores['test_top1']:.2f} % (measured on the ticket, "
        f"{'in float32' if precision == 'no' else f'under {precision} autocast'})."
    )


def _sizes(card: Card) -> str:
    work, before, after = card.work, _counted(card.work.net), _counted(card.net)
    dense = sum(t.numel() * t.element_size() for t in work.net.state_dict().values())
    ticket = f"ticket {size(work.path.stat().st_size)}, " if work.path.is_file() else ""
    return _table(
        ("", "before", "here"),
        ("parameters", f"{before[0]:,}", f"{after[0]:,}"),
        ("non-zero parameters", f"{before[1]:,}", f"{after[1]:,}"),
        ("file", f"{ticket}dense tensors {size(dense)}", f"`{card.file.name}` {size(card.file.stat().st_size)}"),
    )


def _section(section: Section) -> str:
    parts = (f"## {section.title}", _table(*section.rows) if section.rows else "", " ".join(section.sentences))
    return "\n\n".join(filter(None, parts))


def _counted(net: nn.Module) -> tuple[int, int]:
    """Parameters, and non-zero parameters."""
    return sum(p.numel() for p in net.parameters()), sum(int(torch.count_nonzero(p)) for p in net.parameters())


def _units(work: Work) -> str:
    """Remaining units per block, out of those of the architecture."""
    groups = unit_groups(work.net)
    kinds = list(dict.fromkeys(group.kind for group in groups))
    rows: dict[int, dict[str, list[str]]] = {}
    for group in groups:
        cells = rows.setdefault(group.depth, {kind: [] for kind in kinds})
        cells[group.kind].append(f"{len(work.slim.kept[group.name])} of {group.units}")
    if not rows:
        return ""
    lines = [(str(depth), *(", ".join(cells[kind]) for kind in kinds)) for depth, cells in rows.items()]
    return "## Remaining units\n\n" + _table(("block", *(f"{kind}s" for kind in kinds)), *lines)


def _data(work: Work) -> str:
    trained = work.trained
    classes, side = trained.classes, trained.data.size
    shorter, kernel = resized_side(side, trained.data.crop_share), trained.data.resampling
    mean, std = _numbers(trained.mean), _numbers(trained.std)
    more = f" … ({len(classes)} in all)" if len(classes) > MOST_CLASSES else ""
    return (
        "## Data\n\n"
        f"Source: `{trained.data.source}`. {len(classes)} classes: {', '.join(classes[:MOST_CLASSES])}{more}.\n\n"
        f"Preprocessing: RGB, shorter side resized to {shorter} px ({kernel}), centre crop to {side} × {side} px, "
        f"divided by 255, normalised with mean {mean} and standard deviation {std}."
    )


def _origin(work: Work) -> str:
    header = work.header
    named = ("recipe", "round", "seed", "precision")
    lines = [(key, f"`{header[key]}`") for key in named if key in header]
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    return "## Origin\n\n" + _table(("", ""), *lines, ("exported by", versions))


def _versions() -> Mapping[str, str]:
    packages = ("torch", "timm", "transformers", "safetensors")
    return {"vit_rsst": vit_rsst.__version__} | {name: importlib.metadata.version(name) for name in packages}


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(map(str, values))})"


def _table(head: tuple[str, ...], *lines: tuple[str, ...]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))
