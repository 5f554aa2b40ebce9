"""The engine of a build, opened by its first use, so that a build with nothing to do starts none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from shared.errors import EngineError
from teacher_cache.engines.protocol import Engine


class LazyEngine:
    """Opens an engine once and closes it at the end; a context manager."""

    def __init__(self, open_engine: Callable[[], Engine], max_model_len: int) -> None:
        """Remember how to open it and the longest sequence that the build may ask for."""
        self._open = open_engine
        self._max_model_len = max_model_len
        self._engine: Engine | None = None
        self._provenance: Mapping[str, Any] | None = None
        self.seconds_starting = 0.0
        """Wall time of the start."""

    def get(self) -> Engine:
        """Return the engine, starting it if need be.

        Raises:
            EngineError: it cannot start, or takes shorter sequences than the build was planned for.
        """
        if self._engine is None:
            started = time.monotonic()
            self._engine = self._open()
            self.seconds_starting += time.monotonic() - started
            require_planned_length(self._engine, self._max_model_len)
        return self._engine

    def provenance(self) -> Mapping[str, Any]:
        """Return what the engine says about itself."""
        engine = self.get()
        if self._provenance is None:
            self._provenance = dict(engine.provenance())
        return self._provenance

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
