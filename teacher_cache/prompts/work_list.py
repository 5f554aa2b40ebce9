"""The work list: every conversation becomes plan rows with keys, duplicates dropped and counted.

A row is a prompt with a sample index (to be answered), or a prompt with its given answer (to be taken over). Only equal
row_keys are duplicates; the first source listed wins. What the recipe says about rendering and sampling is part of a
row_key, so a changed `system` or `temperature` makes new rows instead of silently keeping old ones. Rows that the cache
holds already are left out by `shared.parts.jobs.create_job`.

The request names the job: everything that decides which rows exist and what their sequences are, with files by content,
so that moving a file changes nothing and changing it does.

Cost: one pass; 20 to 60 bytes per row for the keys seen, nothing else per row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from shared.cache.groups import GroupRule
from shared.cache.rendering import rendering_of
from shared.cache.writing.growing_key_set import GrowingKeySet
from shared.errors import PromptError
from shared.identity.grown import unmoved
from shared.keys import canonical_json, content_key, group_key, row_key
from shared.parts.jobs import PlanRow
from shared.recipe.recipe import Generate, PromptSource, Recipe
from teacher_cache.prompts.cache_source import cache_content_hash
from teacher_cache.prompts.files.prompt_files import content_hash
from teacher_cache.prompts.formats.prompt_formats import (
    NO_ANSWER,
    Conversation,
    GivenSequence,
    group_text,
    prompt_text,
    prompt_turns,
)
from teacher_cache.prompts.formats.prompt_turns import Message
from teacher_cache.prompts.problems import Problems

READING_SETTINGS = ("config", "columns", "ignore")
"""Settings that decide which rows a source has; a request says them where they are not at their default."""
SEED_BITS = 63


def list_rows(
    conversations: Iterable[Conversation],
    sources: Sequence[PromptSource],
    generate: Generate | None,
    seed: int,
    problems: Problems,
    answerer: str | None = None,
    groups: GroupRule = "first question",
    foreign_ends: Sequence[int | None] = (),
    is_held: Callable[[bytes], bool] = lambda key: False,
) -> Iterator[PlanRow]:
    """Yield the plan rows of conversations, each row_key once; what cannot be a row goes to `problems`.

    Args:
        conversations: as read from `sources`.
        sources: entries of the recipe's `prompts`.
        generate: how answers are drawn; None where they are given.
        seed: the recipe's seed, for answers whose section has none.
        problems: collects rows without a prompt or an answer, and counts duplicates per source.
        answerer: identity of the model that answers, where it is not the teacher.
        groups: the cache's rule of which rows belong together.
        foreign_ends: of each source, the end token that its template adds to those of the model that answers.
        is_held: whether the cache holds a row_key; asked of rows with thoughts in trained earlier answers alone.
    """
    seen = GrowingKeySet()
    renderings = [rendering_of(source) for source in sources]
    samplings = [
        {**_sampling(generate, seed, answerer), **rendering, **_end(foreign_ends, origin)} if generate else {}
        for origin, rendering in enumerate(renderings)
    ]

    def rows_of(conversation: Conversation) -> list[PlanRow]:
        origin = conversation.origin
        if conversation.sequence is not None:
            return [_row_of_cache(conversation, conversation.sequence)]
        if generate is None:
            return [_answered_row(conversation, sources[origin], renderings[origin], groups, is_held)]
        return _rows_to_answer(conversation, samplings[origin], generate.samples_per_prompt, groups)

    for conversation in conversations:
        try:
            rows = rows_of(conversation)
        except ValueError as error:
            problems.add(conversation.path, conversation.line, str(error))
            continue
        for row in rows:
            if seen.add(row.row_key):
                yield row
            else:
                problems.duplicates[row.source] += 1


def conversation_of(row: PlanRow) -> Conversation:
    """Return the conversation that a plan row was made from, its origin in the recipe included.

    Raises:
        PromptError: the plan was written by something else.
    """
    try:
        document = json.loads(row.messages)
        taken = document.get("sequence")
        return Conversation(
            source=row.source,
            path=document["path"],
            line=row.line,
            format=row.format,
            messages=document.get("messages"),
            text=document.get("text"),
            reference=row.reference,
            origin=int(document["origin"]),
            sequence=GivenSequence(prompt=row.prompt, group_key=row.group_key, **taken) if taken is not None else None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise PromptError(
            f"source {row.source!r} line {row.line}: the plan's row cannot be read ({error}); build a new cache"
        ) from error


def request_of(
    recipe: Recipe,
    generator: Mapping[str, Any] | None,
    tokenizer_hash: str,
    max_model_len: int,
    foreign_ends: Sequence[int | None] = (),
) -> dict[str, Any]:
    """Return what names a build's job.

    Args:
        recipe: the recipe, with prompts.
        generator: identity of the model that answers; None where answers are given.
        tokenizer_hash: of the tokenizer that makes the sequences.
        max_model_len: longest sequence in tokens, which decides what is set aside.
        foreign_ends: as for `list_rows`.

    Raises:
        PromptError: a source is missing or cannot be read.
    """
    generate = None
    if recipe.generate is not None:
        # The generator says which model answers, whatever its directory is called.
        answers = {"seed": answer_seed(recipe.generate, recipe.seed), "model": None}
        later = unmoved(recipe.generate, Generate.NAMES_THE_JOB)
        generate = {**recipe.generate.model_dump(mode="json", exclude=later), **answers}
    return {
        "prompts": [
            {
                "source": source.source,
                "content": _content(source),
                "format": source.format,
                "split": source.split,
                "limit": source.limit,
                **source.model_dump(mode="json", include=set(READING_SETTINGS), exclude_defaults=True),
                **rendering_of(source),
                **(_end(foreign_ends, origin) if generate else {}),
            }
            for origin, source in enumerate(recipe.prompts)
        ],
        "generate": generate,
        "generator": None if generator is None else dict(generator),
        "tokenizer": tokenizer_hash,
        "max_model_len": max_model_len,
        "rows_per_part": recipe.rows_per_part,
    }


def require_unchanged(sources: Sequence[PromptSource], request: Mapping[str, Any]) -> None:
    """Refuse what was listed of sources that are no longer what the request names; asked after the last row.

    Raises:
        PromptError: a file, a data set of the hub or a cache changed.
    """
    for source, asked in zip(sources, request["prompts"], strict=True):
        if _content(source) != asked["content"]:
            raise PromptError(f"{source.path}: changed while its rows were listed; start again once it stays")


def _content(source: PromptSource) -> str:
    return cache_content_hash(source) if source.of_cache else content_hash(source)


def answer_seed(generate: Generate, seed: int) -> int:
    """Return the seed of the answers: the section's own, or the recipe's."""
    return seed if generate.seed is None else generate.seed


def request_seed(key: bytes, seed: int) -> int:
    """Return the 63-bit seed of one answer, a function of its row_key and the seed of the answers."""
    return xxhash.xxh3_64_intdigest(key + canonical_json(seed)) >> (64 - SEED_BITS)


def _sampling(generate: Generate, seed: int, answerer: str | None) -> dict[str, Any]:
    """Return what a row_key says of how an answer is drawn, and by whom where it is not the teacher."""
    left_out = Generate.DRAWS_NO_OTHER | unmoved(generate, Generate.NAMES_THE_JOB)
    drawn = generate.model_dump(mode="json", exclude=set(left_out))
    return {**drawn, "seed": answer_seed(generate, seed), **({} if answerer is None else {"model": answerer})}


def _answered_row(
    conversation: Conversation,
    source: PromptSource,
    rendering: Mapping[str, Any],
    groups: GroupRule,
    is_held: Callable[[bytes], bool],
) -> PlanRow:
    """Return the row of a conversation whose answer is given."""
    answered = _answered(conversation)
    asked = group_key(prompt_text(answered, conversation.text))
    rendering = {**rendering, **_unsaid(answered, given=True)}
    key = row_key(asked, None, 0, _answer(answered) + _suffix(rendering))
    thoughts = _trained_thoughts(answered) if source.supervise == "all" else []
    if thoughts and not is_held(key):
        key = row_key(asked, None, 0, _answer(answered) + _suffix({**rendering, "thoughts": thoughts}))
    content = {"text": conversation.text} if answered is None else {"messages": answered}
    return next(_plan_rows(conversation, answered, [key], content, conversation.reference, groups))


def _rows_to_answer(
    conversation: Conversation, sampling: Mapping[str, Any], num_samples: int, groups: GroupRule
) -> list[PlanRow]:
    """Return the rows of a prompt, one for each of its answers to come."""
    messages = conversation.messages
    asked = group_key(prompt_text(messages, conversation.text))
    sampling = {**sampling, **_unsaid(messages, given=False)}
    keys = [row_key(asked, sampling, index, None) for index in range(num_samples)]
    turns = prompt_turns(messages)
    given = (messages or [])[len(turns) :]
    reference = given[-1]["content"] if conversation.reference is None and given else conversation.reference
    return list(_plan_rows(conversation, messages, keys, {"messages": turns}, reference, groups))


def _plan_rows(
    conversation: Conversation,
    messages: list[Message] | None,
    keys: Sequence[bytes],
    content: Mapping[str, Any],
    reference: str | None,
    groups: GroupRule,
) -> Iterator[PlanRow]:
    """Yield a row for each key; `messages` tell prompt and group."""
    group = group_key(group_text(messages, conversation.text, groups))
    prompt = prompt_text(messages, conversation.text)
    kept = canonical_json({**content, "origin": conversation.origin, "path": conversation.path}).decode()
    for index, key in enumerate(keys):
        yield PlanRow(
            group, key, conversation.source, conversation.line, index, prompt, kept, reference, conversation.format
        )


def _row_of_cache(conversation: Conversation, sequence: GivenSequence) -> PlanRow:
    """Return the row of a sequence that is taken over from another cache; its answer is its tokens and spans."""
    content = content_key(np.asarray(sequence.token_ids, dtype=np.int32), np.asarray(sequence.spans, dtype=np.int32))
    key = row_key(sequence.group_key, None, 0, f"tokens {content.hex()}")
    taken = {name: getattr(sequence, name) for name in ("token_ids", "spans", "response", "finish_reason")}
    messages = canonical_json({"sequence": taken, "origin": conversation.origin, "path": conversation.path}).decode()
    place = conversation.source, conversation.line, 0
    return PlanRow(
        sequence.group_key, key, *place, sequence.prompt, messages, conversation.reference, conversation.format
    )


def _answered(conversation: Conversation) -> list[Message] | None:
    """Return the turns up to the last answer, or None for text."""
    if conversation.messages is None:
        return None
    last = max((i for i, turn in enumerate(conversation.messages) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(NO_ANSWER)
    return conversation.messages[: last + 1]


def _answer(answered: list[Message] | None) -> str:
    """Return the given answer's text as a row_key hashes it; nothing for text, whose group says it all."""
    if answered is None:
        return ""
    given = answered[len(prompt_turns(answered)) :]
    if len(given) == 1 and set(given[0]) == {"role", "content"}:
        return str(given[0]["content"])
    return canonical_json(given).decode()


