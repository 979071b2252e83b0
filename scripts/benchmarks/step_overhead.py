"""Cost of a step in an rsst round compared with a bare PyTorch loop, and memory of its masks.

RSST pays off only if masks and penalty are nearly free. The project's loop (`loop.train_epoch`: loader, Accelerate,
controller, seeding, console, tracker) is compared with a hand-written one: the same vit_tiny (32 px, patch 4, width
192, depth 9), random images in memory, augmentation, AdamW with decay and clipping, loss and gradient norm logged every
step. The peers are other ways to mask; `bare loop, again` shows the noise: a ratio as close to 1 as that row is not
significant.

`Pruner` is the bare loop with the library's hooks, in each phase of the project's loop; its ratio is to that loop.

The contenders alternate in short blocks, in one process and in random order. A ratio compares two blocks of one
alternation; its median and 95 % interval are printed. A bound is missed if the whole interval is above it; with --quick
the intervals are too wide to be meaningful.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path

import numpy as np
import torch
from _common import Interval, alternate, environment, interval, parse_args, report
from _plain_loop import MASKINGS, PlainLoop, accelerated_loop, masked_loop, plain_loop
from _runs import begin_run, train_epoch
from accelerate.state import AcceleratorState
from torch import Tensor

import vit_rsst
from vit_rsst.data.loaders import InMemoryLoader, placed
from vit_rsst.data.tables import Split
from vit_rsst.pruning.controller import Controller
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Penalty
from vit_rsst.recipe.schema import Augment, Data, Pruning, Recipe, Schedule, Train
from vit_rsst.run.state import Run

RATIO_BOUNDS = {64: 1.03, 8: 1.05}
"""Batch size → maximum ratio of the project's step to the bare loop's, in every phase of a round."""
PRUNER_BOUND = 1.01
"""Maximum ratio of a bare loop's step with a `Pruner` to that of the project's loop in the same phase."""
BYTES_BOUND = 2.0
"""Maximum bytes per prunable weight of masks and condemned sets inside the window."""

ALTERNATIONS, QUICK_ALTERNATIONS, WARMUPS = 40, 3, 2
IMAGES_PER_BLOCK = {"cpu": 128, "cuda": 2048}
NUM_IMAGES, NUM_CLASSES, SPARSITY = 4096, 10, 0.5
BARE = "bare loop"
PHASES = ("dense round", "inside the window", "after the removal")
PRUNER = "Pruner, "


@dataclass(frozen=True)
class Case:
    """One comparison: every contender trains up to `blocks` blocks of `steps` steps; the last is never reached."""

    batch: int
    precision: str
    steps: int
    blocks: int

    def recipe(self, folder: Path, phase: str) -> Recipe:
        """Round 0 dense, round 1 of rsst; an epoch is a block."""
        end = 1 / self.blocks if phase == "after the removal" else 1.0  # removes in the first warm-up, or never
        return Recipe(
            name=phase,
            output_dir=str(folder),
            data=Data(source="digits", augment=Augment(hflip=0.5)),
            train=Train(
                epochs=self.blocks,
                steps_per_epoch=self.steps,
                global_batch=self.batch,
                precision=self.precision,
                log_every_steps=1,
            ),
            pruning=Pruning(
                method=Rsst(Penalty(window=(0.0, end)), remove_at=end),
                schedule=Schedule(rounds=1, final_sparsity=SPARSITY),
            ),
        )

    def __str__(self) -> str:
        return f"batch {self.batch}, {'fp32' if self.precision == 'no' else self.precision}"


def phase_run(case: Case, folder: Path, phase: str, split: Split) -> Run:
    """The project's run at the start of the round with this phase."""
    return begin_run(case.recipe(folder, phase), split, round=0 if phase == "dense round" else 1)


def pruner_loop(case: Case, phase: str, recipe: Recipe, data: InMemoryLoader, log: Path) -> PlainLoop:
    """The bare loop with the library's hooks, in the phase that its name says."""
    plain, total = plain_loop(recipe, data, log), case.steps * case.blocks
    vit_rsst.Pruner(
        plain.net, plain.optimizer, total_steps=total, dense_steps=total - 1 if phase == "dense round" else 0,
        rounds=1, method=case.recipe(Path(), phase).pruning.method, final_sparsity=SPARSITY,
    )  # fmt: skip
    return plain


def check_phases(runs: Mapping[str, Run]) -> None:
    """Checks that the runs were in the phases that their names say."""
    found = [(round(run.controller.mask.density, 3), run.controller.condemned is not None) for run in runs.values()]
    assert found == [(1.0, False), (1.0, True), (1 - SPARSITY, False)], found


