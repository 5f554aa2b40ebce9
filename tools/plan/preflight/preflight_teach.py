"""What is known to be wrong with phase 1 before any work: teacher, adapter, answering model, engine and prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from shared.cache.layout import read_header
from shared.cache.rendering import template_text
from shared.errors import IdentityError, ModelError
from shared.identity.weights_hash import weights_hash
from shared.recipe.base import Problem
from shared.recipe.sections.teacher import Teacher
from tools.plan.preflight.preflight_asked import Asked, said
from tools.plan.preflight.preflight_models import hash_of_tokenizer, model_problem


def teacher_problems(asked: Asked) -> Iterator[Problem]:
    """Check the teachers, their adapters and engines, and the model that answers."""
    teacher, generate = asked.recipe.teacher, asked.recipe.generate
    if teacher is None:
        return
    stated = asked.plans_only and (asked.recipe.assume.teacher is not None or bool(asked.recipe.assume.sources))
    yield from ((("teacher", *place), sentence) for place, sentence in _teacher(asked, teacher, stated=stated))
    if generate is not None and generate.model is not None:
        answers = model_problem(generate.model, None, weights=not asked.plans_only, stated=asked.plans_only)
        if answers:
            yield ("generate", "model"), answers
    for name, other in asked.recipe.teachers.items():
        found = list(_teacher(asked, other, stated=asked.elsewhere))
        if ("model",) not in dict(found):
            found += said(("model",), partial(_same_tokens, teacher, other))
        yield from ((("teachers", name, *place), sentence) for place, sentence in found)
    if asked.recipe.teachers:
        yield from _asked_twice({"teacher": teacher, **asked.recipe.teachers})


def _asked_twice(teachers: Mapping[str, Teacher]) -> Iterator[Problem]:
    """Name teachers whose layer an earlier one of them would write; what is wrong with a model is said elsewhere."""
    names: dict[tuple[str | None, ...], str] = {}
    for name, one in teachers.items():
        model, adapter = Path(one.model), one.adapter and Path(one.adapter)
        try:
            weights = (weights_hash(model), weights_hash(adapter) if adapter else None)
        except ModelError:
            continue
        first = names.setdefault((*weights, one.dtype, one.head_dtype, one.quantization), name)
        if first != name:
            sentence = (
                f"'{one.model}' is what teacher '{first}' runs, too; leave '{name}' out and say '{first}' instead"
            )
            yield ("teachers", name, "model"), sentence


def _teacher(asked: Asked, teacher: Teacher, *, stated: bool) -> Iterator[Problem]:
    """Check one teacher's files, adapter and engine; places are within its section."""
    problem = model_problem(teacher.model, teacher.revision, weights=not asked.plans_only, stated=stated)
    if problem:
        yield ("model",), problem
    adapter = None if asked.elsewhere else teacher.adapter
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        yield ("adapter",), f"'{adapter}' has no adapter_config.json; expected a LoRA's directory"
    if not asked.plans_only:
        from teacher_cache.engines import refusal

        reason = refusal(teacher, asked.recipe.capture)
        if reason is not None:
            yield ("engine",), reason


def _same_tokens(own: Teacher, other: Teacher) -> None:
    """Refuse a teacher of other tokens than the recipe's own.

    Raises:
        IdentityError: they differ.
        ModelError: a tokenizer cannot be loaded.
    """
    if not all((Path(one.model) / "config.json").is_file() for one in (own, other)):
        return
    found = [hash_of_tokenizer(one.model, trusts=one.trust_remote_code) for one in (own, other)]
    if found[0] != found[1]:
        raise IdentityError(
            f"'{other.model}' has tokenizer {found[1][:8]} and the teacher {found[0][:8]}; teachers of one cache share "
            "a tokenizer, so choose one of the same family"
        )


def prompt_problems(asked: Asked) -> Iterator[Problem]:
    """Check that every source of prompts and every template is there, and every cache that rows are taken from."""
    from teacher_cache.prompts.files.prompt_files import locate

    for i, prompt in enumerate(asked.recipe.prompts):
        if prompt.of_cache:
            yield from said(("prompts", i, "path"), partial(read_header, Path(prompt.path)))
        elif not (asked.plans_only and prompt.source in asked.recipe.assume.sources):
            yield from said(("prompts", i, "path"), partial(locate, prompt))
        yield from said(("prompts", i, "chat_template"), partial(template_text, prompt.chat_template))
    teacher = asked.recipe.teacher
    if teacher is not None and len(asked.caches) == 1 and (Path(teacher.model) / "config.json").is_file():
        from teacher_cache.build import refuse_other_cache

        yield from said(("cache", 0), partial(refuse_other_cache, asked.recipe))
    if not asked.recipe.prompts and asked.recipe.teacher is not None and not asked.caches:
        yield ("cache",), f"there is no cache at '{asked.recipe.cache[0]}' to score; add `prompts`, or name a cache"
