"""Recipe files: load with every problem listed by line, override, write back, describe.

Loading parses YAML 1.2 with lines, applies `--set` overrides, validates, and turns each problem into `file:line: path:
problem`, with the nearest known word where one is close. `dump_recipe` writes all defaults out, so that a saved run
says what ran.
"""

from __future__ import annotations

import errno
import re
import typing
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from shared.errors import RecipeError, RecipeProblemsError, on_one_line
from shared.recipe.base import closest, shown
from shared.recipe.override import apply_override
from shared.recipe.recipe import Recipe
from shared.recipe.yaml import MAX_BYTES, Path, YamlProblem, parse_yaml

MOST_PROBLEMS = 50
"""Problems of a recipe that are listed."""

Where = dict[Path, tuple[int, str]]
"""Where a value comes from: its line (0 for an override) and how to name the place."""


def load_recipe(path: FilePath | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Raises:
        RecipeError: the file cannot be read or does not validate; one line per problem, `file:line: path: problem`.
    """
    return load_recipe_and_places(path, overrides)[0]


def load_recipe_and_places(path: FilePath | str, overrides: Sequence[str] = ()) -> tuple[Recipe, Where]:
    """Read and validate a recipe, and return where its values were written; errors as for `load_recipe`."""
    text = _read(FilePath(path))
    try:
        document = parse_yaml(text)
    except YamlProblem as problem:
        raise RecipeError(f"{path}:{problem.line}: {problem.sentence}") from problem
    if not isinstance(document.data, dict):
        raise RecipeError(f"{path}:1: expected a mapping such as `name: demo`, found {shown(document.data)}")
    where: Where = {place: (line, f"{path}:{line}") for place, line in document.lines.items()}
    where[()] = (1, f"{path}:1")
    for override in overrides:
        place = apply_override(document.data, override)
        for below in [known for known in where if known[: len(place)] == place]:
            del where[below]
        where[place] = (0, f"--set {override}")
        for made in range(1, len(place)):  # sections that the file does not have
            where.setdefault(place[:made], where[place])
    return _validate(document.data, where), where


def dump_recipe(recipe: Recipe) -> str:
    """Return YAML that loads to an equal recipe, defaults included."""
    yaml = YAML(typ="rt", pure=True)
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = StringIO()
    yaml.dump(_quoted_where_needed(recipe.model_dump(mode="json")), stream)
    return stream.getvalue()


def recipe_json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, with every field's help."""
    return Recipe.model_json_schema()


def _quoted_where_needed(value: Any) -> Any:
    """Ask for quotes and escapes around texts that hold line breaks or invisible characters, keys included."""
    if isinstance(value, dict):
        return {_quoted_where_needed(key): _quoted_where_needed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted_where_needed(item) for item in value]
    if isinstance(value, str) and not value.isprintable():
        return DoubleQuotedScalarString(value)
    return value


def _read(path: FilePath) -> str:
    if path.is_fifo() and path.resolve().is_fifo():  # not one that is open already, as of `decant plan <(sed ...)`
        raise RecipeError(f"{path}: is a pipe, whose writer would be waited for; name a file with a recipe")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        beside = sorted(near.name for near in path.parent.glob("*.y*ml")) if error.errno == errno.ENOENT else []
        hint = closest(path.name, beside) or "; expected a recipe, see `decant init`"
        raise RecipeError(f"{path}: cannot be read ({error.strerror}){hint}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: longer than {MAX_BYTES} bytes, so this is no recipe; name a YAML file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: byte {raw[error.start]:#04x} is not UTF-8; save the recipe as UTF-8"
        ) from error


def _validate(data: dict[str, Any], where: Where) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        found, more = _without_consequences(error.errors(include_url=False), data)
    raise listed(found.items(), where, more)


def listed(problems: Iterable[tuple[Path, str]], where: Where, more: int = 0) -> RecipeProblemsError:
    """Return the error that says what is wrong at places of a recipe, in the order of the file, the first of many."""
    lines = sorted((*_source(place, where), _dotted(place), sentence) for place, sentence in problems)
    shown = lines[:MOST_PROBLEMS]
    more += len(lines) - len(shown)
    text = [
        f"{label}: {dotted}: {sentence}" if dotted else f"{label}: {sentence}" for _, label, dotted, sentence in shown
    ]
    return RecipeProblemsError("\n".join([*map(on_one_line, text), *[f"and {more:,} problems more"] * bool(more)]))


def _dotted(place: Path) -> str:
    """Write a place for people, long keys shortened and line breaks escaped."""
    keys = (key if key.isprintable() else repr(key)[1:-1] for key in map(str, place))
    return ".".join(key if len(key) <= 60 else key[:57] + "..." for key in keys)


def _without_consequences(errors: Sequence[Any], data: Any) -> tuple[dict[Path, str], int]:
    """Map places to sentences, leaving out what follows from another problem; count those beyond `MOST_PROBLEMS` only.

    A misspelt key also leaves the right one missing, a bad entry also leaves its list too short, and where a text or a
    list will do, what is wrong in the list also makes it no text.
    """
    found: dict[Path, str] = {}
    kinds: dict[Path, str] = {}
    for details in errors[:MOST_PROBLEMS]:
        if details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]:
            continue  # for entries that are told by themselves
        for place, sentence in _problems(details, data):
            if place not in kinds or (kinds[place].endswith("_type") and not details["type"].endswith("_type")):
                kinds[place], found[place] = details["type"], sentence
    sections = {place[:i] for place in kinds for i in range(len(place))}
    unknown: dict[Path, list[str]] = {}
    for details in errors:
        if details["type"] == "extra_forbidden":
            place = _followed(details["loc"], data)[0]
            unknown.setdefault(place[:-1], []).append(str(place[-1]))
    for place, kind in kinds.items():
        misspelt = kind == "missing" and closest(str(place[-1]), unknown.get(place[:-1], []))
        if misspelt or (place in sections and (kind == "too_short" or kind.endswith("_type"))):
            del found[place]
    return found, max(0, len(errors) - MOST_PROBLEMS)


