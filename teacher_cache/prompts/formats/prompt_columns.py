"""A row's columns under the names that its format reads: renamed by `columns`, less those that `ignore` leaves out.

What neither reads is counted, so that a build can say which columns it did not look at; a column that `columns` names
and no row has is a mistake of the recipe.
Cost: a few lookups per row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from shared.recipe.sections.prompts import ALIASES, COLUMNS
from teacher_cache.prompts.formats.prompt_formats import REFERENCE_KEYS
from teacher_cache.prompts.formats.prompt_turns import is_empty

_OF_TURNS = frozenset(("role", "content", "from", "value"))
"""Keys of a turn that are never left out."""
TURN_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "output")


class Columns:
    """The columns of one source."""

    def __init__(self, source: PromptSource, unread: Counter[str]) -> None:
        """Remember the recipe's names.

        Args:
            source: the source.
            unread: counts rows per column that is not read.
        """
        aliases = ALIASES.get(source.format, {})
        self._source = source
        self._renamed = {column: aliases.get(name, name) for name, column in source.columns.items()}
        self._unseen = set(self._renamed)
        self._ignored = frozenset(source.ignore)
        self._left_nothing_out = set(source.ignore)
        self._read = {*COLUMNS[source.format], *REFERENCE_KEYS}
        self._unread = unread

    def of(self, row: Any) -> Any:
        """Return a row with the format's names; what is no object is returned as it is."""
        if not isinstance(row, Mapping):
            return row
        self._unseen -= row.keys()
        self._left_nothing_out -= row.keys()
        kept = {name: value for name, value in row.items() if name not in self._ignored}
        found = {name: value for name, value in kept.items() if name not in self._renamed.values()}
        unread = kept.keys() - found.keys() - self._renamed.keys()
        for column, name in self._renamed.items():
            if column in row:
                found.pop(column, None)
                found[name] = row[column]
        if self._ignored:
            found = {name: self._turns(value) if name in TURN_COLUMNS else value for name, value in found.items()}
        columns = {name: column for column, name in self._renamed.items()}
        unread |= {columns.get(name, name) for name in (found.keys() - self._read) | self._stood_in_for(found)}
        self._unread.update(name for name in unread if not is_empty(row.get(name)))
        return found

    def _stood_in_for(self, row: Mapping[str, Any]) -> set[str]:
        """Return the columns that the format reads only where another, which the row has, is missing."""
        instead = {"messages": ("chosen", "prompt"), "completion": ("chosen",), "output": ("chosen",)}
        found = [others for name, others in instead.items() if name in self._read and not is_empty(row.get(name))]
        references = [name for name in REFERENCE_KEYS if row.get(name) is not None]
        return set().union(*found, references[1:])

    def check(self) -> None:
        """Refuse names of `columns` that no row had.

        Raises:
            PromptError: with the column.
        """
        if self._unseen:
            names, limit = ", ".join(repr(name) for name in sorted(self._unseen)), self._source.limit
            within = "" if limit is None else f" within `limit: {limit}`"
            raise PromptError(
                f"{self._source.path}: no row{within} has the column {names} that `columns` names; correct or remove it"
            )

    def idle_names(self) -> list[str]:
        """Return a sentence for names of `ignore` that no row had so far."""
        left = ", ".join(repr(name) for name in sorted(self._left_nothing_out))
        nothing = "no row read has such a column, nor a turn such a key besides its role and text"
        return [f"source {self._source.source}: `ignore` leaves nothing out by {left}: {nothing}"] if left else []

    def _turns(self, value: Any) -> Any:
        """Leave ignored keys out of turns; a role or text is none of them."""
        if not isinstance(value, list):
            return value
        ignored = self._ignored - _OF_TURNS
        for turn in value if self._left_nothing_out else ():
            self._left_nothing_out -= turn.keys() - _OF_TURNS if isinstance(turn, Mapping) else set()
        return [
            {key: inner for key, inner in turn.items() if key not in ignored} if isinstance(turn, Mapping) else turn
            for turn in value
        ]
