"""YAML 1.2 text to plain data that remembers where every value was written.

The text is composed to nodes by ruamel.yaml's pure parser and turned into dicts, lists and scalars here, so that
nothing in it can construct an object: other tags, duplicate keys and YAML 1.1 are refused, aliases are copied within a
budget. Scalars follow YAML 1.2: `1e-5` is a number, `no` is a string; a date stays a string. Cost: milliseconds for a
recipe; its size is bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_BYTES = 256 * 1024
"""Longest recipe."""
MAX_VALUES = 20_000
"""Most values in a recipe, copies made by aliases included."""
MAX_DEPTH = 40
"""Deepest nesting of a recipe."""
_MOST_DIGITS = 100
"""Of a whole number that is read; 64 bits take 66 in the longest notation."""

Path = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"


class YamlProblem(Exception):  # noqa: N818 - carries a line to the caller, who raises the error that users see
    """What is wrong with a text, and in which line (from 1)."""

    def __init__(self, line: int, sentence: str) -> None:
        """Keep both."""
        super().__init__(sentence)
        self.line = line
        self.sentence = sentence


@dataclass
class Document:
    """Plain data and the line (from 1) of every key and list entry."""

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)


def parse_yaml(text: str) -> Document:
    """Parse one YAML 1.2 document.

    Raises:
        YamlProblem: the text is no YAML, too large, or uses what is refused here.
    """
    if len(text) > MAX_BYTES:
        raise YamlProblem(1, f"{len(text)} characters are too many, at most {MAX_BYTES} are read")
    directive = re.search(r"^%.*$", text, re.MULTILINE)
    if directive:
        line = text.count("\n", 0, directive.start()) + 1
        raise YamlProblem(
            line, f"directive '{directive.group()[:40]}' is not supported, recipes are YAML 1.2; remove it"
        )
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(
            mark.line + 1 if mark else 1, f"no valid YAML: {_first_line(error.problem or error.context)}"
        ) from error
    except (YAMLError, ValueError) as error:
        raise YamlProblem(1, f"no valid YAML: {_first_line(str(error))}") from error
    except RecursionError as error:
        raise YamlProblem(1, f"nested deeper than {MAX_DEPTH} levels") from error
    document = Document(None)
    if root is not None:
        document.data = _Builder(document.lines).build(root, ())
    return document


class _Builder:
    """Turns nodes into plain data, counting what it makes."""

    def __init__(self, lines: dict[Path, int]) -> None:
        self.lines = lines
        self.num_values = 0

    def build(self, node: Node, path: Path) -> Any:
        """Return a node as plain data; `path` leads to it from the document's root.

        Raises:
            YamlProblem: it is too large or too deep, or says something that plain data cannot.
        """
        line = node.start_mark.line + 1
        self.num_values += 1
        if self.num_values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise YamlProblem(line, f"more than {MAX_VALUES} values or {MAX_DEPTH} levels, aliases included")
        if isinstance(node, ScalarNode):
            return scalar(str(node.tag), node.value, line)
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return {key: self.build(value, (*path, key)) for key, value in self._entries(node, path)}
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            for i, item in enumerate(node.value):
                self.lines[(*path, i)] = item.start_mark.line + 1
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        raise _unsupported(str(node.tag), line)

    def _entries(self, node: MappingNode, path: Path) -> Iterator[tuple[str, Node]]:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                raise YamlProblem(line, "a key must be a word, not a list or a mapping")
            key = _writable(str(key_node.value), line)
            if key in seen:
                where = ".".join(str(part) for part in (*path, key))
                raise YamlProblem(line, f"{where}: the key is written twice, first in line {seen[key]}; remove one")
            seen[key] = line
            self.lines[(*path, key)] = line
            yield key, value_node


def scalar(tag: str, text: str, line: int) -> Any:
    """Turn a scalar's resolved tag and text into null, bool, int, float or str.

    Raises:
        YamlProblem: the tag is none of YAML's own, or the number cannot be read.
    """
    kind = tag.removeprefix(_TAG)
    if kind == "null" and text.lower() in ("", "~", "null"):
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if kind == "int":
            return _integer(text, line)
        if kind == "float":
            return _float(text)
    except ValueError as error:
        raise YamlProblem(line, f"'{text[:40]}' is no number") from error
    if kind in ("str", "timestamp", "value", "merge"):
        return _writable(text, line)
    raise _unsupported(tag, line)


def _unsupported(tag: str, line: int) -> YamlProblem:
    """Return what is wrong with a tag, or with a text that is none of its tag's."""
    return YamlProblem(line, f"tag '{tag[:60]}' is not supported here; remove it")


def _integer(text: str, line: int) -> int:
    """Return a whole number that 64 bits hold, as every file of a cache must."""
    value = int(text, 0 if re.match(r"[-+]?0[xob]", text) else 10) if len(text) <= _MOST_DIGITS else 2**63
    if not -(2**63) <= value < 2**63:
        raise YamlProblem(line, f"the whole number {text[:30]} needs more than 64 bits; write a smaller one")
    return value


def _writable(text: str, line: int) -> str:
    """Return a text that a file and its name can hold: no NUL, no half of a character."""
    bad = re.search("[\\x00\ud800-\udfff]", text)
    if bad:
        raise YamlProblem(line, f"a text holds the character {bad.group()!a}, which no path and no file can; remove it")
    return text


def _float(text: str) -> float:
    plain = text.replace("_", "").lower()
    if plain.lstrip("+-") in (".inf", ".nan"):
        return math.nan if "nan" in plain else math.copysign(math.inf, -1.0 if plain[0] == "-" else 1.0)
    return float(plain)


def _first_line(text: str | None) -> str:
    return (text or "cannot be parsed").strip().splitlines()[0][:200]
