"""A number that may change while a stage trains: a weight, a temperature or a source's share.

Progress runs from 0 (first step) to 1 (last step) of the stage or, with `over: run`, of all the recipe's stages in
order, so that a schedule does not depend on the number of steps. A plain number is a constant schedule and is written
back as a number.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from shared.recipe.base import NonNegative, Problem, Section, Share


class Schedule(Section):
    """A number over a stage: constant, linear or cosine from start to end, or steps."""

    kind: Literal["constant", "linear", "cosine", "step"] = "constant"
    """How the number moves."""
    start: NonNegative | None = None
    """Value at the first step; the only value of a constant."""
    end: NonNegative | None = None
    """Value at the last step, for linear and cosine."""
    values: tuple[NonNegative, ...] = ()
    """Values one after another, for step."""
    at: tuple[Share, ...] = ()
    """Progress (0 to 1) at which each next value begins, for step; one fewer than values."""
    over: Literal["stage", "run"] = "stage"
    """What progress is measured over: the steps of this stage, or of all stages of the recipe, one after another."""

    @model_validator(mode="before")
    @classmethod
    def _number_is_constant(cls, data: Any) -> Any:
        if isinstance(data, int | float) and not isinstance(data, bool):
            return {"kind": "constant", "start": data}
        if not isinstance(data, dict | Schedule):
            raise PydanticCustomError(
                "not_a_schedule", "expected a number or a section such as {kind: linear, start: 1, end: 0}"
            )
        return data

    def _problems(self) -> Iterator[Problem]:
        ends = {"start", "end"}
        needed = {"constant": {"start"}, "linear": ends, "cosine": ends, "step": {"values"}}[self.kind]
        given = {name for name in ("start", "end", "values", "at") if getattr(self, name) not in (None, ())}
        for name in sorted(needed - given):
            yield (name,), f"a {self.kind} schedule needs it"
        for name in sorted(given - needed - ({"at"} if self.kind == "step" else set())):
            yield (name,), f"a {self.kind} schedule does not use it, so leave it out"
        changes = len(self.values) - 1
        if self.kind == "step" and self.values and len(self.at) != changes:
            yield ("at",), f"{len(self.values)} values need {changes} places to change, not {len(self.at)}"
        if self.kind == "constant" and self.over != "stage":
            yield ("over",), "a constant schedule does not use it, so leave it out"
        if list(self.at) != sorted(set(self.at)):
            yield ("at",), "the places to change must ascend"

    def extremes(self) -> tuple[float, ...]:
        """Return every value that the recipe names: the constant, both ends, or all steps."""
        return self.values or tuple(value for value in (self.start, self.end) if value is not None)

    def value(self, progress: float) -> float:
        """Return the value at a progress from 0 (first step) to 1 (last step); beyond, the nearest end's.

        >>> Schedule(kind="linear", start=1.0, end=0.0).value(0.25)
        0.75
        """
        progress = min(max(progress, 0.0), 1.0)
        if self.kind == "step":
            return self.values[bisect_right(self.at, progress)]
        assert self.start is not None
        if self.kind == "constant" or self.end is None:
            return self.start
        share = progress if self.kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * progress)
        return self.start + share * (self.end - self.start)

    @model_serializer(mode="wrap")
    def _constant_is_number(self, handler: SerializerFunctionWrapHandler) -> Any:
        if self.kind == "constant":
            return self.start
        named = {name: value for name, value in handler(self).items() if value not in (None, (), [])}
        return named if self.over == "run" else {name: value for name, value in named.items() if name != "over"}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Say that a plain number will do."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        return {"anyOf": [{"type": "number", "minimum": 0}, schema]}


def constant(value: float) -> Schedule:
    """Return the schedule that never changes."""
    return Schedule(kind="constant", start=value)
