"""Import what takes seconds, without scikit-learn and without the walks of the garbage collector.

The garbage collector walks again and again over the hundred thousands of objects that imports make, and finds nothing:
it rests until they are there. transformers imports scikit-learn where it is installed (lm-eval brings it) for a curve
of assisted generation and scores of GLUE, which nothing here uses.
Cost: what the imports themselves take.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

_ASK_FOR_SCIKIT_LEARN = "transformers.generation.candidate_generator", "transformers.data.metrics"
"""Modules that import it where it is installed."""


def import_transformers() -> None:
    """Import what every model of transformers needs: seconds at the first call, nothing later, nor without torch."""
    if "transformers.generation.utils" in sys.modules or find_spec("torch") is None:
        return
    with _collector_at_rest():
        from transformers import utils

        available = utils.is_sklearn_available
        utils.is_sklearn_available = lambda: False
        try:
            for name in _ASK_FOR_SCIKIT_LEARN:
                import_module(name)
        finally:
            utils.is_sklearn_available = available
        import_module("transformers.generation.utils")


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
