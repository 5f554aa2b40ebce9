"""`kill -9` of a build on a real vLLM, then the same command: every row once, values as if unbroken, nothing left
running.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from tests.system.program import ROOT, decant, write_lines
from tests.tiny_models import make_qwen3

pytestmark = pytest.mark.slow

RECIPE = """\
name: killed
output_dir: run
teacher: {model: teacher, dtype: float32, max_model_len: 128}
prompts: [{source: a, path: prompts.jsonl, format: messages}]
generate: {max_new_tokens: 24}
capture: {k: 16}
cache: run/cache
rows_per_part: 8
"""

TEACH = ("teach", "recipe.yaml", "--max-set-aside", "0.5")
"""A random model answers some prompts with nothing, which would be set aside above the usual threshold."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("unbroken")
    make_qwen3(place / "teacher", seed=0)
    write_lines(
        place / "prompts.jsonl",
        ({"messages": [{"role": "user", "content": f"How many are {i} and {i}?"}]} for i in range(64)),
    )
    (place / "recipe.yaml").write_text(RECIPE)
    decant(place, *TEACH)
    return place


def kill_when(place: Path, folder: str, count: int, *, seconds: float = 60, **engine: str) -> None:
    """Start a build and kill it as soon as `folder` of its cache holds `count` committed parts; check that no child
    survives.
    """
    command = [sys.executable, "-P", "-m", "tools.cli", *TEACH]
    mark = f"killed-build-{os.getpid()}-{time.monotonic_ns()}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DECANT_TEST_MARK": mark, **engine}
    process = subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    bound = time.monotonic() + 600
    while len(list((place / "run" / "cache").glob(f"{folder}/**/part-*.json"))) < count:
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < bound
        time.sleep(0.01)
    if engine.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "1":
        assert len(marked(mark)) > 1, "vLLM has no process of its own here, so nothing is shown"
    process.send_signal(signal.SIGKILL)
    process.wait()
    bound = time.monotonic() + seconds
    while marked(mark) and time.monotonic() < bound:
        time.sleep(0.2)
    assert marked(mark) == []


def marked(mark: str) -> list[int]:
    """Return the processes whose environment carries the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (OSError, ValueError):
            continue  # ended while we looked, or not ours
    return found


@pytest.mark.parametrize("folder, count", [("sequences", 2), ("targets", 1), ("targets", 5)])
def test_killed_build_on_vllm_continues_to_the_same_rows(unbroken, tmp_path, folder, count):
    link(unbroken, tmp_path)
    kill_when(tmp_path, folder, count)
    decant(tmp_path, *TEACH)
    check_rows(unbroken, tmp_path)


@pytest.mark.parametrize("folder, count", [("sequences", 1), ("targets", 1)])
def test_core_process_of_a_killed_build_ends_and_the_same_command_continues(unbroken, tmp_path, folder, count):
    """As on every GPU, vLLM's core is a process of its own; while it lives, it holds the memory that the next one
    needs.
    """
    link(unbroken, tmp_path)
    kill_when(tmp_path, folder, count, seconds=10, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    decant(tmp_path, *TEACH, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    check_rows(unbroken, tmp_path)


def link(unbroken: Path, place: Path) -> None:
    """Give a directory the inputs of the unbroken build."""
    for name in ("teacher", "prompts.jsonl", "recipe.yaml"):
        (place / name).symlink_to(unbroken / name)


def check_rows(unbroken: Path, place: Path) -> None:
    """Compare a build's rows with those of the unbroken one."""
    assert decant(place, "cache", "verify", "run/cache").stdout
    expected = {row.row_key: row for row in Cache.open(unbroken / "run" / "cache")}
    found = list(Cache.open(place / "run" / "cache", verify=True))
    assert len(found) == len({row.row_key for row in found}) == len(expected) > 50
    worst = 0.0
    for row in found:
        same = expected[row.row_key]
        assert row.token_ids.tolist() == same.token_ids.tolist()
        np.testing.assert_allclose(row.targets.label_logprobs, same.targets.label_logprobs, atol=2e-3)
        worst = max(worst, float(np.abs(np.exp(row.targets.tail_logmass) - np.exp(same.targets.tail_logmass)).max()))
    assert worst < 1e-3
