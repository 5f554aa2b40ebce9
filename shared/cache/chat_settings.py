"""What leaves with a trained model besides its weights: the chat template and the end tokens that it was trained with.

A recipe may render with a template of its own, and a template may end turns with another token than the tokenizer's
eos. Both must be in the model's directory, or `generate` runs on and `apply_chat_template` renders what the student
never saw. Where the sources of the caches were rendered with different templates, none of them is the model's: the
tokenizer's own stays, and a line says so. Cost: small files, and a few rows of each source.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from shared.cache.cache import Cache
from shared.cache.rendering import chat_templates, rendered_sources
from shared.cache.trained_ends import trained_ends
from shared.models.end_tokens import declared_end_ids, end_token_ids, special_ids
from shared.recipe.recipe import PromptSource, Recipe


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What a model directory must say."""

    sources: tuple[PromptSource, ...]
    """How the rows were rendered; empty where nothing says it."""
    template: str | None
    """The one template of all sources, where it is not the tokenizer's own."""
    end_ids: tuple[int, ...]
    """Tokens that trained answers end with."""
    note: str | None
    """A line for people where sources differ in their templates."""


def chat_settings_of(recipe: Recipe, caches: Sequence[Cache], tokenizer: Any) -> ChatSettings:
    """Find out what a student of these caches was trained with.

    Args:
        recipe: names the caches, and renders what their jobs do not say.
        caches: the same, opened.
        tokenizer: theirs.

    Raises:
        DamagedError: a cache contradicts the format.
        PromptError: the recipe names a template file that is not there.
    """
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    sources = rendered_sources(recipe)
    templates = chat_templates(sources, own)
    template, note = None, None
    if len(templates) == 1:
        (text,) = templates
        template = None if text in ("", (own or "").strip()) else text
    elif templates:
        alike = "; ".join(", ".join(labels) for labels in templates.values())
        note = f"the sources were rendered with {len(templates)} chat templates ({alike}), so the tokenizer's own stays"
    special = special_ids(tokenizer)
    ends = dict.fromkeys(token for cache in caches for token in trained_ends(cache, special))
    return ChatSettings(sources, template, tuple(ends), note)


def unwritten_settings(model_dir: Path, settings: ChatSettings, tokenizer: Any) -> dict[str, Any]:
    """Return what `write_chat_settings` would change of a model's directory: end tokens, template; empty for nothing.

    Raises:
        EngineError: a config of the directory cannot be read.
    """
    declared, path = declared_end_ids(model_dir), model_dir / "chat_template.jinja"
    ends = end_token_ids(tokenizer, declared, settings.end_ids)
    changes: dict[str, Any] = {} if ends == declared else {"end_token_ids": list(ends)}
    found = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    if settings.template is not None and found != settings.template:
        changes["template"] = xxhash.xxh3_128_hexdigest(settings.template.encode())
    return changes


def write_chat_settings(model_dir: Path, settings: ChatSettings, tokenizer: Any) -> None:
    """Write template and end tokens into a model's directory; what is there already stays as it is.

    Raises:
        EngineError: a config of the directory cannot be read.
    """
    ends = end_token_ids(tokenizer, declared_end_ids(model_dir), settings.end_ids)
    if ends:
        _update(model_dir / "generation_config.json", eos_token_id=ends[0] if len(ends) == 1 else list(ends))
        _update(model_dir / "config.json", eos_token_id=ends[0])
    if settings.template is None:
        return
    (model_dir / "chat_template.jinja").write_text(settings.template, encoding="utf-8")
    (model_dir / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(model_dir / "additional_chat_templates", ignore_errors=True)
    _update(model_dir / "tokenizer_config.json", chat_template=None)


def _update(path: Path, **values: Any) -> None:
    """Set keys of a JSON file, removing those that are None; a file that says so already is not written."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = {name: value for name, value in {**document, **values}.items() if name not in values or value is not None}
    if changed != document:
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
