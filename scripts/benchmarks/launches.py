"""Host-device synchronizations and kernel launches per training step, counted without a GPU.

Steps of this project and of a bare loop run on the stand-in device `meta`: loader (crop, flip, erasing, mixing),
forward, backward, clipping, fused optimizer, pruning, averaging. Counted are reads from the device by the host,
blocking copies, and calls that launch kernels; a `foreach` call over tensors of one dtype counts once.
"""

import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from _common import environment, parse_args, report
from _stand_in import Counting, batches, begin_phase, stand_in
from torch import nn

from vit_rsst import loop
from vit_rsst.pruning.methods.dense import Dense
from vit_rsst.pruning.methods.gmp import Gmp
from vit_rsst.pruning.methods.imp import Imp
from vit_rsst.pruning.methods.rigl import RigL
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.methods.set import SparseEvolutionary
from vit_rsst.pruning.methods.ste import StraightThrough
from vit_rsst.pruning.plan import Method, Penalty
from vit_rsst.recipe.schema import Augment, Data, Model, Optim, Pruning, Recipe, Schedule, Train
from vit_rsst.training import optim
from vit_rsst.training.readings import Reading

WAITS, WAITS_LOGGED, WAITS_MOVING, COPIES, PRUNING = 0, 1, 2, 0, 6
"""Bounds per step: waits, waits of a logging step and of one that moves the mask, blocking copies, kernels added by
pruning to a dense step."""
BARE, DENSE = "bare loop", "dense"
PLAIN, STRONG = Augment(hflip=0.5), Augment(hflip=0.5, mixup=0.8, cutmix=1.0, reprob=0.25)
COUPLED, LEARNT = {"coupling": "gradient", "strength": 0.3}, {"condemned_gradient": True}
PENALTIES = {
    "rsst": {},
    "rsst coupled to the gradient": COUPLED,
    "rsst that lets the condemned learn": LEARNT,
    "rsst coupled to the gradient that lets the condemned learn": COUPLED | LEARNT,
}


