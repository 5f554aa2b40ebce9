"""Engines: what answers prompts and scores sequences, behind one small protocol.

An engine is a folder here whose `entry.py` says what it refuses and opens it; its name in a recipe is the folder's.
Importing this package loads neither torch, vllm nor transformers; opening an engine loads what that engine needs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol

from shared.errors import EngineError
from shared.recipe.recipe import Capture, Generate, Teacher
from teacher_cache.engines.protocol import Engine, Generated, GenerateRequest, Scored, ScoreRequest


class Entry(Protocol):
    """What the `entry.py` of every engine offers, light to import."""

    def refusal(self, teacher: Teacher, capture: Capture | None) -> str | None:
        """Say in a sentence why this engine cannot do what is asked, or None."""

    def opening(self, teacher: Teacher, capture: Capture | None) -> str:
        """Say what opening it does: minutes may pass before the first row."""

    def open_engine(
        self,
        teacher: Teacher,
        capture: Capture | None,
        *,
        for_generation: Generate | None,
        model_dir: Path,
        should_stop: Callable[[], bool],
    ) -> Engine:
        """Load a teacher; arguments as for `teacher_cache.engines.open_engine`."""


def _entry(teacher: Teacher) -> Entry:
    module: Entry = import_module(f"{__name__}.{teacher.engine}.entry")
    return module


def refusal(teacher: Teacher, capture: Capture | None) -> str | None:
    """Say in a sentence why this engine cannot do what is asked, or None; loads no engine."""
    return _entry(teacher).refusal(teacher, capture)


def opening(teacher: Teacher, capture: Capture | None) -> str:
    """Say what opening this engine does."""
    return _entry(teacher).opening(teacher, capture)


def open_engine(
    teacher: Teacher,
    capture: Capture | None,
    *,
    for_generation: Generate | None,
    model_dir: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> Engine:
    """Load a teacher.

    Args:
        teacher: what to load and how.
        capture: what `score` keeps; None where nothing will be scored.
        for_generation: how `generate` answers; None where nothing will be generated.
        model_dir: the teacher's files on disk.
        should_stop: asked by an engine that waits for something outside this process.

    Raises:
        EngineError: the engine cannot start or cannot do what is asked.
    """
    reason = refusal(teacher, capture)
    if reason is not None:
        raise EngineError(reason)
    return _entry(teacher).open_engine(
        teacher, capture, for_generation=for_generation, model_dir=model_dir, should_stop=should_stop
    )


__all__ = ["Engine", "GenerateRequest", "Generated", "ScoreRequest", "Scored", "open_engine", "opening", "refusal"]
