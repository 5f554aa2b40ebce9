"""Killed at any fail-point and continued, a build ends in exactly the bytes of an unbroken one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.failpoints import failpoint_names
from tests.shared.kill_everywhere import places

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    in_memory = Path("/dev/shm")  # an fsync costs nothing there, and the test is about order, not about the disk
    root = Path(tempfile.mkdtemp(dir=in_memory)) if os.access(in_memory, os.W_OK) else tmp_path_factory.mktemp("kill")
    child = subprocess.run(
        [sys.executable, "-m", "tests.shared.kill_everywhere", str(root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    shutil.rmtree(root)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    return {line["place"]: line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("name", failpoint_names())
def test_build_continues_after_kill_as_if_unbroken(results: dict[str, dict[str, Any]], name: str) -> None:
    for place in places(name):
        result = results[place]
        assert result["signal"] == signal.SIGKILL, "the fail-point was never met"
        assert result["again"] == 0
        assert result["problems"] == []
        assert result["differing"] == []
        assert result["removed"] <= 1
