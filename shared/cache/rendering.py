"""How were the rows of a recipe's caches rendered? Template settings per source, from what the caches' jobs were asked.

A job keeps its request: for every source the settings that decide how turns become tokens, with the template's text.
Rows that came from another cache were rendered there, which is looked up where the recipe names it. A cache without
such jobs (merged, imported) leaves the recipe's own `prompts`. Cost: one small read per job.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shared.errors import DamagedError, PromptError, refused
from shared.parts.jobs import Job, list_jobs
from shared.recipe.recipe import PromptSource, Recipe
from shared.text.text_encoding import not_utf8

MAX_TEMPLATE_BYTES = 2**20
SETTINGS = ("system", "template", "chat_template", "chat_template_kwargs", "supervise", "date")
"""What of a source decides how its turns become tokens."""
_KEPT = ("source", "format", *SETTINGS)


def rendered_sources(recipe: Recipe) -> tuple[PromptSource, ...]:
    """Return each way in which rows of the recipe's caches were rendered, once, with templates as texts.

    Raises:
        DamagedError: a job's plan contradicts the format.
        PromptError: the recipe names a template file that is not there.
    """
    found = [source for path in recipe.cache for source in _sources_of(path, recipe.prompts)]
    by_text = {source.model_dump_json(): source for source in found}
    return tuple(by_text.values())


def chat_templates(sources: Sequence[PromptSource], own: str | None) -> dict[str, list[str]]:
    """Return template text -> labels of the sources that it rendered.

    Args:
        sources: of `rendered_sources`.
        own: the tokenizer's template, which sources that name none were rendered with.
    """
    found: dict[str, list[str]] = {}
    for source in sources:
        if source.of_turns and source.template == "chat":
            labels = found.setdefault((source.chat_template or own or "").strip(), [])
            labels += [] if source.source in labels else [source.source]
    return found


def template_text(setting: str | None) -> str | None:
    """Return the recipe's template: its text, or the content of the file that it names; None stays None.

    Raises:
        PromptError: it names a file that is not there or cannot be read.
    """
    if setting is None or "{" in setting or "\n" in setting:
        return setting
    path = Path(setting)
    if not path.is_file() or path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise PromptError(
            f"{setting}: no such template file (of at most 1 MiB); expected Jinja text or a path to it in "
            "`chat_template`"
        )
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise PromptError(f"{setting}: cannot be read ({refused(error)})") from None
    if said := not_utf8(text):
        raise PromptError(f"{setting}: the template {said}")
    return text


def rendering_of(source: PromptSource) -> dict[str, Any]:
    """Return the settings that decide how a source's turns become tokens, those at their default left out.

    Raises:
        PromptError: it names a template file that is not there.
    """
    settings = source.model_dump(mode="json", include=set(SETTINGS), exclude_defaults=True)
    if source.chat_template is not None:
        settings["chat_template"] = template_text(source.chat_template)
    return settings


def _sources_of(cache_dir: Path, prompts: Sequence[PromptSource]) -> list[PromptSource]:
    """Return the sources of one cache; `prompts` are those of the recipe, for what its jobs do not say."""
    entries = [entry for job in list_jobs(cache_dir) for entry in job.request.get("prompts") or ()]
    own = [_source(entry, cache_dir) for entry in entries if entry.get("format") != "cache"]
    elsewhere = [
        source
        for prompt in prompts
        if prompt.of_cache and Path(prompt.path) != cache_dir
        for source in _sources_of(Path(prompt.path), ())
    ]
    if entries:
        return own + elsewhere
    told = [_plain(prompt) for prompt in prompts if not prompt.of_cache]
    return told + elsewhere


def source_of_job(job: Job, origin: int, where: Path) -> PromptSource:
    """Return how a job rendered its source number `origin`.

    Raises:
        DamagedError: the job's request says what does not fit.
    """
    entries = job.request.get("prompts") or ()
    if not 0 <= origin < len(entries):
        raise DamagedError(f"{where}: job {job.id} has {len(entries)} sources and a row of source {origin}")
    return _source(entries[origin], where)


def _plain(prompt: PromptSource) -> PromptSource:
    """Return a recipe's source as a job would say it."""
    said = {
        **prompt.model_dump(mode="json", exclude_defaults=True),
        "chat_template": template_text(prompt.chat_template),
    }
    return _source(said, Path(prompt.path))


def _source(entry: Mapping[str, Any], where: Path) -> PromptSource:
    said = {name: entry[name] for name in _KEPT if entry.get(name) is not None}
    try:
        return PromptSource.model_validate_json(json.dumps({**said, "path": "."}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DamagedError(
            f"{where}: a job says {'.'.join(map(str, first['loc']))} {str(first['input'])[:60]!r}, which does not fit; "
            "it was altered or written by a later version, which reads it"
        ) from None
