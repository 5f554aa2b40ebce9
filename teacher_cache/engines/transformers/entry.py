"""What the reference engine refuses, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shared.recipe.recipe import Capture, Generate
from shared.recipe.sections.teacher import TransformersTeacher
from teacher_cache.engines.protocol import Engine


def refusal(teacher: TransformersTeacher, capture: Capture | None) -> str | None:
    """Return None: what transformers cannot do, no section of its teacher can say."""
    return None


def opening(teacher: TransformersTeacher, capture: Capture | None) -> str:
    """Say what it loads."""
    return f"loading the weights of {teacher.model}"


def open_engine(
    teacher: TransformersTeacher,
    capture: Capture | None,
    *,
    for_generation: Generate | None,
    model_dir: Path,
    should_stop: Callable[[], bool],
) -> Engine:
    """Load the teacher into this process."""
    from teacher_cache.engines.transformers.transformers_engine import TransformersEngine

    return TransformersEngine.open(teacher, capture, model_dir)
