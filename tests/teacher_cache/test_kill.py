"""`kill -9` at every place where phase 1 writes, then the same command: the bytes of a build that was never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.atomic import TEMPORARY_MARK
from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from tests.failpoints import ATOMIC_STEPS, failpoint_names
from tests.tiny_models import make_qwen3

ROOT = Path(__file__).resolve().parents[2]
REPEATED = ("directory", "sequences", "sequences_record", "targets", "targets_record", "tokenizer")
"""What a build writes several times: killed at the second time as well."""

SECONDS = tuple(f"seconds.{when}_{step}" for step in ATOMIC_STEPS for when in ("before", "after"))
"""Written to the run's directory at the end of a build."""

ONCE = (*failpoint_names(), *SECONDS)
TWICE = tuple(f"{name}@2" for name in ONCE if name.split(".")[0] in REPEATED)
QUICK = ("plan.after_link", "sequences.before_rename@2", "sequences.after_rename@2", "targets_record.before_rename")


class Server:
    """A process that forks builds."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(ROOT)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("kill_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert self.process.stdout.readline() == "ready\n"

    def build(self, recipe: dict, failpoint: str | None = None, fake: bool = False) -> int:
        (code,) = self.build_all([{"recipe": recipe, "failpoint": failpoint, "fake": fake}])
        return code

    def build_all(self, requests: list[dict]) -> list[int]:
        """Run builds at the same time and return their exit codes."""
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(30)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    """A recipe without its cache: 10 rows in 3 parts, one of them set aside."""
    directory = tmp_path_factory.mktemp("kill")
    rows = [{"prompt": f"How many apples has Anna, number {i}?"} for i in range(10)]
    rows[4] = {"prompt": "apples " * 100}
    (directory / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "kill",
        "output_dir": str(directory / "run"),
        "teacher": {
            "model": str(make_qwen3(directory / "teacher")),
            "engine": "transformers",
            "dtype": "float32",
            "max_model_len": 64,
        },
        "prompts": [{"source": "math", "path": str(directory / "math.jsonl"), "format": "prompt_completion"}],
        "generate": {"max_new_tokens": 8},
        "capture": {"mode": "top+sample", "k": 4, "draws": 2, "temperatures": [1.0, 2.0]},
        "rows_per_part": 4,
        "seed": 1,
    }


def tree(directory: Path) -> dict[str, bytes]:
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and TEMPORARY_MARK not in path.name)
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def killed_then_continued(
    server: Server, recipe: dict, failpoint: str, cache: Path, fake: bool
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return the files that a killed build left, and those of the same build continued."""
    recipe = {**recipe, "cache": str(cache)}
    assert server.build(recipe, failpoint, fake) == -signal.SIGKILL, f"{failpoint} is never met"
    half = tree(cache)
    assert server.build(recipe, None, fake) == 1  # done, with one row of ten set aside
    return half, tree(cache)


def unbroken(server: Server, recipe: dict, directory: Path, fake: bool) -> dict[str, bytes]:
    assert server.build({**recipe, "cache": str(directory / "whole")}, None, fake) == 1
    assert list(verify_cache(directory / "whole")) == []
    assert len(Cache.open(directory / "whole")) == 9
    return tree(directory / "whole")


@pytest.fixture(scope="module")
def fake_recipe(recipe) -> dict:
    return {**recipe, "capture": {"k": 4}}


@pytest.fixture(scope="module")
def whole_fake(server, fake_recipe, tmp_path_factory):
    return unbroken(server, fake_recipe, tmp_path_factory.mktemp("fake"), fake=True)


@pytest.fixture(scope="module")
def whole_real(server, recipe, tmp_path_factory):
    return unbroken(server, recipe, tmp_path_factory.mktemp("real"), fake=False)


@pytest.mark.parametrize("failpoint", QUICK)
def test_a_build_killed_while_writing_continues_to_the_same_bytes(server, fake_recipe, whole_fake, tmp_path, failpoint):
    half, continued = killed_then_continued(server, fake_recipe, failpoint, tmp_path / "cache", fake=True)
    assert continued == whole_fake
    assert half.items() <= continued.items()


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", [*ONCE, *TWICE])
def test_a_build_killed_at_any_write_continues_to_the_same_bytes(server, recipe, whole_real, tmp_path, failpoint):
    half, continued = killed_then_continued(server, recipe, failpoint, tmp_path / "cache", fake=False)
    assert continued == whole_real
    assert half.items() <= continued.items()
