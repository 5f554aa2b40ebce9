"""Rows and tokens that a build would make, counted from the prompts before any engine starts.

The rows are those of the build itself (same keys, same duplicates, same rows that the cache already holds). Tokens are
counted with the teacher's tokenizer and template for the first rows of each source and scaled up for the rest. Cost:
one pass over the prompts, a millisecond more for each of at most 2,000 rows per source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from shared.cache.layout import sequences_dir
from shared.errors import EngineError, PromptError, first_line
from shared.keys import is_heldout
from shared.parts.jobs import committed_keys
from shared.parts.records import list_records
from shared.recipe.recipe import Recipe
from teacher_cache.prompts.templates.spans import Template, Templates
from teacher_cache.student_answers import Asking

ROWS_COUNTED = 2000
"""Rows per source whose tokens are counted one by one."""
CHARACTERS_PER_TOKEN = 4.0


@dataclass(slots=True)
class SourceCount:
    """One source of prompts."""

    rows: int = 0
    rows_in_cache: int = 0
    rows_heldout: int = 0
    """Rows whose prompts no stage trains on."""
    duplicates: int = 0
    rows_counted: int = 0
    prompt_tokens_counted: int = 0
    answer_tokens_counted: int = 0
    longest_tokens: int = 0
    """Longest prompt, or prompt with its given answer, among the rows counted."""
    too_long: int = 0
    """Rows that the teacher's length has no room for; they are not among `rows`."""
    answer_tokens_assumed: int | None = None
    """Mean tokens of an answer where the recipe states the source's size; None where the rows were counted."""

    def scaled(self, counted: int) -> int:
        """Scale a count of the rows counted to the rows that are still to be done."""
        return round(counted / max(self.rows_counted, 1) * (self.rows - self.rows_in_cache))


@dataclass(slots=True)
class PromptCount:
    """All sources."""

    sources: dict[str, SourceCount] = field(default_factory=dict)
    groups: set[bytes] = field(default_factory=set)
    """Group keys of the rows; kept where the recipe has tasks to compare with."""
    set_aside: int = 0
    first_problem: str | None = None
    tokenizer_note: str | None = None
    """Why tokens are estimated from characters; None where the tokenizer counts."""
    assumed: list[str] = field(default_factory=list)
    """A sentence for each source out of reach, whose size the recipe states, and for what is not read of one."""


def count_prompts(recipe: Recipe) -> PromptCount:
    """Count rows and tokens of a recipe's prompts; a source out of reach has the size that `assume` states.

    Raises:
        PromptError: a source is missing, cannot be read or has no row, and the recipe states no size for it.
    """
    from teacher_cache.prompts.problems import Problems
    from teacher_cache.prompts.prompts import read_prompts
    from teacher_cache.prompts.work_list import list_rows

    problems, result = Problems(), PromptCount()
    recipe = _reachable(recipe, result)
    if not recipe.prompts:
        return result
    counter = _TokenCounter(recipe, result)
    committed, longest = _committed(recipe.cache[0]), _longest_row(recipe, counter)
    current = _Current(read_prompts(recipe.prompts, problems))
    ends = _foreign_ends(recipe, counter)
    for row in list_rows(
        current,
        recipe.prompts,
        recipe.generate,
        recipe.seed,
        problems,
        _answerer(recipe),
        foreign_ends=ends,
        is_held=committed.__contains__,
    ):
        source = result.sources.setdefault(row.source, SourceCount())
        if recipe.evaluate.tasks:
            result.groups.add(row.group_key)
        source.rows += 1
        source.rows_in_cache += row.row_key in committed
        is_held = is_heldout(row.group_key, recipe.heldout.fraction)
        source.rows_heldout += is_held
        if source.rows_counted + source.too_long < ROWS_COUNTED:
            is_there, why = row.row_key in committed, None
            try:
                prompt, answer = counter.count(current.item)
            except PromptError as error:
                if is_there:
                    continue  # it was rendered when it was built
                counter.templates.require_date()
                why = str(error)
            else:
                if not is_there:
                    why = _too_long(prompt, answer, longest, generates=recipe.generate is not None)
                    source.too_long += why is not None
            if why is not None:
                problems.add(current.item.path, current.item.line, why)
                source.rows -= 1
                source.rows_heldout -= is_held
                continue
            source.rows_counted += 1
            source.prompt_tokens_counted += prompt
            source.answer_tokens_counted += answer
            source.longest_tokens = max(source.longest_tokens, prompt + answer)
    for name, count in problems.duplicates.items():
        result.sources.setdefault(name, SourceCount()).duplicates = count
    result.assumed += problems.notes() + counter.templates.unread_settings + _unseen_answerer(recipe)
    result.set_aside = problems.total + sum(_too_long_of_the_rest(source) for source in result.sources.values())
    result.first_problem = problems.listed[0].sentence() if problems.listed else None
    return result


