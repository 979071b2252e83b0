"""The ways a run can end badly, as exceptions that carry the exit code of the command line.

The message of each is one sentence (or a list of them) for the user: the place, the value, the choices, the way out.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class RunError(Exception):
    """A run ended for a reason the user can act on; printed without a traceback."""

    exit_code = 1


class InputError(RunError, ValueError):
    """The input is wrong; found before any training, nothing was created."""

    exit_code = 2


class MissingRequirement(RunError):
    """The machine, an installed package or the network lacks something the run needs."""

    exit_code = 3


class Diverged(RunError):
    """Training diverged: a loss or gradient is not finite."""

    exit_code = 4


class Damaged(RunError):
    """A resume point or ticket is damaged or belongs to a different model."""

    exit_code = 5


class CheckFailed(RunError):
    """A pre-flight check failed; its verdict says what to try."""

    exit_code = 6


class Stopped(RunError):
    """The run was stopped cleanly by a signal; the same command resumes it."""

    exit_code = 75


@contextmanager
def at_field(field: str) -> Iterator[None]:
    """Prefixes errors with the recipe field that caused them."""
    try:
        yield
    except RunError as error:
        raise type(error)(f"{field}: {error}") from error


def unknown(what: str, value: object, choices: Iterable[str]) -> str:
    """Error sentence for a value that is not one of `choices`; suggests the closest one."""
    choices = list(choices)
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    listed = ", ".join(choices[:-1]) + " or " + choices[-1] if len(choices) > 1 else "".join(choices)
    return f"unknown {what} {str(value)!r}; expected {listed}." + (f" Did you mean {near[0]!r}?" if near else "")


OF_A_LIBRARY = (RuntimeError, ValueError, TypeError, AssertionError, ArithmeticError, LookupError, AttributeError)
"""What a library may raise when given something it does not accept."""


def first_line(error: BaseException) -> str:
    """First line of a library's error message, without a full stop."""
    name = type(error).__name__
    text = (str(error).strip() or name).splitlines()[0].rstrip(".")
    return f"{name} {text}" if isinstance(error, LookupError) else text  # a KeyError is the key alone
