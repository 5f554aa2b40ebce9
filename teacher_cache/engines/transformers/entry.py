"""What the reference engine refuses, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shared.recipe.recipe import Capture, Generate, Teacher
from teacher_cache.engines.protocol import Engine


def refusal(teacher: Teacher, capture: Capture | None) -> str | None:
    """Say in a sentence what transformers cannot do, or None."""
    if teacher.quantization is not None:
        return "the transformers engine does not quantise; leave `teacher.quantization` out or use vllm"
    return None


def open_engine(
    teacher: Teacher,
    capture: Capture | None,
    *,
    for_generation: Generate | None,
    model_dir: Path,
    should_stop: Callable[[], bool],
) -> Engine:
    """Load the teacher into this process."""
    from teacher_cache.engines.transformers.transformers_engine import TransformersEngine

    return TransformersEngine.open(teacher, capture, model_dir)
