"""Draws runs side by side from their metrics.jsonl: validation accuracy and density over epochs. Needs matplotlib.

python scripts/plot_runs.py runs/cifar10-cpu-imp runs/cifar10-cpu-rsst --out methods.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def epochs(run: Path) -> list[dict]:
    """The epoch events of a run, in order."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "epoch"]


def draw(runs: list[Path], out: Path) -> None:
    """Two panels that share the axis of epochs."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"})
    figure, (accuracy, density) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, height_ratios=(3, 1))
    for run in runs:
        events = epochs(run)
        x = range(1, len(events) + 1)
        accuracy.plot(x, [e["val/top1"] for e in events], label=run.name, linewidth=1.4)
        density.step(x, [e["prune/density"] for e in events], where="post", linewidth=1.4)
    accuracy.set_ylabel("validation top-1, %")
    accuracy.legend(frameon=False)
    density.set(ylabel="density", xlabel="epoch", ylim=(0, 1.05))
    for axes in (accuracy, density):
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="a .svg or .png file")
    arguments = parser.parse_args()
    draw(arguments.runs, arguments.out)


if __name__ == "__main__":
    main()
