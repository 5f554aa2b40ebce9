"""What running servers refuse, and how their client is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shared.models.files import load_fast_tokenizer
from shared.recipe.recipe import Capture, Generate
from shared.recipe.sections.capture import server_problems
from shared.recipe.sections.teacher import ServedTeacher
from teacher_cache.engines.protocol import Engine


def refusal(teacher: ServedTeacher, capture: Capture | None) -> str | None:
    """Say in a sentence what no server returns, or None."""
    problem = None if capture is None else next(server_problems(capture), None)
    return None if problem is None else f"{'.'.join(map(str, problem[0]))}: {problem[1]}"


def opening(teacher: ServedTeacher, capture: Capture | None) -> str:
    """Say whom it asks."""
    return f"asking the server for {teacher.model}"


def open_engine(
    teacher: ServedTeacher,
    capture: Capture | None,
    *,
    for_generation: Generate | None,
    model_dir: Path,
    should_stop: Callable[[], bool],
) -> Engine:
    """Open a client of the recipe's servers."""
    from teacher_cache.engines.server.server_engine import ServerEngine

    tokenizer = load_fast_tokenizer(model_dir, trust_remote_code=teacher.trust_remote_code)
    return ServerEngine(teacher, capture, model_dir, tokenizer=tokenizer, should_stop=should_stop)
