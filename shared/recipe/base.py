"""What every section of a recipe has in common: no unknown keys, no changes after loading, plain numbers, named
problems.

A field's docstring is its help (`recipe_json_schema` carries it). Numbers are numbers: `true` and `"3"` are refused
where a number belongs, `1e3` is accepted for a count. What a section says of several fields together it yields as
problems, each with the field to blame.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, to_jsonable_python

from shared.places import is_url, named, place_of

Problem = tuple[tuple[str | int, ...], str]
"""Path below the section that raises, and the sentence."""

SLUG = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names that become directories."""


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, attribute docstrings as help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_default=False,
    )

    def _problems(self) -> Iterable[Problem]:
        """Return what fields that are right by themselves do not allow together."""
        return ()

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        problems = list(self._problems())
        if problems:
            inconsistent(*problems)
        return self


class Kind(Section):
    """Base of sections that may be written as the name of their `kind` alone: `adapter: lora`."""

    @model_validator(mode="before")
    @classmethod
    def _name_is_kind(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Say that the name will do."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        return {"anyOf": [{"enum": list(typing.get_args(cls.model_fields["kind"].annotation))}, schema]}


def inconsistent(*problems: Problem) -> NoReturn:
    """Refuse a section for reasons that involve more than one field.

    Raises:
        PydanticCustomError: always; `ctx["problems"]` holds every path and sentence.
    """
    text = "; ".join(sentence for _, sentence in problems)
    raise PydanticCustomError("inconsistent", "{text}", {"text": text, "problems": list(problems)})


def _plain_number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise PydanticCustomError("not_a_number", "expected a number")
    return value


_number = BeforeValidator(_plain_number)


def _refuse_no_path(value: Any) -> None:
    if value == "":  # which would be the directory in which the command runs
        raise PydanticCustomError("path_type", "expected a path")


def _from_home(value: Any) -> Any:
    """Let `~/` begin the user's home, as a shell does, unless a path is called so."""
    try:
        return str(Path(value).expanduser()) if value.startswith("~/") and not Path(value).exists() else value
    except (AttributeError, OSError, RuntimeError, ValueError):  # no text, too long, a user without a home
        return value


def _place(value: Any) -> Any:
    _refuse_no_path(value)
    value = _from_home(value)
    try:
        return str(place_of(value)) if isinstance(value, str) else value  # JSON knows no path
    except ValueError as error:
        raise PydanticCustomError("url", "{text}", {"text": str(error)}) from None


CachePlace = Annotated[Path, BeforeValidator(_place), PlainSerializer(named, return_type=str, when_used="json")]
"""A cache's directory, or the mirror of its URL; written as what it was given as."""


def _of_this_machine(value: Any) -> Any:
    _refuse_no_path(value)
    if is_url(value):
        raise PydanticCustomError("url", "a run is written on this machine, and this is a URL; name a directory")
    return _from_home(value)


RunPlace = Annotated[Path, BeforeValidator(_of_this_machine)]
"""A run's directory."""

MOST = 2**31 - 1
"""Largest count: rows, tokens and steps are held in 32 bits."""
MOST_SEED = 2**32 - 1
"""Largest seed that every library takes."""
_LISTED = 30
"""Most names in a sentence, and most that are searched for one that was meant."""

Integer = Annotated[int, _number, Field(ge=-(2**63), lt=2**63)]
"""An integer of 64 bits."""
Seed = Annotated[int, _number, Field(ge=0, le=MOST_SEED)]
"""A seed, from 0 to 4294967295."""
Count = Annotated[int, _number, Field(ge=1, le=MOST)]
"""An integer from 1 to 2147483647."""
CountOrZero = Annotated[int, _number, Field(ge=0, le=MOST)]
"""An integer from 0 to 2147483647."""
Number = Annotated[float, _number]
"""Any finite number."""
Positive = Annotated[float, _number, Field(gt=0)]
"""A finite number above 0."""
NonNegative = Annotated[float, _number, Field(ge=0)]
"""A finite number of at least 0."""
Fraction = Annotated[float, _number, Field(ge=0, le=1)]
"""A number from 0 to 1, both included."""
Probability = Annotated[float, _number, Field(gt=0, le=1)]
"""A number above 0 and at most 1."""
Share = Annotated[float, _number, Field(gt=0, lt=1)]
"""A number between 0 and 1, neither included."""
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=SLUG)]
"""A name that becomes a directory."""
Text = Annotated[str, Field(min_length=1)]
"""Text that is not empty."""
HomePath = Annotated[Text, BeforeValidator(_from_home)]
"""A path, or what else may stand in its place; `~/` begins the user's home."""


