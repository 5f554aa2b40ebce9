"""How a command enters a parser, and what the words of its options become. Imports nothing but the standard library
until a word is read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

EXIT_USAGE = 2
_DECIMAL = r"\d+(\.\d+)?|\.\d+"
_Number = TypeVar("_Number", int, float)


class Parser(argparse.ArgumentParser):
    """A parser whose errors look like all others."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2 and a sentence."""
        from shared.errors import on_one_line
        from shared.text.printable import printable

        self.exit(EXIT_USAGE, f"decant: error: {printable(on_one_line(message))}; see `{self.prog} --help`\n")


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
    return _here(text, "directory")


def file_or_directory(text: str) -> Path:
    """Read a path of this machine."""
    return _here(text, "path")


def _here(text: str, what: str) -> Path:
    from shared.places import is_url

    if is_url(text):
        raise argparse.ArgumentTypeError(f"'{text}' is a URL where a {what} of this machine is expected")
    return Path(text)


def url_or_directory(text: str) -> str:
    """Read a place to write to."""
    from shared.places import is_url

    return url(text) if is_url(text) else str(Path(text).absolute())


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


def _number(kind: type[_Number], pattern: str, expected: str) -> Callable[[str], _Number]:
    """Return what reads a number of one form, or names what it is not."""

    def read(text: str) -> _Number:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"'{text}' is no {expected}")
        return kind(text)

    return read


share = _number(float, r"0?\.\d+|[01]|1\.0*|0\.", "share; expected a number from 0 to 1")
positive = _number(int, r"0*[1-9]\d{0,17}", "count; expected a whole number from 1")
row_number = _number(int, r"\d{1,18}", "count; expected a whole number from 0")
sample = _number(int, r"(?=\d{1,7}$)0*([89]|[1-9]\d+)", "sample; expected a number of rows from 8")
"""Rows that are enough to measure a rate."""
price = _number(float, _DECIMAL, "price; expected a number such as 2.5")


def temperature(text: str) -> float:
    """Read a number above 0."""
    if not re.fullmatch(_DECIMAL, text) or not float(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no temperature; expected a number above 0, such as 2.5")
    return float(text)