def require_prompts(recipe: Recipe, asking: Asking) -> None:
    """Refuse to let a student be asked more of a recipe's prompts than there are; read no further than that takes.

    Raises:
        PromptError: there are fewer, or a source is missing or cannot be read.
    """
    from teacher_cache.prompts.problems import Problems
    from teacher_cache.prompts.prompts import read_prompts
    from teacher_cache.prompts.work_list import list_rows

    if isinstance(asking.prompts, float):
        return  # a share of what there is
    problems = Problems()
    prompts = read_prompts(recipe.prompts, problems)
    rows = list_rows(prompts, recipe.prompts, recipe.generate, recipe.seed, problems, None, foreign_ends=[])
    of_half = (row for row in rows if is_heldout(row.group_key, asking.heldout_fraction) == asking.heldout)
    asking.number_of(sum(1 for _ in islice(of_half, asking.prompts)))


def _longest_row(recipe: Recipe, counter: _TokenCounter) -> int | None:
    """Return the tokens of the longest row that a build accepts, or None where a model's files are out of reach."""
    from shared.schema import MAX_TOKENS_PER_ROW
    from teacher_cache.teacher.model_files import resolve_model

    if recipe.teacher is None or counter.tokenizer is None:
        return None
    try:
        files = resolve_model(recipe.teacher.model, recipe.teacher.revision)
        lengths = [MAX_TOKENS_PER_ROW, recipe.teacher.max_model_len or files.max_position_embeddings]
        if recipe.generate is not None and recipe.generate.model is not None:
            lengths.append(resolve_model(recipe.generate.model).max_position_embeddings)
    except EngineError:
        return None
    return min(lengths)


def _too_long(prompt: int, answer: int, longest: int | None, *, generates: bool) -> str | None:
    """Say why a row has no room, in the words of the build that sets it aside; None where it has."""
    from teacher_cache.prompts.sequence_maker import prompt_too_long, row_too_long

    if longest is None:
        return None
    return prompt_too_long(prompt, longest) if generates else row_too_long(prompt + answer, longest)


def _too_long_of_the_rest(source: SourceCount) -> int:
    """Take from the rows that were not looked at the share of too long ones among those that were; return how many."""
    seen = source.rows_counted + source.too_long
    rest = min(source.rows - source.rows_counted, source.rows - source.rows_in_cache)
    more = round(source.too_long / max(seen, 1) * max(rest, 0))
    source.rows_heldout -= round(more * source.rows_heldout / max(source.rows, 1))
    source.rows -= more
    source.too_long += more
    return more


def _answerer(recipe: Recipe) -> str | None:
    """Return what of the answering model enters row_keys; another model out of reach has no row in the cache that could
    be found, and a teacher out of reach is taken for the one that the cache began with.
    """
    from teacher_cache.teacher.answerer import answerer_key

    try:
        return answerer_key(recipe.generate, recipe.teacher, recipe.cache[0])
    except EngineError:
        return "out of reach" if recipe.generate is not None and recipe.generate.model is not None else None


def _unseen_answerer(recipe: Recipe) -> list[str]:
    """Say that the model that answers is out of reach, and what the plan therefore cannot know of it."""
    from teacher_cache.teacher.model_files import resolve_model

    if recipe.generate is None or recipe.generate.model is None:
        return []
    try:
        resolve_model(recipe.generate.model)
    except EngineError as error:
        return [
            f"generate.model is out of reach ({first_line(error)}), so its tokenizer and its longest sequence are not "
            "checked, and none of its answers is looked for in the cache; `decant teach` needs it"
        ]
    return []


def _foreign_ends(recipe: Recipe, counter: _TokenCounter) -> list[int | None]:
    """Return the end tokens that enter row_keys; without its tokenizer no row could be found in the cache anyway."""
    from teacher_cache.engines.answer_ends import foreign_ends
    from teacher_cache.teacher.model_files import resolve_model

    if recipe.generate is None or recipe.teacher is None or not counter.templates:
        return []
    try:
        other = recipe.generate.model
        files = resolve_model(other) if other else resolve_model(recipe.teacher.model, recipe.teacher.revision)
        return foreign_ends(counter.templates.ends, counter.tokenizer, files.directory, recipe.generate)
    except EngineError:
        return []


