"""Do a task's questions fit the models that are asked them? A training that ends before an evaluation that cannot is
the longest way to learn it.

Only the longest questions are rendered, and only where a model's positions are few beside their bytes: tokens are
seldom more than bytes. A model that is not in a directory here is left to the evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shared.recipe.recipe import Recipe, Student, Task, Teacher
from tools.evaluate.tasks.questions import Question, read_questions
from tools.evaluate.tasks.registry import task_kind

_RENDERED = 8
"""Questions of a task that are rendered: the longest."""
_TEMPLATE = 1024
"""Tokens that a template and a system text seldom exceed."""


def require_questions(recipe: Recipe, task: Task) -> None:
    """Read a task's questions, and see that the longest of them fit each model of the evaluation.

    Raises:
        EvaluationError: they cannot be read, or one does not fit.
        PromptError: a template does not render one.
    """
    from shared.models.files import load_fast_tokenizer
    from teacher_cache.teacher.model_files import resolve_model
    from tools.evaluate.asking import ask_of_task
    from tools.evaluate.models.generate_answers import needed_length
    from tools.evaluate.models.models import ModelUnderTest

    questions = sorted(read_questions(task, task_kind(task)), key=_bytes_of)[-_RENDERED:]
    most = 2 * _bytes_of(questions[-1]) + _TEMPLATE + recipe.evaluate.max_new_tokens
    for name, section in _asked_here(recipe):
        files = resolve_model(section.model, section.revision)
        if files.text_config.get("max_position_embeddings", most) >= most:
            continue
        trusts = section.trust_remote_code
        tokenizer = load_fast_tokenizer(files.directory, trust_remote_code=trusts)
        model = ModelUnderTest(name, files, None, section.dtype, None, trusts)
        needed_length(model, [ask_of_task(recipe, task, questions, tokenizer)[0]])


def _bytes_of(question: Question) -> int:
    return len("".join([question.prompt, *(text for shot in question.shots for text in shot)]).encode())


def _asked_here(recipe: Recipe) -> Iterator[tuple[str, Teacher | Student]]:
    """Yield each model that lies in a directory with the first name that it is compared under; stages have the
    student's tokenizer and positions.
    """
    seen = set[str]()
    for name in recipe.evaluate.models:
        is_teacher = name == "teacher" or name in recipe.teachers
        section = recipe.teachers.get(name, recipe.teacher) if is_teacher else recipe.student
        if section is not None and section.model not in seen and Path(section.model).expanduser().is_dir():
            seen.add(section.model)
            yield name, section