def mask_bytes(controller: Controller) -> float:
    """Bytes per prunable weight of all tensors of the controller except model, optimizer and rewind point."""
    found: dict[int, int] = {}

    def walk(value: object) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            walk([*value.values()])
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        elif is_dataclass(value):
            walk(vars(value))

    walk({k: v for k, v in vars(controller).items() if k not in ("model", "weights", "optimizer", "rewind_point")})
    for tensor in controller.model.state_dict().values():  # the controller also references the weights
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values()) / controller.mask.num_elements


def measure(case: Case, num_alternations: int, device: torch.device, folder: Path) -> dict:
    """Times of all contenders, and the memory of masks and condemned sets inside the window."""
    AcceleratorState._reset_state(reset_partial_state=True)  # precision is otherwise fixed once per process
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=random)
    split = placed(Split(images, torch.arange(NUM_IMAGES) % NUM_CLASSES), device)
    runs = {phase: phase_run(case, folder, phase, split) for phase in PHASES}
    inside = runs["inside the window"].controller
    target = inside.mask.minus(inside.condemned)
    by_hand = (case.recipe(folder, BARE), runs["dense round"].loader, folder / "log.jsonl")
    loops = {
        BARE: plain_loop(*by_hand),
        f"{BARE}, again": plain_loop(*by_hand),
        "plain Accelerate loop": accelerated_loop(*by_hand),
    }
    loops |= {peer: masked_loop(peer, target, *by_hand) for peer in MASKINGS}
    loops |= {f"{PRUNER}{phase}": pruner_loop(case, phase, *by_hand) for phase in PHASES}
    contenders = {name: plain.train_block for name, plain in loops.items()}
    contenders |= {phase: lambda run=run: train_epoch(run) for phase, run in runs.items()}
    seconds = alternate(contenders, num_alternations, WARMUPS, device)
    check_phases(runs)
    timings = {
        name: {
            "ms_a_step": round(1000 * float(np.median(values)) / case.steps, 3),
            "ratio": asdict(interval(values / seconds[name.removeprefix(PRUNER) if name.startswith(PRUNER) else BARE])),
            "bound": RATIO_BOUNDS[case.batch] if name in PHASES else PRUNER_BOUND if name.startswith(PRUNER) else None,
        }
        for name, values in seconds.items()
    }
    return asdict(case) | {"case": str(case), "bytes_a_weight": mask_bytes(inside), "contenders": timings}


def judge(case: dict) -> tuple[list[tuple[str, ...]], list[str]]:
    """Table rows of the case, and a sentence for each missed bound."""
    rows, missed = [], []
    for name, timing in case["contenders"].items():
        ratio, bound = Interval(**timing["ratio"]), timing["bound"]
        shown = f"{name} (to the trainer)" if name.startswith(PRUNER) else name
        rows.append((f"{case['case']}: {shown}", f"{timing['ms_a_step']:.2f}", str(ratio), str(bound or "")))
        if bound is not None and ratio.exceeds(bound):
            base = "the trainer's" if name.startswith(PRUNER) else "the bare loop's"
            missed.append(f"{case['case']}: {name} takes {ratio} of {base} step, bound {bound}")
    rows.append((f"{case['case']}: mask bytes per weight", "", f"{case['bytes_a_weight']:.3f}", str(BYTES_BOUND)))
    if case["bytes_a_weight"] > BYTES_BOUND:
        missed.append(f"{case['case']}: masks take {case['bytes_a_weight']:.3f} bytes per weight, bound {BYTES_BOUND}")
    return rows, missed


def main() -> int:
    args = parse_args(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_alternations = QUICK_ALTERNATIONS if args.quick else ALTERNATIONS
    load_before, cases = os.getloadavg()[0], []
    for precision in ("no", "bf16") if device.type == "cuda" else ("no",):
        for batch in RATIO_BOUNDS:
            case = Case(batch, precision, IMAGES_PER_BLOCK[device.type] // batch, WARMUPS + num_alternations + 1)
            with tempfile.TemporaryDirectory() as folder:
                cases.append(measure(case, num_alternations, device, Path(folder)))
    result = {
        "environment": environment(device),
        "load": {"before": load_before, "after": os.getloadavg()[0]},
        "alternations": num_alternations,
        "missed": [sentence for case in cases for sentence in judge(case)[1]],
        "cases": cases,
    }
    rows = [row for case in cases for row in judge(case)[0]]
    return report(args, result, ("step_overhead", "ms/step", "ratio to bare loop  [95 %]", "bound"), rows)


if __name__ == "__main__":
    sys.exit(main())