def _unsaid(answered: list[Message] | None, given: bool) -> dict[str, Any]:
    """Return what of the earlier turns a prompt's text does not say, such as tool calls, so that a row_key says it.

    Earlier thoughts are left out, as they always were: templates drop them, where they are context.
    """
    hidden = {"role", "content", "reasoning_content"} | (set() if given else {"train"})
    said = [
        [index, {name: value for name, value in turn.items() if name not in hidden}]
        for index, turn in enumerate(prompt_turns(answered) if answered else ())
    ]
    context = [entry for entry in said if entry[1]]
    return {"context": context} if context else {}


def _trained_thoughts(answered: list[Message] | None) -> list[list[Any]]:
    """Return [index, thoughts] of the earlier answers that are trained: they are in the row's tokens, or it is refused.

    A row_key says them but where the cache holds the row under the key of earlier versions, which left them out.
    """
    turns = prompt_turns(answered) if answered else []
    said = [(index, turn.get("reasoning_content")) for index, turn in enumerate(turns) if turn.get("train", True)]
    return [[index, thoughts] for index, thoughts in said if thoughts]


def _end(foreign_ends: Sequence[int | None], origin: int) -> dict[str, int]:
    """Return the end token that a source's template adds, as keys hash it; empty where the model ends there anyway."""
    end = foreign_ends[origin] if foreign_ends else None
    return {} if end is None else {"end_token": end}


def _suffix(rendering: Mapping[str, Any]) -> str:
    return "\x00" + canonical_json(dict(rendering)).decode() if rendering else ""
