"""At which tokens do a model's answers end, besides those that its own files name? At those that students are taught.

They are the end tokens of the templates that questions are rendered with, and those that the answers of the recipe's
caches end with. Every model of a comparison is stopped alike; a trained student names them itself. What the model's
files lack is part of the identity of kept results. Cost: the model's tokenizer, a rendering per source and a few rows
of each cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.cache.cache import Cache
from shared.cache.trained_ends import trained_ends
from shared.models.end_tokens import declared_end_ids, end_token_ids, special_ids
from shared.models.files import load_fast_tokenizer
from shared.recipe.recipe import PromptSource, Recipe
from tools.evaluate.models.models import ModelUnderTest
from tools.evaluate.models.rendering import template_end


def taught_end_ids(recipe: Recipe, tokenizer: Any, sources: Sequence[PromptSource]) -> tuple[int, ...]:
    """Return the end tokens of the templates of `sources` and of the answers in the recipe's caches.

    Raises:
        PromptError: a template does not render, or ends no answer.
        CacheError: a cache cannot be read.
    """
    special = special_ids(tokenizer)
    caches = [Cache.open_sequences(path) for path in recipe.cache if (path / "cache.json").is_file()]
    of_rows = [token for cache in caches for token in trained_ends(cache, special)]
    return tuple(dict.fromkeys([*(template_end(tokenizer, source) for source in sources), *of_rows]))


def foreign_end_ids(recipe: Recipe, model: ModelUnderTest, sources: Sequence[PromptSource]) -> list[int]:
    """Return the taught end tokens that the model's own files do not name.

    Raises:
        EngineError: the model's tokenizer or configs cannot be read.
        PromptError: as for `taught_end_ids`.
        CacheError: as for `taught_end_ids`.
    """
    tokenizer = load_fast_tokenizer(model.files.directory, trust_remote_code=model.trust_remote_code)
    own = end_token_ids(tokenizer, declared_end_ids(model.files.directory))
    return [token for token in taught_end_ids(recipe, tokenizer, sources) if token not in own]


def named_ends(foreign: Sequence[int]) -> dict[str, list[int]]:
    """Return what foreign end tokens add to an identity; nothing where there is none."""
    return {"end_token_ids": sorted(foreign)} if foreign else {}
