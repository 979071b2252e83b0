"""Rounds of a training that is counted in optimizer steps: a dense part, equal parts that each prune, a recovery."""

from itertools import pairwise
from numbers import Integral

from vit_rsst.errors import InputError
from vit_rsst.progress import Progress, at_fraction
from vit_rsst.recipe.schema import Pruning

Steps = int | float
"""A number of steps, or a fraction (0 ≤ x < 1) of all steps."""


def rounds_in_steps(
    pruning: Pruning, total: int, dense: Steps | None, recovery: Steps | None, rounds: int | None
) -> Progress:
    """Position before the first step; an epoch of it is one step.

    Args:
        total: optimizer steps of the whole training.
        dense: steps of round 0; None: as many as of a later round.
        recovery: steps after the last round that prunes; None: 0.
        rounds: as the caller gave it.

    Raises:
        InputError: the steps do not hold the rounds, or have no meaning for a method of one round.
    """
    if isinstance(total, bool) or not isinstance(total, Integral) or total < 1:
        raise InputError(f"Pruner(total_steps=…): {total!r} is not a whole number of at least 1.")
    total = int(total)
    given = {"dense_steps": dense, "recovery_steps": recovery, "rounds": rounds}
    if pruning.method.one_round:
        for name in (name for name, value in given.items() if value is not None):
            raise InputError(
                f"Pruner({name}=…): has no effect with {pruning.method_name}, which has one round; omit it."
            )
        return Progress(1, (total,))
    num_rounds = pruning.schedule.num_rounds + pruning.method.extra_rounds
    after = 0 if recovery is None else _counted("recovery_steps", recovery, total)
    before = (total - after) // (num_rounds + 1) if dense is None else _counted("dense_steps", dense, total)
    left = total - before - after
    if left < num_rounds:
        raise InputError(
            f"Pruner(total_steps=…): {total} steps, less {before} dense and {after} of recovery, do not hold "
            f"{num_rounds} rounds; pass the number of optimizer steps of the whole training, or fewer rounds."
        )
    ends = [at_fraction(number / num_rounds, left) for number in range(num_rounds + 1)]
    parts = [end - start for start, end in pairwise(ends)]
    return Progress(1, (before, *parts, *([after] if after else [])))


def _counted(name: str, value: Steps, total: int) -> int:
    is_fraction = isinstance(value, float) and 0 <= value < 1
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < total
    if not (is_fraction or is_count):
        raise InputError(
            f"Pruner({name}=…): {value!r} is neither a number of steps below total_steps={total} nor a fraction of "
            "them, 0 ≤ x < 1."
        )
    return at_fraction(value, total) if is_fraction else int(value)
