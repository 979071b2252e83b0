"""Command lines: overrides may stand anywhere among the options, and an error is one sentence with a way out."""

import argparse
import difflib
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from vit_rsst.errors import InputError, unknown

MISSING = "the following arguments are required: "
"""How argparse begins that sentence."""


class Parser(argparse.ArgumentParser):
    """argparse that raises its errors as InputError and suggests the option that was meant."""

    def __init__(self, **options: object):
        self.known_options: list[str] = []  # first: argparse adds --help while it starts
        super().__init__(**options)

    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.known_options += action.option_strings
        return action

    def error(self, message: str) -> NoReturn:
        what = message.replace(MISSING, "missing ").removeprefix("argument ")
        raise InputError(f"{what}{'' if what[-1] in '.?' else '.'} See {self.prog} --help.")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments, with every `key=value` among the options in `overrides`.

        argparse alone parses those only without subparsers. A subparser names itself with `set_defaults(parser=…)`.

        Raises:
            InputError: they are not understood.
        """
        arguments, rest = self.parse_known_args(argv)
        parser = getattr(arguments, "parser", self)
        for option in rest:
            if option.startswith("-"):
                parser.error(parser.unknown_option(option.partition("=")[0]))
        if hasattr(arguments, "overrides"):
            arguments.overrides = [*arguments.overrides, *rest]
        elif rest:
            parser.error(f"unexpected argument {rest[0]!r}")
        return arguments

    def unknown_option(self, option: str) -> str:
        near = difflib.get_close_matches(option, self.known_options, n=1)
        return f"unknown option {option!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def at_least(lowest: int) -> Callable[[str], int]:
    """A `type` of argparse: whole numbers from `lowest` on."""

    def parse(text: str) -> int:
        if text.isdecimal() and int(text) >= lowest:
            return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number, {lowest} or more, not {text!r}")

    return parse


def share(text: str) -> float:
    """A `type` of argparse: a number above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if 0.0 < value < 1.0:  # NaN is neither
        return value
    raise argparse.ArgumentTypeError(f"expected a number above 0 and below 1, such as 0.5, not {text!r}")


def shares(text: str) -> list[float]:
    """A `type` of argparse: such numbers, with commas between them."""
    return [share(part.strip()) for part in text.split(",")]


def share_or_by_kind(text: str) -> float | dict[str, float]:
    """A `type` of argparse: one such number, or one for each kind of unit, as in `head=0.3,neuron=0.5`."""
    if "=" not in text:
        return share(text)
    pairs = [part.partition("=") for part in text.split(",")]
    return {kind.strip(): share(value.strip()) for kind, _, value in pairs}


def one_of(what: str, choices: Collection[str]) -> Callable[[str], str]:
    """A `type` of argparse: one of `choices`, with the nearest suggested."""

    def parse(text: str) -> str:
        if text in choices:
            return text
        raise argparse.ArgumentTypeError(unknown(what, text, choices))

    return parse