def _share_or_number(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (0 < value <= 1 if isinstance(value, float) else 1 <= value <= MOST):
        return value
    raise PydanticCustomError(
        "not_a_share", "expected a share above 0 and at most 1.0, or a whole number of prompts from 1"
    )


ShareOrNumber = Annotated[int | float, BeforeValidator(_share_or_number)]
"""A share above 0 and at most 1.0, or a whole number from 1."""


@dataclass(frozen=True)
class Kinds:
    """Kinds of a section, told apart by a field: beside their union, `BeforeValidator(kinds.checked)`."""

    union: Any
    """A kind that has a default for `by` is what a section without it is."""
    by: str
    written: tuple[str, ...]
    """Options that version 1 wrote out for every kind: what holds them all, but for empty ones, is a dump."""

    @cached_property
    def named(self) -> dict[str, type[Section]]:
        """Sections by what `by` may say."""
        kinds = typing.get_args(self.union)
        return {name: kind for kind in kinds for name in typing.get_args(kind.model_fields[self.by].annotation)}

    def checked(self, value: Any) -> Any:
        """Return a section with its kind, or name what is wrong with it: an option that only others have is named.

        "only 'jsd' has `beta`, 'forward_kl' does not, so leave it out"
        """
        if not isinstance(value, dict):
            return value
        value = self.without_foreign_defaults(value if self.by in value else {self.by: self._default(value), **value})
        name, problems = value[self.by], []
        if not isinstance(name, str) or name not in self.named:
            found, names = shown(name), list(self.named)
            inconsistent(((self.by,), f"{found} is not one of {quoted(names)}{closest(str(name)[:60], names)}"))
        for key in value:
            owners = self._owners(key)
            if owners and name not in owners:
                has = "has" if len(owners) == 1 else "have"
                said = f"only {quoted(owners)} {has} `{key}`, '{name}' does not, so leave it out"
                problems.append(((key,), said))
        if problems:
            inconsistent(*problems)
        return value

    def without_foreign_defaults(self, value: Any) -> Any:
        """Return a section as it was written, a dump without what its kind has no option for and what says nothing:
        its kind's constant, or the default of a kind that has the option.
        """
        own = self.named.get(str(value.get(self.by))) if isinstance(value, dict) else None
        if own is None or not self.is_dump(value.keys(), self.written):
            return value
        return {key: item for key, item in value.items() if key in own.model_fields or item not in self._mute(own, key)}

    def is_dump(self, keys: Collection[str], written: Collection[str]) -> bool:
        """Tell whether keys are those of a dump: they lack nothing of what was written but what may be empty."""
        return all(None in self._defaults(name) for name in set(written).difference(keys))

    def _mute(self, own: type[Section], key: str) -> Any:
        mute = [getattr(own, key, default) for default in self._defaults(key)]
        return to_jsonable_python(mute, serialize_unknown=True)

    def _defaults(self, key: str) -> list[Any]:
        return [self.named[name].model_fields[key].default for name in self._owners(key)]

    def _owners(self, key: str) -> list[str]:
        return [name for name, kind in self.named.items() if key in kind.model_fields]

    def _default(self, value: dict[str, Any]) -> str:
        unknown = [key for key in value if isinstance(key, str) and not self._owners(key)]
        misspelt = next((key for key in unknown if closest(key, [self.by])), None)
        if misspelt is not None:
            inconsistent(((misspelt,), f"unknown key; did you mean '{self.by}'?"))
        for name, kind in self.named.items():
            if not kind.model_fields[self.by].is_required():
                return name
        inconsistent(((self.by,), "is missing, and has no default"))


def one_or_many(value: Any) -> Any:
    """Let a list of one be written as its only entry."""
    return value if isinstance(value, list | tuple) else (value,)


def repeated(values: Iterable[Hashable]) -> list[int]:
    """Return the places of values that came before: [0, 1, 0] -> [2]."""
    first: dict[Hashable, int] = {}
    return [place for place, value in enumerate(values) if first.setdefault(value, place) != place]


def moved(section: Section) -> set[str]:
    """Return the fields that are not at their defaults."""
    return set(section.model_dump(exclude_defaults=True))


def unused(section: Section, names: Iterable[str], why: str) -> list[Problem]:
    """Return those of some fields that are not at their defaults, each blamed with the same sentence."""
    return [((name,), why) for name in sorted(moved(section).intersection(names))]


def unused_sampling(section: Section) -> list[Problem]:
    """Return what a section says about sampling where its `temperature` is 0."""
    if section.model_dump()["temperature"] != 0:
        return []
    why = "all answers at temperature 0 are the same; raise the temperature or leave it at 1"
    problems = unused(section, ("samples_per_prompt", "samples"), why)
    why = "temperature 0 takes the most probable token, so leave it out or raise the temperature"
    return problems + unused(section, ("top_p", "top_k"), why)


_USUAL = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "steps": "max_steps",
    "batch_size": "per_device_train_batch_size", "micro_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps", "scheduler": "lr_scheduler_type", "optimizer": "optim",
    "kl": "forward_kl", "kd": "forward_kl", "ce": "cross_entropy", "sft": "cross_entropy", "rkl": "reverse_kl",
    "half": "float16", "fp16": "float16", "fp32": "float32", "hf": "transformers", "chat": "messages",
    "openai": "messages", "adamw": "adamw_torch", "top_k": "k",
    "max_tokens": "max_new_tokens", "tp": "tensor_parallel_size",
}  # fmt: skip
"""What other programs call a name."""


