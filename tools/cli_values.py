"""How a command enters a parser, and what the words of its options become. Imports nothing but the standard library
until a word is read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

EXIT_USAGE = 2
_NUMBER = r"\d+(\.\d+)?|\.\d+"


class Parser(argparse.ArgumentParser):
    """A parser whose errors look like all others."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2 and a sentence."""
        self.exit(EXIT_USAGE, f"decant: error: {message}; see `{self.prog} --help`\n")


Options = Callable[[Parser], None]
"""Adds the options of one command to its parser."""


class Commands:
    """Commands of one parser, each a function that adds its options, in the order in which they are written."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, bool, Options]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the commands."""
        return list(self._entries)

    def command(self, name: str, help_text: str, *, is_group: bool = False) -> Callable[[Options], Options]:
        """Enter the decorated function; a group has commands of its own and no options."""

        def enter(options: Options) -> Options:
            self._entries[name] = (help_text, is_group, options)
            return options

        return enter

    def add_to(self, parser: Parser, dest: str) -> None:
        """Give a parser these commands; which one was chosen becomes `dest`."""
        within = parser.add_subparsers(dest=dest, metavar="COMMAND", parser_class=Parser)
        for name, (text, is_group, options) in self._entries.items():
            sub = within.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
            if not is_group:
                sub.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
                sub.add_argument("--verbose", action="store_true", help="show what libraries log, and tracebacks")
            options(sub)


def place(text: str) -> Path:
    """Read a directory or URL."""
    from shared.places import place_of

    try:
        return place_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def directory(text: str) -> Path:
    """Read a directory of this machine."""
    from shared.places import is_url

    if is_url(text):
        raise argparse.ArgumentTypeError(f"'{text}' is a URL where a directory of this machine is expected")
    return Path(text)


def url(text: str) -> str:
    """Read a URL."""
    from shared.places import is_url, named

    if not is_url(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no URL; expected one such as s3://bucket/demo")
    return named(place(text))


def partition(text: str) -> tuple[int, int]:
    """Read I/N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is no share; expected I/N with I from 0 to N-1, such as 0/4")
    return int(match[1]), int(match[2])


def share(text: str) -> float:
    """Read a number from 0 to 1."""
    if not re.fullmatch(r"0?\.\d+|[01]|1\.0*|0\.", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no share; expected a number from 0 to 1")
    return float(text)


def positive(text: str) -> int:
    """Read a whole number from 1."""
    if not re.fullmatch(r"0*[1-9]\d{0,17}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no count; expected a whole number from 1")
    return int(text)


def row_number(text: str) -> int:
    """Read a whole number from 0."""
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no count; expected a whole number from 0")
    return int(text)


def sample(text: str) -> int:
    """Read a number of rows that is enough to measure a rate."""
    if not re.fullmatch(r"\d{1,7}", text) or int(text) < 8:
        raise argparse.ArgumentTypeError(f"'{text}' is no sample; expected a number of rows from 8")
    return int(text)


def price(text: str) -> float:
    """Read a number from 0."""
    if not re.fullmatch(_NUMBER, text):
        raise argparse.ArgumentTypeError(f"'{text}' is no price; expected a number such as 2.5")
    return float(text)


def temperature(text: str) -> float:
    """Read a number above 0."""
    if not re.fullmatch(_NUMBER, text) or not float(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no temperature; expected a number above 0, such as 2.5")
    return float(text)