@dataclass(frozen=True)
class Case:
    """One step to count.

    Attributes:
        like: the corresponding case without pruning.
        is_due: the method selects a new mask in this step, which may launch more kernels.
    """

    method: Method
    phase: str
    like: str = DENSE
    augment: Augment = PLAIN
    accumulation: int = 1
    ema: float | None = None
    teacher: bool = False
    logs: bool = False
    optimizer: str = "adamw"
    criterion: str = "magnitude"
    granularity: str = "element"
    is_due: bool = False

    @property
    def moves(self) -> bool:
        """Moves the mask at constant density: how many are alive is read, and set draws on the host."""
        return self.is_due and isinstance(self.method, SparseEvolutionary)

    def recipe(self) -> Recipe:
        return Recipe(
            name="stand-in",
            data=Data(source="cifar10", augment=self.augment),
            model=Model(args={"depth": 3, "embed_dim": 48, "num_heads": 3}),
            optim=Optim(name=self.optimizer),
            train=Train(epochs=2, global_batch=64, batch_per_device=64 // self.accumulation, ema_decay=self.ema),
            pruning=Pruning(
                method=self.method,
                schedule=Schedule(rounds=1, final_sparsity=0.5),
                criterion=self.criterion,
                granularity=self.granularity,
            ),
        )


def rsst(**penalty: object) -> Rsst:
    """With a window as long as the round."""
    return Rsst(Penalty(window=(0.0, 1.0), **penalty), remove_at=1.0)


CASES = {
    DENSE: Case(Dense(), "dense"),
    "dense, a step that logs": Case(Dense(), "dense", logs=True),
    "dense, sgd": Case(Dense(), "dense", optimizer="sgd"),
    "dense, accumulation 4": Case(Dense(), "dense", accumulation=4),
    "dense, strong augmentation": Case(Dense(), "dense", augment=STRONG),
    "dense, ema": Case(Dense(), "dense", ema=0.99),
    "dense, distillation": Case(Dense(), "dense", teacher=True),
    "rsst in its window": Case(rsst(), "window"),
    "rsst in its window, sgd": Case(rsst(), "window", "dense, sgd", optimizer="sgd"),
    "rsst in its window, accumulation 4": Case(rsst(), "window", "dense, accumulation 4", accumulation=4),
    "rsst in its window, strong augmentation": Case(rsst(), "window", "dense, strong augmentation", STRONG),
    "rsst in its window, ema": Case(rsst(), "window", "dense, ema", ema=0.99),
    "rsst in its window, distillation": Case(rsst(), "window", "dense, distillation", teacher=True),
    "rsst after its window": Case(rsst(), "masked"),
    "imp": Case(Imp(), "masked"),
    "imp by movement": Case(Imp(), "masked", criterion="movement"),
    "gmp": Case(Gmp(interval=10**6), "masked"),
    "ste": Case(StraightThrough(interval=10**6), "ste"),
    "gmp, a step that removes": Case(Gmp((0.0, 1.0), 1), "masked", is_due=True),
    "ste, a step that chooses": Case(StraightThrough((0.0, 1.0), 1), "ste", is_due=True),
    "set": Case(SparseEvolutionary(interval=1000), "masked"),
    "rigl": Case(RigL(interval=1000), "masked"),
    "set, a step that moves": Case(SparseEvolutionary((0.0, 1.0), 1), "masked", is_due=True),
    "rigl, a step that moves": Case(RigL((0.0, 1.0), 1), "masked", is_due=True),
    "set of 2:4, a step that moves": Case(SparseEvolutionary((0.0, 1.0), 1), "masked", granularity="2:4", is_due=True),
    "rigl of 2:4, a step that moves": Case(RigL((0.0, 1.0), 1), "masked", granularity="2:4", is_due=True),
    "ste, ema": Case(StraightThrough(interval=10**6), "ste", "dense, ema", ema=0.99),
} | {
    f"{name}, by {criterion}, in a later window, {optimizer}": Case(
        rsst(**penalty), "later window", like, optimizer=optimizer, criterion=criterion
    )
    for name, penalty in PENALTIES.items()
    for criterion in ("magnitude", "movement")
    for optimizer, like in (("adamw", DENSE), ("sgd", "dense, sgd"))
}
"""Of rsst in a later window, all forms of the penalty: what a step adds depends on them, the criterion and the
optimizer."""


def count(case: Case, folder: Path) -> Counting:
    """Counts one step, after two that allocate the optimizer's state."""
    with redirect_stdout(StringIO()):
        run, _ = stand_in(case.recipe(), folder, case.teacher)
    with Counting():
        begin_phase(run, case.phase)
        for _ in range(2):
            step(run, logs=case.logs)
    with Counting() as counting:
        step(run, logs=case.logs)
    return counting


def step(run: loop.Run, logs: bool) -> None:
    """One step, as in `loop.train_epoch`."""
    loop.seed_step(run)
    optim.set_lr_(run.optimizer, 1e-3)
    loss, norm = loop.train_step(run, batches(run))
    run.progress.advance()
    run.readings.note(Reading(run.progress.global_step, {}, {}), loss, norm)
    if logs:
        run.readings.turn()


def count_bare(folder: Path) -> Counting:
    """Counts one step of a bare, hand-written loop with the same batches."""
    with redirect_stdout(StringIO()):
        run, _ = stand_in(CASES[DENSE].recipe(), folder)
    inner = run.optimizer.optimizer

    def bare() -> None:
        [(images, labels)] = batches(run)
        nn.functional.cross_entropy(run.net(images), labels).backward()
        nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
        inner.step()
        inner.zero_grad()

    with Counting():
        bare()
    with Counting() as counting:
        bare()
    return counting


def judge(found: dict[str, Counting]) -> list[str]:
    """A sentence for each missed bound."""
    missed = []
    for name, counting in found.items():
        waits, copies = sum(counting.waits.values()), sum(counting.copies.values())
        moves = name in CASES and CASES[name].moves
        bound = WAITS_MOVING if moves else WAITS_LOGGED if name in CASES and CASES[name].logs else WAITS
        if waits > bound:
            missed.append(f"{name}: waits {waits} times ({dict(counting.waits)}), bound {bound}")
        if copies > COPIES and not moves:
            missed.append(f"{name}: {copies} blocking copies ({dict(counting.copies)}), bound {COPIES}")
        if (added := added_by_pruning(name, found)) is not None and added > PRUNING:
            more = counting.kernels - found[CASES[name].like].kernels
            missed.append(f"{name}: pruning adds {added} kernels ({dict(more)}), bound {PRUNING}")
    return missed


def added_by_pruning(name: str, found: dict[str, Counting]) -> int | None:
    if name not in CASES or CASES[name].phase == "dense" or CASES[name].is_due:
        return None
    return found[name].kernels.total() - found[CASES[name].like].kernels.total()


def main() -> int:
    args = parse_args(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        found = {BARE: count_bare(Path(folder))} | {name: count(case, Path(folder)) for name, case in CASES.items()}
    rows, cases = [], {}
    for name, counting in found.items():
        added = added_by_pruning(name, found)
        numbers = (
            counting.waits.total(),
            counting.copies.total(),
            counting.kernels.total(),
            "" if added is None else added,
        )
        rows.append((name, *map(str, numbers)))
        cases[name] = {"waits": counting.waits, "copies": counting.copies, "kernels": counting.kernels, "added": added}
    result = {"environment": environment(torch.device("cpu")), "missed": judge(found), "cases": cases}
    return report(args, result, ("a step", "waits", "blocking copies", "kernels", "of pruning"), rows)


if __name__ == "__main__":
    sys.exit(main())