def closest(found: str, choices: Sequence[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest of the first choices, or nothing where none is near.

    >>> closest("LoRA", ["none", "lora"]), closest("lr", ["lr_scheduler_type", "learning_rate"])
    ("; did you mean 'lora'?", "; did you mean 'learning_rate'?")
    """
    first, folded = choices[: 4 * _LISTED], found.casefold()
    near = [choice for choice in first if choice == _USUAL.get(folded) or choice.casefold() == folded]
    near = near or difflib.get_close_matches(found, first, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def quoted(names: Sequence[str], most: int = _LISTED) -> str:
    """List names for a sentence: `'a', 'b'`, the first of many."""
    more = len(names) - most
    return ", ".join(f"'{name}'" for name in names[:most]) + (f" and {more:,} more" if more > 0 else "")


def shown(value: Any) -> str:
    """Show a value in a sentence: `'x'`, `3`, `true`, `nothing`, `a list of 2`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list | tuple):
        what = "section" if isinstance(value, dict) else "list"
        return f"a {what} of {len(value)}" if value else f"an empty {what}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_problem(error: ValidationError, given: Mapping[str, Any]) -> tuple[str, str]:
    """Return the first of the fields that were `given` to a section in code which is wrong, and what was expected."""
    wrong = error.errors()[0]
    name = next((str(key) for key in wrong["loc"] if key in given), "its options")
    return name, f"{wrong['msg'].replace('Input should be', 'expected')}, found {given.get(name)!r}"
