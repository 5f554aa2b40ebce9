"""What a recipe may say about a source of prompts: where it lies, what its columns mean, how rows become tokens."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from shared.places import is_url
from shared.recipe.base import Count, HomePath, Problem, Section, Text, closest, moved, quoted, unused

COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "prompt", "chosen", "system", "tools", "reference"),
    "prompt_completion": ("prompt", "completion", "chosen", "history", "system", "tools", "reference"),
    "alpaca": ("instruction", "input", "output", "chosen", "history", "system", "tools", "reference"),
    "sharegpt": ("conversations", "chosen", "system", "tools", "reference"),
    "text": ("text", "reference"),
    "cache": (),
}
"""Format to the columns that it reads (`reference` may also be called `answer`)."""
ALIASES = {"prompt_completion": {"response": "completion"}, "alpaca": {"response": "output", "prompt": "instruction"}}
"""Format to other names that `columns` may use."""


def _written_date(value: Any) -> Any:
    if isinstance(value, bool | int | float):  # seconds since 1970, to pydantic
        raise PydanticCustomError("not_a_date", "expected a date such as 2026-01-31")
    return value


class PromptSource(Section):
    """One file, directory or hub data set of prompts or answered prompts."""

    source: str = ""
    """Label of these rows in the cache, in mixtures and in reports; two entries may share it; format cache may leave it
    out.
    """
    path: HomePath
    """A jsonl, json, csv, txt, parquet or arrow file, a directory of them, or a hub id; for format cache, a cache's
    directory.
    """
    format: Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text", "cache"]
    """What the columns mean; cache: rows of another cache, token for token."""
    split: Text = "train"
    """Split of a hub data set or of a directory whose names tell splits apart."""
    config: Text | None = None
    """Configuration (subset) of a hub data set or directory that has several."""
    limit: Count | None = None
    """Take at most this many rows from the start."""
    columns: dict[str, Text] = Field(default_factory=dict)
    """Columns by another name, such as {prompt: question, response: answer}."""
    ignore: tuple[Text, ...] = ()
    """Columns and keys of turns that are left out knowingly, such as [tools]."""
    system: str | None = None
    """System message put before conversations that have none."""
    supervise: Literal["all", "last"] = "all"
    """Given answers that are trained: all of a row, or its last, with the turns before it as context."""
    template: Literal["chat", "none"] = "chat"
    """Render with the tokenizer's chat template, or join the plain texts."""
    chat_template: HomePath | None = None
    """A Jinja template (or the path of one) instead of the tokenizer's."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the template, such as enable_thinking."""
    date: Annotated[datetime.date, BeforeValidator(_written_date)] | None = None
    """What a template that writes the current date writes instead, such as 2026-01-31."""

    @property
    def of_cache(self) -> bool:
        """Whether rows are tokens already, those of another cache."""
        return self.format == "cache"

    @property
    def of_text(self) -> bool:
        """Whether rows are plain texts."""
        return self.format == "text"

    @property
    def of_turns(self) -> bool:
        """Whether rows are conversations."""
        return not self.of_cache and not self.of_text

    def _problems(self) -> list[Problem]:
        if self.of_cache:
            kept = {"source", "path", "format", "limit"}
            left_out = unused(self, moved(self) - kept, "rows of a cache are taken as they are, so leave it out")
            return [*_at_url(self), *left_out]
        return sorted(
            (*_at_url(self), *_unread_columns(self), *_without_label(self), *_without_template(self)), key=str
        )


def _at_url(source: PromptSource) -> Iterator[Problem]:
    if is_url(source.path):
        way = "fetch it with `decant cache pull URL DIRECTORY`" if source.of_cache else "download it"
        yield ("path",), f"prompts are files of this machine or a hub id, and this is a URL; {way}, and name that place"


def _without_label(source: PromptSource) -> Iterator[Problem]:
    if not source.source:
        yield ("source",), "label these rows (only rows of format 'cache' have labels of their own)"


def _without_template(source: PromptSource) -> Iterator[Problem]:
    if not source.of_text and source.template != "none":
        return
    plain = "'text' rows" if source.of_text else "rows with template 'none'"
    names = [name for name in ("chat_template", "chat_template_kwargs", "date") if getattr(source, name)]
    if source.of_text:
        names += [name for name in ("system", "supervise") if name in moved(source)]
    why = {"supervise": f"{plain} are trained from their second token on, so leave it out"}
    for name in names:
        yield (name,), why.get(name, f"{plain} are not rendered by a template, so leave it out")


def _unread_columns(source: PromptSource) -> Iterator[Problem]:
    """Yield names that the format does not read, and columns that two names claim."""
    known = (*COLUMNS[source.format], *ALIASES.get(source.format, {}))
    columns = list(source.columns.values())
    for name, column in source.columns.items():
        if name not in known:
            reads = f"format '{source.format}' reads no {name!r}, only {quoted(known)}{closest(name, known)}"
            yield ("columns", name), reads
        if columns.count(column) > 1:
            yield ("columns", name), f"the column {column!r} is given twice; name each once"
