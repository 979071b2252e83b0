"""Fields that a search varies: `optim.lr=loguniform(1e-4,1e-2)`, `train.label_smoothing=uniform(0,0.2)`,
`pruning.schedule.rounds=int(1,4)` or `optim.weight_decay=choice(0.01,0.05,0.1)`.

Only `Field.distribution` needs optuna: an invalid field is rejected without it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vit_rsst.errors import InputError
from vit_rsst.experiments.study_file import OWN_FIELDS, load, value_text
from vit_rsst.recipe import strict_yaml

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

KINDS = ("uniform", "loguniform", "int", "choice")


@dataclass(frozen=True)
class Field:
    """One field and its range.

    Attributes:
        values: lowest and highest; for a choice, the texts to choose from.
    """

    key: str
    kind: str
    values: tuple

    def __str__(self) -> str:
        return f"{self.key}={self.kind}({','.join(map(str, self.values))})"

    def distribution(self) -> "BaseDistribution":
        from optuna import distributions as d

        if self.kind == "choice":
            return d.CategoricalDistribution(self.values)
        if self.kind == "int":
            return d.IntDistribution(*self.values)
        return d.FloatDistribution(*self.values, log=self.kind == "loguniform")

    def override(self, value: object) -> str:
        """The field as `key=value`; the texts of a choice are already YAML."""
        return f"{self.key}={value if self.kind == 'choice' else value_text(value)}"


def parse(text: str) -> Field:
    """Reads `key=kind(values)`.

    Raises:
        InputError: it is something else.
    """
    found = re.fullmatch(rf"([\w.]+)=({'|'.join(KINDS)})\((.*)\)", text.strip())
    try:
        values = strict_yaml.parse_scalar(f"[{found[3]}]") if found else None
    except ValueError:
        values = None
    if not values:
        raise InputError(
            f"--field {text!r}: expected KEY=KIND(VALUES) with KIND uniform, loguniform, int or choice, such as "
            "'optim.lr=loguniform(1e-4,1e-2)'."
        )
    key, kind = found[1], found[2]
    if key in OWN_FIELDS:
        raise InputError(f"--field {text!r}: the search sets {key} in each trial; vary another field.")
    if kind == "choice":
        return Field(key, kind, tuple(dict.fromkeys(map(value_text, values))))
    numbers = int if kind == "int" else int | float
    least = " above 0" if kind == "loguniform" else ""
    if len(values) != 2 or not all(isinstance(v, numbers) and not isinstance(v, bool) for v in values):
        raise InputError(f"--field {text!r}: {kind} takes two {'whole ' if kind == 'int' else ''}numbers{least}.")
    low, high = values
    if low > high or (kind == "loguniform" and low <= 0):
        raise InputError(f"--field {text!r}: expected two numbers{least}, the smaller first.")
    return Field(key, kind, (low, high) if kind == "int" else (float(low), float(high)))


def check(fields: Sequence[Field], base: Path, overrides: Sequence[str]) -> None:
    """Checks that the recipe accepts every field at both ends, or each of its choices.

    Raises:
        InputError: it does not, or a field is given twice.
    """
    given = [item.partition("=")[0] for item in overrides]
    for i, field in enumerate(fields):
        if field.key in given or field.key in [other.key for other in fields[:i]]:
            raise InputError(f"--field '{field}': {field.key} is given twice; remove one.")
        for value in field.values:
            load(f"--field '{field}'", base, [*overrides, field.override(value)])
