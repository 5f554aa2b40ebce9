"""Several processes build one cache at a time: shares of one plan, late and killed ones too, and builds of different
prompts.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from tests.teacher_cache.test_kill import Server, tree
from tests.tiny_models import make_qwen3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(30)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict:
    model = make_qwen3(tmp_path_factory.mktemp("models") / "teacher")
    return {"model": str(model), "engine": "transformers", "dtype": "float32", "max_model_len": 64}


def recipe(tmp_path: Path, teacher: dict, cache: str, numbers: range, **settings) -> dict:
    prompts = tmp_path / f"{numbers.start}-{numbers.stop}.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"How many apples has Anna, number {i}?"}) + "\n" for i in numbers)
    )
    return {
        "name": "many",
        "output_dir": str(tmp_path / "run" / cache / f"{numbers.start}"),
        "teacher": teacher,
        "prompts": [{"source": "math", "path": str(prompts), "format": "prompt_completion"}],
        "generate": {"max_new_tokens": 8},
        "capture": {"mode": "top+sample", "k": 4, "draws": 2, "temperatures": [1.0, 2.0]},
        "cache": str(tmp_path / cache),
        "rows_per_part": 2,
        **settings,
    }


def keys_of(cache: Path) -> list[str]:
    assert list(verify_cache(cache)) == []
    opened = Cache.open(cache, verify=True)
    keys = [opened[i].row_key.hex() for i in range(len(opened))]
    assert len(keys) == len(set(keys))
    return sorted(keys)


def test_thirds_killed_three_times_and_one_of_them_late_make_the_cache_of_one_engine(server, tmp_path, teacher):
    assert server.build(recipe(tmp_path, teacher, "whole", range(24))) == 0
    shared = recipe(tmp_path, teacher, "thirds", range(24))

    def share(index: int, failpoint: str | None = None) -> dict:
        return {"recipe": shared, "failpoint": failpoint, "fake": False, "partition": [index, 3]}

    killed = -signal.SIGKILL
    assert server.build_all([share(0, "sequences_record.after_rename@2"), share(1, "targets.before_rename@2")]) == [
        killed,
        killed,
    ]
    assert server.build_all([share(0), share(1)]) == [0, 0]
    first_two = tree(tmp_path / "thirds")
    assert server.build_all([share(2, "sequences.before_fsync@3")]) == [killed]
    assert server.build_all([share(2)]) == [0]
    assert keys_of(tmp_path / "thirds") == keys_of(tmp_path / "whole")
    thirds = tree(tmp_path / "thirds")
    assert thirds == tree(tmp_path / "whole")
    assert {name: thirds[name] for name in first_two} == first_two


def test_builds_of_different_prompts_into_one_cache_at_the_same_time_do_not_collide(server, tmp_path, teacher):
    """Two jobs that share a third of their rows, and a third job with another capture over rows of the first."""
    others = {"capture": {"k": 8}}
    builds = [(range(16), {}), (range(8, 24), {}), (range(16), others)]
    requests = [
        {"recipe": recipe(tmp_path, teacher, "together", numbers, **settings), "failpoint": None, "fake": False}
        for numbers, settings in builds
    ]
    assert server.build_all(requests) == [0, 0, 0]
    for numbers, settings in builds:
        assert server.build(recipe(tmp_path, teacher, "alone", numbers, **settings)) == 0
    for numbers, settings in builds:  # what one build committed while the other was at work is scored by the next
        assert server.build(recipe(tmp_path, teacher, "together", numbers, **settings)) == 0
    for layer in ("top4-sample2", "top8"):
        rows = {}
        for name in ("together", "alone"):
            opened = Cache.open(tmp_path / name, targets=layer, verify=True)
            rows[name] = {opened[i].row_key: opened[i].token_ids.tolist() for i in range(len(opened))}
            assert len(rows[name]) == len(opened) == 24
        assert rows["together"] == rows["alone"]
    assert list(verify_cache(tmp_path / "together")) == []
