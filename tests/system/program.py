"""Run the program as a user does: its own process, a directory of its own, nothing but a recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def decant(
    directory: Path, *words: str, code: int = 0, seconds: int = 900, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `decant WORDS` in `directory`, check its exit code and that no traceback was printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tools.cli", *words],
        cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
        timeout=seconds,
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def refusal(directory: Path, *words: str, code: int = 1) -> str:
    """Return the sentence with which the program refuses; there is exactly one line."""
    lines = [
        line for line in decant(directory, *words, code=code).stderr.splitlines() if line.startswith("decant: error: ")
    ]
    assert len(lines) == 1, lines
    return lines[0]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
