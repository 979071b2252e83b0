"""What the numbers of a run say, in sentences computed from them."""

import math
from collections.abc import Iterator, Mapping

from vit_rsst.report.history import History, common_split, number, top1
from vit_rsst.text import size


def findings(history: History, counted: Mapping) -> Iterator[str]:
    """Sentences computed from the numbers."""
    yield from state_findings(history)
    rows = history.rows
    if rows:
        yield from accuracy_findings(history)
    gaps = [(row.what_if_gap, row.round) for row in rows if row.what_if_gap is not None]
    if gaps:
        worst, round = max(gaps)
        dearest = f"; the dearest was {worst:+.2f} in round {round}" if worst >= 0.005 else ""
        yield (
            f"The removals alone cost {sum(gap for gap, _ in gaps):.2f} points of validation top-1 in sum over "
            f"{len(gaps)} rounds{dearest}."
        )
    if len(rows) > 1 and rows[0].ticket_bytes:
        share = rows[-1].ticket_bytes / rows[0].ticket_bytes
        yield f"The last ticket takes {size(rows[-1].ticket_bytes)}, {share:.2f} of the one of round {rows[0].round}."
    if counted:
        yield complexity_finding(counted)
    if history.pruning and (layers := history.pruning[-1].get("layers")) and rows[-1].density < 1:
        name = min(layers, key=lambda layer: layers[layer]["density"])
        yield f"The emptiest layer is {name.removesuffix('.weight')}: {layers[name]['density']:.1%} of it is left."
    yield from confusion_findings(history.scores)


def state_findings(history: History) -> Iterator[str]:
    status, epochs = history.status, history.epochs
    where = f"round {status.get('round', 0)}, epoch {status.get('epoch', 0)}, step {status.get('step', 0):,}"
    if history.state == "failed":
        yield f"The run failed at {where}: {status.get('reason') or 'without a reason that it could write'}"
    if history.state == "stopped":
        yield f"The run stopped cleanly at {where} and goes on with the same command."
    if history.state == "lost":
        yield f"The run was killed after {where}: no process holds it any more. The same command goes on from there."
    if history.state == "running":
        yield f"The run was last heard of at {where}; the numbers are those so far."
    if epochs and not history.rows:
        last = epochs[-1]
        yield (
            f"No round has ended yet. After {len(epochs)} epochs validation top-1 is {number(last, 'val/top1'):.2f} "
            f"and the loss {number(last, 'val/loss'):.4f}."
        )
    if not epochs and not history.rows:
        yield "No epoch has ended yet: there is nothing to say of the accuracy."


def accuracy_findings(history: History) -> Iterator[str]:
    rows = history.rows
    last, first = rows[-1], rows[0]
    split = common_split(rows)
    score = top1(last, split)
    text = (
        f"The last ticket holds {last.density:.1%} of the prunable weights and scores {score:.2f} % on {split} images"
    )
    if len(rows) > 1:
        dense = top1(first, split)
        against = f"the ticket of round {first.round}, of density {first.density:.2f} ({dense:.2f} %)"
        text += f", {points(score - dense)} {against}"
    yield text + "."
    best = max(rows, key=lambda row: row.val_top1)
    if best is not last:
        yield (
            f"By validation the best ticket is that of round {best.round}, of density {best.density:.2f}: "
            f"{best.val_top1:.2f} % there"
            + (f", {best.test_top1:.2f} % on the test split." if split == "test" else ".")
        )
    tested = sum(map(sum, history.scores.get("confusion", ())))
    if tested and split == "test":
        error = math.sqrt(max(score * (100 - score), 0.0) / tested)
        yield f"On {tested:,} test images one standard error is {error:.2f} points; smaller differences say nothing."


def points(difference: float) -> str:
    if abs(difference) < 0.005:
        return "the same as"
    return f"{abs(difference):.2f} points {'above' if difference > 0 else 'below'}"


def complexity_finding(counted: Mapping) -> str:
    dense, slim = counted["flops"]["dense"], counted["flops"]["slim"]
    if slim < dense:
        parameters = counted["parameters"]
        return (
            f"With its dead units cut out it has {parameters['slim'] / parameters['total']:.0%} of the parameters and "
            f"{slim / dense:.0%} of the FLOPs: {slim / 1e6:,.1f} of {dense / 1e6:,.1f} million an image."
        )
    if counted["parameters"]["density"] < 1:
        share = counted["flops"]["effective"] / dense
        return (
            f"No whole unit is dead, so that a usual machine computes all {dense / 1e6:,.1f} million FLOPs; one that "
            f"skips every zero would compute {share:.0%} of them."
        )
    return f"One image costs {dense / 1e6:,.1f} million FLOPs."


def confusion_findings(scores: Mapping) -> Iterator[str]:
    pairs = [
        (n, a, b)
        for a, row in enumerate(scores.get("confusion", ()))
        for b, n in enumerate(row)
        if a != b and n > 1
    ]  # fmt: skip
    if pairs:
        n, a, b = max(pairs)
        names = scores["classes"]
        yield f"Most often {names[a]} is taken for {names[b]}: {n} of {sum(scores['confusion'][a])} images."