def _source(place: Path, where: Where) -> tuple[int, str]:
    """Find where a place, or the nearest section around it, was written."""
    while place not in where and place:
        place = place[:-1]
    return where.get(place, (1, "recipe"))


def _problems(details: Any, data: Any) -> list[tuple[Path, str]]:
    """Turn one of pydantic's errors into places and sentences."""
    context = details.get("ctx", {})
    if details["type"] == "inconsistent":
        return [(_followed((*details["loc"], *below), data)[0], sentence) for below, sentence in context["problems"]]
    place = _followed(details["loc"], data)[0]
    return [(place, _sentence(details, context, data))]


def _sentence(details: Any, context: dict[str, Any], data: Any) -> str:
    kind, found = details["type"], details["input"]
    if kind == "extra_forbidden":
        return _unknown_key(details["loc"], data)
    if kind == "missing":
        return "is missing, and has no default"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"{shown(found)} is not one of {context['expected']}{closest(str(found), choices)}"
    if kind == "string_pattern_mismatch":
        return (
            f"{shown(found)} is no usable name; write letters, digits, '.', '_' and '-', and begin with a letter "
            "or digit"
        )
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected a section with keys, found {shown(found)}{_as_section(details['loc'], found, data)}"
    if kind in ("tuple_type", "list_type"):
        return f"expected a list, found {shown(found)}"
    if kind in ("url", "unknown_optimizer"):
        return str(details["msg"])  # of an address without its password
    if kind == "too_short":
        return f"expected at least {context['min_length']}, found {shown(found)}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {shown(found)}"
    message = details["msg"].replace("Input should be", "expected").replace("valid ", "").rstrip(".")
    return f"{message[0].lower()}{message[1:]}, found {shown(found)}"


_EXPECTED = {
    "path_type": "a path",
    "string_type": "text",
    "string_too_short": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "date_type": "a date such as 2026-01-31",
    "date_parsing": "a date such as 2026-01-31",
    "date_from_datetime_parsing": "a date such as 2026-01-31",
}
"""Kinds of problems of which what was expected says all."""


def _as_section(location: Sequence[str | int], found: Any, data: Any) -> str:
    """Return how the name of a kind is written as a section: `forward_kl` -> `{name: forward_kl}`."""
    sections = _followed(location, data)[1] if isinstance(found, str) else []
    fields = (item for section in sections for item in section.model_fields.items())
    kinds = [name for name, field in fields if found in typing.get_args(field.annotation)]
    return f"; write {{{kinds[0]}: {found}}}" if kinds else ""


def _unknown_key(location: Sequence[str | int], data: Any) -> str:
    sections = _followed(location[:-1], data)[1]
    if not sections:
        return "unknown key"
    key, fields = str(location[-1]), sections[0].model_fields
    hint = closest(key, list(fields))
    if not hint:
        inside = [
            name
            for name, field in fields.items()
            if any(key in section.model_fields for section in _sections_in(field.annotation))
        ]
        inside.sort(key=lambda name: name != "trainer")  # of equals the section where such keys usually stand
        hint = f"; did you mean '{inside[0]}.{key}'?" if inside else f"; known here: {', '.join(fields)}"
    return f"unknown key{hint}"


def _words(section: type[BaseModel]) -> set[str]:
    """Return the words that fields of a section may hold, among them what tells a kind from others."""
    annotations = (field.annotation for field in section.model_fields.values())
    literals = (one for one in annotations if typing.get_origin(one) is typing.Literal)
    return {word for one in literals for word in typing.get_args(one)}


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Find the section classes within `X | None`, `tuple[X, ...]`, a union of kinds and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _sections_in(part)]


def _followed(location: Sequence[str | int], data: Any) -> tuple[Path, list[type[BaseModel]]]:
    """Cut pydantic's location down to what the file can say: no union branches, nothing inside a shorthand.

    Returns:
        The place, and the section classes that it may hold.
    """
    place: Path = ()
    here: Any = Recipe
    for key in location:
        if key == "[key]":
            break  # what is wrong is the name itself
        if isinstance(data, list) and isinstance(key, str):
            continue  # of several shapes, the one that is a list
        if isinstance(data, dict) and isinstance(key, str):
            sections = _sections_in(here)
            kind = next((section for section in sections if key in _words(section)), None)
            if kind is not None and key not in data and len(sections) > 1:
                here = kind
                continue  # the kind of a section that is one of several
            place = (*place, key)
            if typing.get_origin(here) is dict:
                here = typing.get_args(here)[1]
            else:
                fields = (section.model_fields.get(key) for section in sections)
                here = next((field.annotation for field in fields if field is not None), None)
            if key not in data:
                break
            data = data[key]
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            place, data = (*place, key), data[key]
        else:
            break
    return place, _sections_in(here)
