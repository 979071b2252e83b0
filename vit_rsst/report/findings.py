"""Key findings of a run: sentences computed from its numbers."""

import math
from collections.abc import Iterator, Mapping

from vit_rsst.evaluation.outcomes import most_confused
from vit_rsst.report.history import History, common_split, number, top1
from vit_rsst.text import size


def findings(history: History, counted: Mapping) -> Iterator[str]:
    """Key findings, the most important first."""
    yield from state_findings(history)
    rows = history.rows
    if rows:
        yield from accuracy_findings(history)
    gaps = [(row.what_if_gap, row.round) for row in rows if row.what_if_gap is not None]
    if gaps:
        worst, round = max(gaps)
        largest = f"; the largest gap is {worst:+.2f}, in round {round}" if worst >= 0.005 else ""
        yield (
            f"Removal alone cost {sum(gap for gap, _ in gaps):.2f} points of validation top-1 in total over "
            f"{len(gaps)} rounds{largest}."
        )
    if len(rows) > 1 and rows[0].ticket_bytes:
        share = rows[-1].ticket_bytes / rows[0].ticket_bytes
        yield f"The last ticket takes {size(rows[-1].ticket_bytes)}, {share:.2f} × the ticket of round {rows[0].round}."
    if counted:
        yield complexity_finding(counted)
    if history.pruning and (layers := history.pruning[-1].get("layers")) and rows[-1].density < 1:
        name = min(layers, key=lambda layer: layers[layer]["density"])
        yield f"Sparsest layer: {name.removesuffix('.weight')} ({layers[name]['density']:.1%} of weights kept)."
    yield from confusion_findings(history.scores)


def state_findings(history: History) -> Iterator[str]:
    status, epochs = history.status, history.epochs
    where = f"round {status.get('round', 0)}, epoch {status.get('epoch', 0)}, step {status.get('step', 0):,}"
    if history.state == "failed":
        yield f"The run failed at {where}: {status.get('reason') or 'no reason was recorded'}"
    if history.state == "stopped":
        yield f"The run stopped cleanly at {where}; run the same command to resume."
    if history.state == "lost":
        yield f"The run was killed after {where}: no process is working on it. Run the same command to resume."
    if history.state == "running":
        yield f"The run is in progress, last seen at {where}; all numbers are preliminary."
    if epochs and not history.rows:
        last = epochs[-1]
        yield (
            f"No round has finished yet. After {len(epochs)} epochs validation top-1 is "
            f"{number(last, 'val/top1'):.2f} % and validation loss {number(last, 'val/loss'):.4f}."
        )
    if not epochs and not history.rows:
        yield "No epoch has finished yet, so there is no accuracy to report."


def accuracy_findings(history: History) -> Iterator[str]:
    rows = history.rows
    last, first = rows[-1], rows[0]
    split = common_split(rows)
    score = top1(last, split)
    text = f"The last ticket keeps {last.density:.1%} of the prunable weights and reaches {score:.2f} % {split} top-1"
    if len(rows) > 1:
        dense = top1(first, split)
        against = f"the ticket of round {first.round} at density {first.density:.2f} ({dense:.2f} %)"
        text += f", {points(score - dense)} {against}"
    yield text + "."
    best = max(rows, key=lambda row: row.val_top1)
    if best is not last:
        yield (
            f"Best ticket by validation: round {best.round} at density {best.density:.2f}, with {best.val_top1:.2f} % "
            "validation top-1" + (f" and {best.test_top1:.2f} % test top-1." if split == "test" else ".")
        )
    tested = sum(map(sum, history.scores.get("confusion", ())))
    if tested and split == "test":
        error = math.sqrt(max(score * (100 - score), 0.0) / tested)
        yield f"One standard error on {tested:,} test images is {error:.2f} points; ignore smaller differences."


def points(difference: float) -> str:
    if abs(difference) < 0.005:
        return "on par with"
    return f"{abs(difference):.2f} points {'above' if difference > 0 else 'below'}"


def complexity_finding(counted: Mapping) -> str:
    dense, slim = counted["flops"]["dense"], counted["flops"]["slim"]
    if slim < dense:
        parameters = counted["parameters"]
        return (
            f"With dead units cut out the model has {parameters['slim'] / parameters['total']:.0%} of the parameters "
            f"and {slim / dense:.0%} of the FLOPs: {slim / 1e6:,.1f} of {dense / 1e6:,.1f} MFLOPs per image."
        )
    if counted["parameters"]["density"] < 1:
        share = counted["flops"]["effective"] / dense
        return (
            f"No whole unit is dead, so ordinary hardware still computes all {dense / 1e6:,.1f} MFLOPs per image; "
            f"hardware that skips every zero would compute {share:.0%} of them."
        )
    return f"One image costs {dense / 1e6:,.1f} MFLOPs."


def confusion_findings(scores: Mapping) -> Iterator[str]:
    for n, true, predicted in most_confused(scores.get("confusion", ()), 1):
        if n > 1:
            names, images = scores["classes"], sum(scores["confusion"][true])
            yield f"Most frequent confusion: {names[true]} predicted as {names[predicted]}, {n} of {images} images."
