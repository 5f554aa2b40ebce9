"""Identities may grow: what an older file could not say means the default, and a default that came later is never
hashed.

Three kinds of identity share the rule. Dataclasses (layers, hidden layers, sequences) declare a later field with
`grown(default)`: it is written, and so hashed, only where it differs from the default. Recipe sections that name a job
or an evaluation list the fields that have always been written; `unmoved` names the others that still have their
default, which a dump leaves out. Two documents of which one was written before a setting existed are compared by
`first_difference`.

The default of a grown field means "as before it existed" and never changes.

Cost: one pass over a handful of fields.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import field
from typing import Any

from pydantic import BaseModel


def grown(default: Any) -> Any:
    """Return a dataclass field that older files lack; left at `default` it is neither written nor hashed."""
    return field(default=default, metadata={"grown": True})


def unmoved(section: BaseModel, always: Collection[str]) -> set[str]:
    """Return the fields of a section that came after `always` and still have their default: what a dump for hashing
    excludes.

    >>> class Answers(BaseModel):
    ...     top_k: int = 0
    ...     min_p: float = 0.0
    >>> Answers(top_k=5).model_dump(exclude=unmoved(Answers(top_k=5), always={"top_k"}))
    {'top_k': 5}
    """
    moved = section.model_dump(exclude_defaults=True)
    return {name for name in type(section).model_fields if name not in always and name not in moved}


def first_difference(old: Any, new: Any, moved: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Return (dotted name, old value, new value) of the first real difference between two JSON documents; None where
    they agree.

    Args:
        old: what was written, perhaps before some settings existed.
        new: what the request says, every setting written out.
        moved: what the request says without settings at their default: an old document may lack what is not in here.
        where: dotted name of the place, for the result.

    >>> first_difference({"lr": 1}, {"lr": 1, "fused": False}, {"lr": 1})
    >>> first_difference({"lr": 1}, {"lr": 1, "fused": True}, {"lr": 1, "fused": True})
    ('fused', None, True)
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        moved = moved if isinstance(moved, Mapping) else {}
        for name in [*old, *(name for name in new if name not in old)]:
            place = f"{where}.{name}" if where else str(name)
            if name not in old and name not in moved:
                continue
            found = first_difference(old.get(name), new.get(name), moved.get(name), place)
            if found is not None:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = moved if isinstance(moved, list) and len(moved) == len(new) else [None] * len(new)
        for i, (left, right, part) in enumerate(zip(old, new, parts, strict=True)):
            found = first_difference(left, right, part, f"{where}.{i}")
            if found is not None:
                return found
        return None
    return None if old == new else (where, old, new)
