"""A cache built by the transformers engine, against the same model run by hand on hand-written renderings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.recipe.recipe import Recipe
from teacher_cache.build import teach
from tests.tiny_models import make_qwen3

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("models") / "teacher", vocab_size=576)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory) -> Path:
    """A model without padding in its head: a random one would draw padding as well."""
    return make_qwen3(tmp_path_factory.mktemp("models") / "plain", end_scale=1.5)


def recipe(tmp_path: Path, model: Path, prompts: list[dict], engine: str = "transformers", **settings) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "output_dir": str(tmp_path / "run"),
            "teacher": {"model": str(model), "engine": engine, "dtype": "float32", "max_model_len": 128},
            "prompts": prompts,
            "capture": {"k": 8, "temperatures": [2.0]},
            "cache": str(tmp_path / "cache"),
            "rows_per_part": 4,
            **settings,
        }
    )


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dense_logprobs(model_dir: Path, token_ids: np.ndarray) -> np.ndarray:
    """[T, V] float64 log-probabilities of the next token under the whole head, its padding included."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(token_ids.astype(np.int64))[None]).logits[0].double()
    return logits.log_softmax(-1).numpy()


def check_targets(row, model: Path) -> None:
    """Compare a row's targets with the distribution that predicts each supervised token."""
    dense = dense_logprobs(model, row.token_ids)
    positions = np.concatenate([np.arange(start, end) for start, end in row.spans])
    targets, offsets = row.targets, row.targets.offsets()
    np.testing.assert_allclose(targets.label_logprobs, dense[positions - 1, row.token_ids[positions]], atol=0.04)
    for s, position in enumerate(positions):
        head = slice(offsets[s], offsets[s + 1])
        expected = np.sort(dense[position - 1, :512])[::-1][:8]
        np.testing.assert_allclose(targets.logprobs[head], expected, atol=0.04)
        np.testing.assert_allclose(dense[position - 1, targets.ids[head]], expected, atol=1e-4)
        tempered = dense[position - 1] / 2.0 - np.logaddexp.reduce(dense[position - 1] / 2.0)
        outside = np.delete(tempered, targets.ids[head])
        assert targets.temperatures == (1.0, 2.0)
        assert targets.tail_logmass[s, 1] == pytest.approx(np.logaddexp.reduce(outside), abs=2e-3)


def test_given_conversations_are_scored_at_the_positions_that_predict_their_answers(tmp_path, model):
    turns = [("user", "Two?"), ("assistant", "It is two."), ("user", "Three?"), ("assistant", "Three apples.")]
    talk = [{"role": role, "content": content} for role, content in turns]
    prompts = [
        {"source": "talk", "path": write(tmp_path / "talk.jsonl", [{"messages": talk}]), "format": "messages"},
        {
            "source": "story",
            "path": write(tmp_path / "story.jsonl", [{"text": "The train leaves at seven."}]),
            "format": "text",
        },
    ]
    summary = teach(recipe(tmp_path, model, prompts))
    assert (summary.imported.rows, summary.scored.rows) == (2, 2)
    cache = Cache.open(tmp_path / "cache", verify=True)
    rows = {cache[i].source: cache[i] for i in range(2)}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache.path / "tokenizer")
    texts = [tokenizer.decode(rows["talk"].token_ids[start:end].tolist()) for start, end in rows["talk"].spans]
    assert texts == ["It is two.<|im_end|>", "Three apples.<|im_end|>"]
    assert rows["story"].spans.tolist() == [[1, len(rows["story"].token_ids)]]
    for row in rows.values():
        check_targets(row, model)


@pytest.mark.slow
def test_generated_answers_are_scored_as_the_model_would_predict_them(tmp_path, plain_model):
    model = plain_model
    path = write(tmp_path / "math.jsonl", [{"prompt": f"How many apples, number {i}?", "answer": i} for i in range(9)])
    prompts = [{"source": "math", "path": path, "format": "prompt_completion"}]
    settings = {"generate": {"max_new_tokens": 12, "samples_per_prompt": 2}}
    summary = teach(recipe(tmp_path, model, prompts, **settings), max_set_aside=0.5)
    cache = Cache.open(tmp_path / "cache", verify=True)
    assert len(cache) == summary.generated.rows > 14
    assert list(verify_cache(tmp_path / "cache")) == []
    for i in range(0, len(cache), 4):
        check_targets(cache[i], model)
    again = teach(recipe(tmp_path / "other", model, prompts, **settings), max_set_aside=0.5)
    assert again.rows == summary.rows
    other = Cache.open(tmp_path / "other/cache")
    assert [other[i].key for i in range(len(other))] == [cache[i].key for i in range(len(cache))]


SCRIPT = """
import json, sys
from pathlib import Path

if __name__ == "__main__":
    from shared.errors import DecantError
    from shared.recipe.recipe import Recipe
    from teacher_cache.build import teach

    try:
        summary = teach(Recipe.model_validate(json.loads(Path(sys.argv[1]).read_text())), max_set_aside=0.5)
    except DecantError as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(error.exit_code)
    print(json.dumps({"lines": summary.lines(), "vllm": "vllm" in sys.modules, "rows": summary.rows}))
"""


@pytest.mark.slow
def test_vllm_builds_stops_on_sigterm_continues_and_then_has_nothing_to_do(tmp_path, plain_model):
    model = plain_model
    pytest.importorskip("vllm")
    path = write(tmp_path / "math.jsonl", [{"prompt": f"How many apples, number {i}?"} for i in range(600)])
    prompts = [{"source": "math", "path": path, "format": "prompt_completion"}]
    build = recipe(tmp_path, model, prompts, engine="vllm", generate={"max_new_tokens": 64}, rows_per_part=16)
    (tmp_path / "build.py").write_text(SCRIPT)
    (tmp_path / "recipe.json").write_text(build.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "build.py"), str(tmp_path / "recipe.json")]

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)

    def result(process: subprocess.Popen) -> dict:
        return json.loads(process.communicate(timeout=600)[0].splitlines()[-1])

    first = start()
    while first.poll() is None and len(list((tmp_path / "cache/sequences").glob("*.json"))) < 3:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in result(first)["error"]
    assert first.returncode == 1
    committed = len(list((tmp_path / "cache/sequences").glob("*.json")))
    assert 3 <= committed < 38
    second = result(start())
    assert second["vllm"]
    assert second["rows"] > 570
    third = result(start())
    assert not third["vllm"]
    assert third["lines"][0].endswith("generated 0, scored 0")
    cache = Cache.open(tmp_path / "cache", verify=True)
    for i in range(0, len(cache), 100):
        check_targets(cache[i], model)