def _reachable(recipe: Recipe, result: PromptCount) -> Recipe:
    """Enter sources that are out of reach with their stated sizes; return the recipe with the others alone."""
    from teacher_cache.prompts.files.prompt_files import locate

    reasons: dict[str, PromptError] = {}
    for prompt in recipe.prompts:
        if prompt.of_cache:
            continue  # a cache is on this machine
        try:
            locate(prompt)
        except PromptError as error:
            if prompt.source not in recipe.assume.sources:
                raise
            reasons.setdefault(prompt.source, error)
    for name, reason in reasons.items():
        stated = recipe.assume.sources[name]
        rows = stated.rows * (1 if recipe.generate is None else recipe.generate.samples_per_prompt)
        result.sources[name] = SourceCount(
            rows=rows,
            rows_heldout=round(recipe.heldout.fraction * rows),
            rows_counted=1,
            prompt_tokens_counted=stated.prompt_tokens,
            answer_tokens_counted=stated.answer_tokens,
            answer_tokens_assumed=stated.answer_tokens,
        )
        sizes = f"{stated.rows:,} prompts of {stated.prompt_tokens:,} tokens, answers of {stated.answer_tokens:,}"
        result.assumed.append(f"source {name} has {sizes}, as the recipe states, since it cannot be reached ({reason})")
    return recipe.model_copy(
        update={"prompts": tuple(prompt for prompt in recipe.prompts if prompt.source not in reasons)}
    )


class _Current:
    """Passes conversations on and remembers the last."""

    def __init__(self, conversations: Iterable[Any]) -> None:
        self._conversations = conversations
        self.item: Any = None

    def __iter__(self) -> Iterator[Any]:
        for item in self._conversations:
            self.item = item
            yield item


class _TokenCounter:
    """Counts prompt and answer tokens of conversations: with the teacher's tokenizer, or from characters."""

    def __init__(self, recipe: Recipe, result: PromptCount) -> None:
        self._given = recipe.generate is None
        self.templates = Templates()
        self._last: tuple[Any, tuple[int, int]] | None = None
        self.tokenizer: Any = None
        """The teacher's; None where it is out of reach."""
        try:
            self.tokenizer = _tokenizer(recipe)
        except EngineError as error:
            is_here = recipe.teacher is not None and Path(recipe.teacher.model).is_dir()
            if is_here and not recipe.assume.model_fields_set:
                raise  # as a build does
            result.tokenizer_note = str(error)
        else:
            self.templates = Templates(Template(self.tokenizer, source) for source in recipe.prompts)

    def count(self, conversation: Any) -> tuple[int, int]:
        """Return tokens of the prompt and of the given answer (0 where it is to be generated).

        Raises:
            PromptError: the template cannot render the conversation.
        """
        if self._last is None or self._last[0] is not conversation:
            self._last = conversation, self._count(conversation)
        return self._last[1]

    def _count(self, conversation: Any) -> tuple[int, int]:
        if conversation.sequence is not None:
            supervised = sum(end - start for start, end in conversation.sequence.spans)
            return len(conversation.sequence.token_ids) - supervised, supervised
        if not self.templates:
            return _estimate(conversation, self._given)
        template = self.templates[conversation.origin]
        if not self._given:
            return len(template.prompt_ids(conversation)), 0
        token_ids, spans = template.complete(conversation)
        supervised = int((spans[:, 1] - spans[:, 0]).sum())
        return len(token_ids) - supervised, supervised


def _tokenizer(recipe: Recipe) -> Any:
    """Return the teacher's tokenizer.

    Raises:
        EngineError: it cannot be loaded.
    """
    from shared.models.files import load_fast_tokenizer
    from teacher_cache.teacher.model_files import resolve_model

    assert recipe.teacher is not None
    files = resolve_model(recipe.teacher.model, recipe.teacher.revision)
    return load_fast_tokenizer(files.directory, trust_remote_code=recipe.teacher.trust_remote_code)


def _estimate(conversation: Any, given: bool) -> tuple[int, int]:
    """Estimate tokens from characters."""
    from teacher_cache.prompts.formats.prompt_formats import group_text

    tokens = round(len(group_text(conversation.messages, conversation.text)) / CHARACTERS_PER_TOKEN)
    if conversation.text is not None:
        return (1, tokens) if given else (tokens, 0)
    answers = sum(len(turn["content"]) for turn in conversation.messages if turn["role"] == "assistant") if given else 0
    return tokens, round(answers / CHARACTERS_PER_TOKEN)


def _committed(cache: Path) -> frozenset[bytes]:
    """Return the row_keys that the cache holds already."""
    directory = sequences_dir(cache)
    keys = committed_keys(directory, list_records(directory))
    return frozenset(key.tobytes() for key in keys)
