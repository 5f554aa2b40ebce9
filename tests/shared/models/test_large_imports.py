"""What takes seconds to import: without what nothing uses, and with the garbage collector as it was."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from shared.models.large_imports import _collector_at_rest
from tests.system.program import ROOT

PROGRAM = """
import gc, sys
from importlib.util import find_spec
from shared.models.large_imports import import_transformers
import_transformers()
from transformers import AutoModelForCausalLM, Trainer, utils
print(gc.isenabled(), "sklearn" in sys.modules, utils.is_sklearn_available() == (find_spec("sklearn") is not None))
"""


def test_models_and_trainer_come_without_scikit_learn_which_others_still_find() -> None:
    command = [sys.executable, "-P", "-c", PROGRAM]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False", "True"]
    assert "leaked" not in done.stderr


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_is_as_before_although_an_import_failed(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), _collector_at_rest():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
