"""What is known to be wrong with phase 1 before any work: teacher, adapter, answering model, engine and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shared.cache.layout import read_header
from shared.cache.rendering import template_text
from shared.recipe.base import Problem
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
