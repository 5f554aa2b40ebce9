"""The engine of a build, opened by its first use, so that a build with nothing to do starts none."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from shared.errors import EngineError
from shared.recipe.recipe import Capture, Generate, Teacher
from teacher_cache.engines.protocol import Engine


class LazyEngine:
    """Opens an engine once and closes it at the end; a context manager."""

    def __init__(
        self,
        opener: Callable[..., Engine],
        teacher: Teacher,
        capture: Capture | None,
        generate: Generate | None,
        model_dir: Path,
    ) -> None:
        """Remember what to open, as for `teacher_cache.engines.open_engine`.

        Args:
            opener: opens it.
            teacher: with `max_model_len`, the longest sequence that the build may ask for.
            capture: what will be scored.
            generate: how it will answer.
            model_dir: its files.
        """
        self._open, self._teacher, self._capture = opener, teacher, capture
        self._generate, self._model_dir = generate, model_dir
        self._engine: Engine | None = None
        self.seconds_starting = 0.0
        """Wall time of the start."""

    def get(self) -> Engine:
        """Return the engine, starting it if need be.

        Raises:
            EngineError: it cannot start, or takes shorter sequences than the build was planned for.
        """
        if self._engine is None:
            started = time.monotonic()
            self._engine = self._open(
                self._teacher, self._capture, for_generation=self._generate, model_dir=self._model_dir
            )
            self.seconds_starting += time.monotonic() - started
            require_planned_length(self._engine, self._teacher.max_model_len or 0)
        return self._engine

    def close(self) -> None:
        """Close the engine; the next use would open another."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> LazyEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def require_planned_length(engine: Engine, planned: int, where: str = "") -> None:
    """Refuse an engine that takes shorter sequences than the build was planned for; `where` begins the sentence.

    Raises:
        EngineError: it does.
    """
    if engine.max_model_len < planned:
        raise EngineError(
            f"{where}the engine takes {engine.max_model_len:,} tokens where {planned:,} were planned; set "
            f"`teacher.max_model_len: {engine.max_model_len}`"
        )
