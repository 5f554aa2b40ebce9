"""Answers from another cache: its rows become rows of this one as they are, token for token.

Nothing is rendered or tokenized again, so both caches must have the same tokenizer. A row keeps its group, prompt,
answer, reference and why it ended; its label too, unless the recipe gives one. Its row_key is that of a given answer,
by its tokens and spans, so the same row from two caches is one row.
Cost: one pass over the other cache's memory-mapped parts, one row in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from shared.cache.cache import Cache
from shared.cache.groups import GroupRule
from shared.cache.layout import read_header, sequences_dir
from shared.errors import IdentityError
from shared.parts.records import list_records
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_formats import Conversation, GivenSequence


def read_cache(source: PromptSource, origin: int) -> Iterator[Conversation]:
    """Yield the rows of a cache in its order.

    Raises:
        CacheError: there is no cache at the source's path, or it is damaged.
    """
    cache = Cache.open_sequences(source.path)
    for index in range(len(cache)):
        row = cache[index]
        sequence = GivenSequence(
            prompt=row.prompt,
            group_key=row.group_key,
            token_ids=row.token_ids.tolist(),
            spans=row.spans.tolist(),
            response=row.response,
            finish_reason=row.finish_reason,
        )
        label = source.source or row.source
        yield Conversation(label, source.path, index + 1, source.format, None, None, row.reference, origin, sequence)


def cache_content_hash(source: PromptSource) -> str:
    """Return what rows a cache holds as one string, from the checksums in its records.

    Raises:
        CacheError: there is no cache at the source's path, or it is damaged.
    """
    read_header(Path(source.path))
    digest = xxhash.xxh3_128()
    for record in sorted(list_records(sequences_dir(Path(source.path))), key=lambda record: record.stem):
        digest.update(f"{record.stem} {record.xxh3}\n".encode())
    return f"cache:{digest.hexdigest()}"


def require_tokenizer(sources: Sequence[PromptSource], tokenizer_hash: str, teacher: str) -> None:
    """Refuse caches among the sources that were written with another tokenizer than the teacher's.

    Raises:
        IdentityError: with both hashes.
        CacheError: there is no cache at a source's path.
    """
    for source in sources:
        if not source.of_cache:
            continue
        found = read_header(Path(source.path)).identity.tokenizer_hash
        if found != tokenizer_hash:
            raise IdentityError(
                f"{source.path}: was written with another tokenizer (hash {found[:8]}) than the teacher {teacher} has "
                f"({tokenizer_hash[:8]}), so its tokens cannot be scored; expected a cache of the same model family"
            )


def group_rule(cache: Path, sources: Sequence[PromptSource]) -> GroupRule:
    """Return the rule of a build's group keys: the one its cache began with; for a new cache, that of caches among its
    sources.

    Raises:
        IdentityError: a cache among the sources groups its rows by another rule than the cache that they would join.
    """
    rules = {source.path: read_header(Path(source.path)).identity.groups for source in sources if source.of_cache}
    if not (cache / "cache.json").is_file():
        return "prompt" if "prompt" in rules.values() else "first question"
    own = read_header(cache).identity.groups
    for path, rule in rules.items():
        if own == "first question" and rule != own:
            raise IdentityError(
                f"{path}: groups its rows by the {rule} and {cache} by the {own}, so the hold-out would not keep them "
                "apart; build into a new cache, which then groups like the older one"
            )
    return own


def answers_of(sources: Sequence[PromptSource]) -> dict[str, str]:
    """Return who wrote the answers of the caches among the sources, as a record says it; empty where there is none."""
    found = {read_header(Path(source.path)).identity.answers or "unknown" for source in sources if source.of_cache}
    return {"answers": "; ".join(sorted(found))} if found else {}
