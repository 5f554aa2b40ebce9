"""A cache built from a real vLLM server that is killed in mid-job, against the engine in process and the transformers
oracle.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.recipe.recipe import Recipe
from teacher_cache.build import teach
from tests.teacher_cache.real_server import RealServer
from tests.tiny_models import make_qwen3

ROWS = 240


def recipe(tmp_path: Path, model: Path, cache: str, engine: dict, **settings) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "output_dir": str(tmp_path / "run"),
            "teacher": {"model": str(model), "dtype": "float32", "max_model_len": 128, **engine},
            "capture": {"k": 16},
            "cache": str(tmp_path / cache),
            "rows_per_part": 8,
            **settings,
        }
    )


def kill_once(server: RealServer, cache: Path) -> None:
    """Kill the server while answers come in, and start it again."""
    while len(list((cache / "sequences").glob("part-*.json"))) < 3:
        time.sleep(0.01)
    server.kill()
    server.start()


@pytest.mark.slow
def test_cache_from_a_server_that_is_killed_is_that_of_the_engine_in_process(tmp_path):
    pytest.importorskip("vllm")
    model = make_qwen3(tmp_path / "model", end_scale=1.5)
    path = tmp_path / "math.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"How many apples, number {i}?"}) + "\n" for i in range(ROWS)))
    asks = {
        "prompts": [{"source": "math", "path": str(path), "format": "prompt_completion"}],
        "generate": {"max_new_tokens": 48},
    }
    server = RealServer(model, tmp_path / "server.log", "--max-logprobs", "16")
    server.start()
    killer = threading.Thread(target=kill_once, args=(server, tmp_path / "served"), daemon=True)
    killer.start()
    try:
        engine = {"engine": "server", "servers": [server.url], "server_requests": 8}
        summary = teach(recipe(tmp_path, model, "served", engine, **asks), max_set_aside=0.1)
    finally:
        killer.join(0.1)
        server.kill()
    assert not killer.is_alive()
    assert summary.generated.rows == summary.scored.rows == summary.rows > 0.9 * ROWS
    assert list(verify_cache(tmp_path / "served")) == []
    served = Cache.open(tmp_path / "served", verify=True)
    assert len({bytes(served[i].row_key) for i in range(len(served))}) == len(served) == summary.rows

    teach(recipe(tmp_path, model, "own", {"engine": "vllm"}, **asks), max_set_aside=0.1)
    own = Cache.open(tmp_path / "own")
    by_key = {own[i].row_key: own[i] for i in range(len(own))}
    assert set(by_key) == {served[i].row_key for i in range(len(served))}
    same = [i for i in range(len(served)) if np.array_equal(served[i].token_ids, by_key[served[i].row_key].token_ids)]
    assert len(same) > 0.97 * len(served)  # one rounding may turn a draw
    for i in same:
        compare(served[i].targets, by_key[served[i].row_key].targets)

    shutil.copytree(tmp_path / "served", tmp_path / "oracle", ignore=shutil.ignore_patterns("targets"))
    teach(recipe(tmp_path, model, "oracle", {"engine": "transformers"}))
    oracle = Cache.open(tmp_path / "oracle")
    for i in range(len(served)):
        compare(served[i].targets, oracle[i].targets)


def compare(found, expected) -> None:
    """Within half a quantisation step each, and rounding."""
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_allclose(found.label_logprobs, expected.label_logprobs, atol=0.07)
    np.testing.assert_allclose(np.exp(found.tail_logmass), np.exp(expected.tail_logmass), atol=1e-3)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=0.07)
    assert np.mean(found.ids == expected.ids) > 0.99  # neighbours that tie within rounding
