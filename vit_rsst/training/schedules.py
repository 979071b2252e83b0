"""Schedules as pure functions: penalty ramps, sparsity curves, learning rates.

Nothing here knows about epochs, tensors or optimizers: `progress` converts epochs to steps, and the controller and the
loop look up the value at a step.
"""

import math
from collections.abc import Callable, Sequence

RAMPS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda x, p: x,
    "quadratic": lambda x, p: x**2,
    "cubic": lambda x, p: x**3,
    "exponential": lambda x, p: math.expm1(x**p) / math.expm1(1.0),
    "cosine": lambda x, p: (1.0 - math.cos(math.pi * x)) / 2.0,
}
"""φ(x, p): fraction of the penalty window → penalty strength; φ(0) = 0, φ(1) = 1, non-decreasing."""

SPARSITY_CURVES: dict[str, Callable[[float, float], float]] = {
    "geometric": lambda f, final: 1.0 - (1.0 - final) ** f,
    "cubic": lambda f, final: final * (1.0 - (1.0 - f) ** 3),  # Zhu & Gupta 2017, eq. 1
    "linear": lambda f, final: final * f,
}
"""s(f, final): fraction of the rounds (or steps) → sparsity; s(0) = 0, s(1) = final."""


def ramp(name: str, x: float, exponent: float) -> float:
    """Penalty strength at fraction `x` of its window, `x` clipped to 0 … 1."""
    return RAMPS[name](min(max(x, 0.0), 1.0), exponent)


def learning_rate(
    step: int,
    num_steps: int,
    *,
    lr: float,
    warmup: float,
    schedule: str,
    min_lr: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """Learning rate at one of `num_steps` steps.

    Args:
        step: index of the step, from 0; may be fractional (a schedule replayed from its middle).
        num_steps: length of the schedule.
        lr: peak learning rate, reached at the end of warm-up.
        warmup: fraction of `num_steps` over which the rate rises linearly to `lr`.
        schedule: `cosine` (from `lr` to `min_lr`), `steps` (times `gamma` at each milestone) or `constant`.
        milestones: fractions of `num_steps` at which `steps` decays.
    """
    warmup_steps = warmup * num_steps
    if step < warmup_steps:
        return lr * min(1.0, (step + 1) / warmup_steps)
    if schedule == "constant":
        return lr
    if schedule == "steps":
        # A milestone on a step takes effect at that step; the epsilon absorbs the rounding of epochs / epochs * steps.
        return lr * gamma ** sum(step + 1e-6 >= m * num_steps for m in milestones)
    x = (step - warmup_steps) / max(num_steps - warmup_steps, 1e-12)
    return min_lr + (lr - min_lr) * (1.0 + math.cos(math.pi * min(x, 1.0))) / 2.0
