"""Two engines under Ray, run as a user does: the cache of one engine, whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from tests.system.program import ROOT, decant, write_lines
from tests.tiny_models import make_qwen3

pytestmark = pytest.mark.slow

RECIPE = """\
name: many
output_dir: run
teacher: {model: teacher, engine: transformers, dtype: float32, max_model_len: 64, batch_tokens: 128%s}
prompts: [{source: a, path: prompts.jsonl, format: prompt_completion}]
generate: {max_new_tokens: 8}
capture: {mode: top+sample, k: 4, draws: 2, temperatures: [1.0, 2.0]}
cache: run/cache
rows_per_part: 2
"""
WORKERS = ", workers: {count: 2, gpus_per_engine: 0}"
TEACH = ("teach", "recipe.yaml", "--max-set-aside", "0.5")
UNITS = 160
"""Two engines do a hundred a second: enough that some are left once an engine has been found and killed."""


@pytest.fixture(scope="module")
def one_engine(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("one")
    make_qwen3(place / "teacher")
    write_lines(
        place / "prompts.jsonl", ({"prompt": f"How many apples has Anna, number {i}?"} for i in range(2 * UNITS))
    )
    (place / "recipe.yaml").write_text(RECIPE % "")
    decant(place, *TEACH)
    return place


@pytest.fixture
def place(one_engine, tmp_path) -> Path:
    for name in ("teacher", "prompts.jsonl"):
        (tmp_path / name).symlink_to(one_engine / name)
    (tmp_path / "recipe.yaml").write_text(RECIPE % WORKERS)
    return tmp_path


def parts(place: Path, folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (place / "run" / "cache" / folder).rglob("part-*")}


def assert_same_cache(place: Path, one_engine: Path) -> None:
    """The engine computes unit by unit and is deterministic, so equal rows and values are equal bytes."""
    assert parts(place, "sequences") == parts(one_engine, "sequences")
    assert parts(place, "targets") == parts(one_engine, "targets")
    assert list(verify_cache(place / "run" / "cache")) == []
    keys = [row.row_key for row in Cache.open(place / "run" / "cache")]
    assert len(keys) == len(set(keys)) > UNITS


def committed(place: Path) -> int:
    return len(list((place / "run" / "cache" / "sequences").glob("part-*.json")))


def begin(place: Path, num_parts: int, mark: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a build and wait until some parts are committed."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tools.cli", *TEACH],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DECANT_TEST_MARK": mark, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    bound = time.monotonic() + 300
    while committed(place) < num_parts:
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < bound
        time.sleep(0.01)
    return process


def engine_processes(mark: str) -> list[int]:
    """Return the engines of the build whose environment carries the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                b"ray::EngineWorker" in (path / "cmdline").read_bytes()
                and mark.encode() in (path / "environ").read_bytes()
            ):
                found.append(int(path.name))
        except OSError:
            continue  # ended while we looked, or not ours
    return found


def wait_until_gone(mark: str) -> None:
    bound = time.monotonic() + 60
    while engine_processes(mark) and time.monotonic() < bound:
        time.sleep(0.2)
    assert engine_processes(mark) == []


def test_a_job_terminated_killed_and_robbed_of_an_engine_ends_with_the_cache_of_one_engine(one_engine, place):
    process = begin(place, 1, mark := f"ray-{os.getpid()}-term")
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 1 and "stopped by SIGTERM" in text and "Traceback" not in text, text
    wait_until_gone(mark)

    process = begin(place, committed(place) + 2, mark := f"ray-{os.getpid()}-job")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until_gone(mark)
    assert committed(place) < UNITS, "the job was done before it was killed"

    process = begin(place, committed(place) + 1, mark := f"ray-{os.getpid()}-engine")
    os.kill(engine_processes(mark)[0], signal.SIGKILL)
    text = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0 and "2 engines, restarts: 1" in text, text
    wait_until_gone(mark)
    assert_same_cache(place, one_engine)


def test_a_unit_that_kills_two_engines_is_set_aside_with_its_cause_and_done_later(one_engine, place):
    killer = parts_of_unit(one_engine, 5)
    done = decant(place, *TEACH, code=1, DECANT_FAILPOINT="engine.unit_5")
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("decant: error: "))
    assert (
        f"1 units were set aside, since each killed two engines, the first: {killer} (generate): the engine's "
        "process died" in line
    )
    assert f"set aside: {killer} (generate)" in done.stdout and "restarts: 2" in done.stdout
    expected = {name: data for name, data in parts(one_engine, "targets").items() if not name.startswith(killer)}
    assert parts(place, "targets") == expected
    (place / "recipe.yaml").write_text(RECIPE % "")
    decant(place, *TEACH)
    assert_same_cache(place, one_engine)


def parts_of_unit(place: Path, unit: int) -> str:
    (stem,) = {
        name.partition(".")[0] for name in parts(place, "sequences") if name.partition(".")[0].endswith(f"-{unit:06d}")
    }
    return stem
