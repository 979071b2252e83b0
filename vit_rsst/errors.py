"""The ways a run can end badly, as exceptions that carry the exit code of the command line.

The message of each is one sentence (or a list of them) for the user: the place, the value, the choices, the way out.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class RunError(Exception):
    """A run ended for a reason that the user can act on; printed without a traceback."""

    exit_code = 1


class InputError(RunError, ValueError):
    """The input is wrong: found before any training, nothing was created."""

    exit_code = 2


class MissingRequirement(RunError):
    """The machine, an installed package or the network lacks something that the run needs."""

    exit_code = 3


class Diverged(RunError):
    """Training diverged: a loss or a gradient was no longer finite."""

    exit_code = 4


class Damaged(RunError):
    """A resume point or ticket is damaged, or does not belong to this model."""

    exit_code = 5


class CheckFailed(RunError):
    """A check before a run failed; its verdict says what to try."""

    exit_code = 6


class Stopped(RunError):
    """The run stopped cleanly on a signal; the same command goes on."""

    exit_code = 75


@contextmanager
def at_field(field: str) -> Iterator[None]:
    """Names the field of the recipe that brought an error up."""
    try:
        yield
    except RunError as error:
        raise type(error)(f"{field}: {error}") from error


def unknown(what: str, value: object, choices: Iterable[str]) -> str:
    """Sentence for a value that is not one of `choices`, with the nearest one suggested."""
    choices = list(choices)
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    listed = ", ".join(choices[:-1]) + " or " + choices[-1] if len(choices) > 1 else "".join(choices)
    return f"unknown {what} {str(value)!r}; expected {listed}." + (f" Did you mean {near[0]!r}?" if near else "")


OF_A_LIBRARY = (RuntimeError, ValueError, TypeError, AssertionError, ArithmeticError, LookupError, AttributeError)
"""What a library raises somewhere within, when it is given what it does not take."""


def first_line(error: BaseException) -> str:
    """What a library's error says, without the rest."""
    name = type(error).__name__
    text = (str(error).strip() or name).splitlines()[0]
    return f"{name} {text}" if isinstance(error, LookupError) else text  # a KeyError is the key alone
