"""Which prompts every model answers side by side, and the tokens that ask for an answer.

Held-out prompts are those of the cache, one per group, in the very tokens that the teacher saw before the row's last
answer; rows of plain text have no prompt and are left out. Questions of tasks and prompts of a file go through each
model's own template. `quick` takes ten, source after source in turn, the same whatever the seed; the others draw at
random from all.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from shared.cache.cache import Cache
from shared.errors import EvaluationError
from shared.keys import is_heldout
from shared.recipe.recipe import PromptSource, Recipe, SideBySide
from tools.evaluate.models.models import ModelUnderTest
from tools.evaluate.models.rendering import render, rendering_settings, rendering_sources, source_of
from tools.evaluate.results.results import heldout_layer
from tools.evaluate.tasks.question_files import read_rows
from tools.evaluate.tasks.questions import Question, read_questions, text_column
from tools.evaluate.tasks.registry import task_kind

SIZES = {"quick": 10, "medium": 50, "full": 350}
SHORTEST_PROMPT = 2
"""Tokens; what starts sooner with its answer is plain text."""


@dataclass(frozen=True, slots=True)
class SidePrompt:
    """One prompt of the comparison."""

    label: str
    """Source, domain or file that it comes from."""
    place: str
    text: str
    reference: str
    token_ids: tuple[int, ...] | None = None
    """As the cache has it; None: each model's template renders `question`."""
    question: Question | None = None
    source: PromptSource | None = None
    """Template settings of `question`."""


def choose_prompts(recipe: Recipe, settings: SideBySide | None = None) -> list[SidePrompt]:
    """Return the prompts of a recipe's side-by-side (or of other settings); equal recipes and files give equal prompts.

    Raises:
        EvaluationError: there is none, or a file cannot be read.
        CacheError: a cache cannot be read.
    """
    settings = settings or recipe.evaluate.side_by_side
    assert settings is not None
    pool: list[SidePrompt] = []
    for place in settings.prompts:
        pool += (
            _heldout(recipe)
            if place == "heldout"
            else _tasks(recipe)
            if place == "tasks"
            else _file(recipe, Path(place))
        )
    if not pool:
        raise EvaluationError(
            f"evaluate.side_by_side or cost: {', '.join(settings.prompts)} has no prompt; raise heldout.fraction, or "
            "name others"
        )
    return _chosen(pool, settings)


def read_prompt_rows(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield place, row and prompt of a file.

    Raises:
        EvaluationError: it cannot be read, or a row has no prompt.
    """
    for place, row in read_rows(path):
        try:
            yield place, row, text_column(row, "prompt")
        except ValueError as error:
            raise EvaluationError(f"{place}: no prompt to answer: {error}") from error


def prompt_ids(recipe: Recipe, prompts: Sequence[SidePrompt], model: ModelUnderTest, tokenizer: Any) -> list[list[int]]:
    """Return each prompt's token ids for one model, whose tokenizer that is.

    Raises:
        EvaluationError: prompts of a cache with another tokenizer than the model's.
        PromptError: the model's template cannot render a prompt.
    """
    from student_train.student.student import student_tokenizer_hash

    if any(prompt.token_ids is not None for prompt in prompts):
        wanted = str(Cache.open(recipe.cache[0], heldout_layer(recipe)).sequences_identity.tokenizer_hash)
        directory, trusts = str(model.files.directory), model.trust_remote_code
        found = student_tokenizer_hash(directory, None, wanted, trust_remote_code=trusts)
        if found is not None and found != wanted:
            raise EvaluationError(
                f"'{model.name}' has tokenizer {found} and the cache's held-out prompts have {wanted}; "
                "write `evaluate.side_by_side.prompts: [tasks]`"
            )
    rendered = []
    for prompt in prompts:
        if prompt.token_ids is not None:
            rendered.append(list(prompt.token_ids))
        else:
            assert prompt.source is not None
            assert prompt.question is not None
            rendered += render(tokenizer, prompt.source, [prompt.question])
    return rendered


def sources_of(prompts: Sequence[SidePrompt]) -> list[PromptSource]:
    """Return the template settings that prompts are rendered with, each once."""
    found = {prompt.source.model_dump_json(): prompt.source for prompt in prompts if prompt.source is not None}
    return list(found.values())


def digest_of(prompts: Sequence[SidePrompt]) -> str:
    """Return a hash of everything about prompts that answers depend on."""
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        source = prompt.source
        labels = source.model_dump(mode="json", include={"source", "format"}) if source else {}
        settings = {**labels, **rendering_settings(source)} if source else None
        digest.update(json.dumps([prompt.label, prompt.text, prompt.reference, prompt.token_ids, settings]).encode())
    return digest.hexdigest()


def _chosen(pool: Sequence[SidePrompt], settings: SideBySide) -> list[SidePrompt]:
    size = min(SIZES[settings.size], len(pool))
    if settings.size != "quick":
        places = sorted(random.Random(settings.seed).sample(range(len(pool)), size))
        return [pool[place] for place in places]
    by_label: dict[str, list[SidePrompt]] = defaultdict(list)
    for prompt in pool:
        by_label[prompt.label].append(prompt)
    found: list[SidePrompt] = []
    turn = 0
    while len(found) < size:
        found += [prompts[turn] for prompts in by_label.values() if turn < len(prompts)]
        turn += 1
    return found[:size]


def _heldout(recipe: Recipe) -> Iterator[SidePrompt]:
    """Yield held-out prompts by their group keys: a random order that does not depend on the disk's."""
    caches = [Cache.open(path, heldout_layer(recipe)) for path in recipe.cache]
    first: dict[bytes, tuple[Cache, int]] = {}
    for cache in caches:
        for row, key in enumerate(cache.group_keys):
            if is_heldout(bytes(key), recipe.heldout.fraction):
                first.setdefault(bytes(key), (cache, row))
    for _, (cache, row) in sorted(first.items()):
        found = cache.sequence(row)
        start = int(found.spans[-1][0])
        if start >= SHORTEST_PROMPT:
            ids = tuple(found.token_ids[:start].tolist())
            yield SidePrompt(found.source, cache.where(row), found.prompt, found.reference or "", ids)


def _tasks(recipe: Recipe) -> Iterator[SidePrompt]:
    for task in recipe.evaluate.tasks:
        source = source_of(recipe, task)
        for question in read_questions(task, task_kind(task)):
            yield SidePrompt(task.domain, question.place, question.prompt, question.reference, None, question, source)


def _file(recipe: Recipe, path: Path) -> Iterator[SidePrompt]:
    label = path.name.split(".")[0]
    plain = PromptSource(source=label, path=str(path), format="messages")
    named = rendering_sources(recipe)
    for place, row, text in read_prompt_rows(path):
        reference = row.get("reference")
        question = Question(place, text, reference if isinstance(reference, str) else "", row)
        yield SidePrompt(label, place, text, question.reference, None, question, (named or [plain])[0])
