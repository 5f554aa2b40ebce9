"""How a command enters a parser, and what the words of its options become. Imports nothing but the standard library
until a word is read.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

EXIT_USAGE = 2
_REAL = r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"


class Parser(argparse.ArgumentParser):
    """A parser whose errors look like all others."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2 and a sentence."""
        from shared.errors import on_one_line
        from shared.places import without_passwords
        from shared.text.printable import printable

        message = printable(on_one_line(without_passwords(message)))
        self.exit(EXIT_USAGE, f"decant: error: {message}; see `{self.prog} --help`\n")


Options = Callable[[Parser], None]
"""Adds the options of one command to its parser."""


def word(text: str) -> str:
    """Read a word that an option of no other kind takes; an empty one is what a shell makes of a variable not set."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty; name something, or leave it out")
    return text


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
                sub.register("type", None, word)
            options(sub)


def place(text: str) -> Path:
    """Read a directory or URL."""
    from shared.places import place_of

    try:
        return place_of(word(text))
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
    return Path(word(text))


def url_or_directory(text: str) -> str:
    """Read a place to write to."""
    from shared.places import is_url

    return url(text) if is_url(text) else str(Path(word(text)).absolute())


def url(text: str) -> str:
    """Read a URL."""
    from shared.places import is_url, named

    if not is_url(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no URL; expected one such as s3://bucket/demo")
    return named(place(text))


def repository(text: str) -> str:
    """Read a model repository of the hub."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no repository; expected ORG/NAME")
    return text


def partition(text: str) -> tuple[int, int]:
    """Read I/N."""
    match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text, re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is no share; expected I/N with I from 0 to N-1, such as 0/4")
    return int(match[1]), int(match[2])


def _whole(pattern: str, expected: str) -> Callable[[str], int]:
    """Return what reads a whole number of one form, or names what it is not."""

    def read(text: str) -> int:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise argparse.ArgumentTypeError(f"'{text}' is no {expected}")
        return int(text)

    return read


def _real(fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Return what reads a finite number that fits, also one such as 1e-3, or names what it is not."""

    def read(text: str) -> float:
        value = float(text) if re.fullmatch(_REAL, text, re.ASCII) else math.nan
        if not math.isfinite(value) or not fits(value):
            raise argparse.ArgumentTypeError(f"'{text}' is no {expected}")
        return value

    return read


positive = _whole(r"0*[1-9]\d{0,17}", "count; expected a whole number from 1")
row_number = _whole(r"\d{1,18}", "count; expected a whole number from 0")
sample = _whole(r"(?=\d{1,7}$)0*([89]|[1-9]\d+)", "sample; expected a number of rows from 8")
"""Rows that are enough to measure a rate."""
share = _real(lambda value: value <= 1, "share; expected a number from 0 to 1")
price = _real(lambda value: True, "price; expected a number such as 2.5")
temperature = _real(lambda value: value > 0, "temperature; expected a number above 0, such as 2.5")
