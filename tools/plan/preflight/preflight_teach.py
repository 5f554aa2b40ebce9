"""What is known to be wrong with phase 1 before any work: teacher, adapter, answering model, engine and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shared.cache.layout import read_header
from shared.cache.rendering import template_text
from shared.errors import IdentityError
from shared.identity.identity import tokenizer_hash
from shared.recipe.base import Problem
from shared.recipe.teacher import Teacher
from tools.plan.preflight.preflight_asked import Asked, said
from tools.plan.preflight.preflight_models import model_problem


def teacher_problems(asked: Asked) -> Iterator[Problem]:
    """Check the teacher, its adapter, the model that answers and the engine."""
    teacher, generate = asked.recipe.teacher, asked.recipe.generate
    if teacher is None:
        return
    stated = asked.plans_only and (asked.recipe.assume.teacher is not None or bool(asked.recipe.assume.sources))
    problem = model_problem(teacher.model, teacher.revision, weights=not asked.plans_only, stated=stated)
    if problem:
        yield ("teacher", "model"), problem
    adapter = None if asked.elsewhere else teacher.adapter
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        yield ("teacher", "adapter"), f"'{adapter}' has no adapter_config.json; expected a LoRA's directory"
    if generate is not None and generate.model is not None:
        answers = model_problem(generate.model, None, weights=not asked.plans_only, stated=asked.plans_only)
        if answers:
            yield ("generate", "model"), answers
    if not asked.plans_only:
        from teacher_cache.engines import refusal

        reason = refusal(teacher, asked.recipe.capture)
        if reason is not None:
            yield ("teacher", "engine"), reason
    for name, other in asked.recipe.teachers.items():
        yield from ((("teachers", name, *place), sentence) for place, sentence in _further(asked, teacher, other))


def _further(asked: Asked, own: Teacher, other: Teacher) -> Iterator[Problem]:
    """Check one of several teachers: its files, its adapter, its engine, and that its tokens are those of the first."""
    problem = model_problem(other.model, other.revision, weights=not asked.plans_only, stated=asked.elsewhere)
    if problem:
        yield ("model",), problem
        return
    if other.adapter is not None and not (Path(other.adapter) / "adapter_config.json").is_file():
        yield ("adapter",), f"'{other.adapter}' has no adapter_config.json; expected a LoRA's directory"
    if not asked.plans_only:
        from teacher_cache.engines import refusal

        reason = refusal(other, asked.recipe.capture)
        if reason is not None:
            yield ("engine",), reason
    yield from said(("model",), lambda: _same_tokens(own, other))


def _same_tokens(own: Teacher, other: Teacher) -> None:
    """Refuse a teacher of other tokens than the recipe's own.

    Raises:
        IdentityError: they differ.
        ModelError: a tokenizer cannot be loaded.
    """
    from teacher_cache.teacher.model_files import load_tokenizer, resolve_model, tokenizer_files

    if not all((Path(one.model).expanduser() / "config.json").is_file() for one in (own, other)):
        return
    found = [
        tokenizer_hash(
            tokenizer_files(load_tokenizer(resolve_model(one.model), trust_remote_code=one.trust_remote_code))[
                "tokenizer.json"
            ]
        )
        for one in (own, other)
    ]
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
            yield from said(("prompts", i, "path"), lambda path=Path(prompt.path): read_header(path))  # type: ignore[misc]
        elif not (asked.plans_only and prompt.source in asked.recipe.assume.sources):
            yield from said(("prompts", i, "path"), lambda prompt=prompt: locate(prompt))  # type: ignore[misc]
        yield from said(
            ("prompts", i, "chat_template"),
            lambda prompt=prompt: template_text(prompt.chat_template),  # type: ignore[misc]
        )
    if not asked.recipe.prompts and asked.recipe.teacher is not None and not asked.caches:
        yield ("cache",), f"there is no cache at '{asked.recipe.cache[0]}' to score; add `prompts`, or name a cache"
