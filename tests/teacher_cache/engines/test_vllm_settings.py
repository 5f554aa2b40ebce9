"""What vLLM is started with, and what is refused before it starts; no vLLM needed."""

from __future__ import annotations

import json

import pytest

from shared.errors import EngineError
from shared.process import machine
from shared.process.machine import available_bytes
from shared.recipe.recipe import Generate
from shared.recipe.sections.capture import TopCapture, TopSampleCapture
from shared.recipe.sections.teacher import VllmTeacher
from teacher_cache.engines import refusal
from teacher_cache.engines.vllm import entry, vllm_settings
from teacher_cache.engines.vllm.vllm_arrays import PromptArrays, columns_of
from teacher_cache.engines.vllm.vllm_settings import cache_bytes, logprob_bytes, plan_settings

CONFIG = {
    "max_position_embeddings": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "dtype": "float32",
}


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def plan(model_dir, *, on_cpu=True, generate=None, capture=None, **teacher):
    return plan_settings(VllmTeacher(model="m", **teacher), capture, generate, model_dir, on_cpu=on_cpu)


def test_a_full_length_sequence_can_be_scored(model_dir):
    settings = plan(model_dir)
    assert settings.max_model_len == 512
    assert settings.arguments["max_model_len"] == 513


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotations_that_follow_a_rows_length_are_refused_where_vllm_would_rotate_all_rows_alike(model_dir, key):
    rope = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0],
        "long_factor": [4.0],
    }
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, key: rope}))
    for length in (None, 64, 200):
        with pytest.raises(EngineError, match=r"set teacher\.max_model_len to 63 or less"):
            plan(model_dir, max_model_len=length)
    assert plan(model_dir, max_model_len=63).arguments["max_model_len"] == 64
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, key: {"type": "dynamic", "factor": 2.0}}))
    with pytest.raises(EngineError, match=r"set teacher\.engine to transformers"):
        plan(model_dir, max_model_len=63)


def test_stretched_rotations_may_read_more_than_the_config_says(model_dir):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "rope_parameters": yarn}))
    assert plan(model_dir, max_model_len=2048).max_model_len == 2048


def test_prompts_stay_whole_on_a_cpu_while_answers_have_seeds(model_dir):
    assert plan(model_dir, generate=Generate()).arguments["enable_chunked_prefill"] is False
    assert plan(model_dir, generate=Generate()).honours_seeds
    assert plan(model_dir).arguments["enable_chunked_prefill"] is True
    assert plan(model_dir, on_cpu=False, generate=Generate()).arguments["enable_chunked_prefill"] is True
    assert plan(model_dir, on_cpu=False, generate=Generate()).honours_seeds


def test_seeds_are_left_out_where_prompts_cannot_stay_whole(model_dir):
    settings = plan(model_dir, generate=Generate(), max_num_batched_tokens=256)
    assert settings.arguments["enable_chunked_prefill"] is True
    assert not settings.honours_seeds


def test_auto_dtype_is_the_stored_one(model_dir):
    assert plan(model_dir, dtype="auto").arguments["dtype"] == "float32"


def test_float32_head_is_asked_for_only_where_it_differs(model_dir):
    assert plan(model_dir).arguments["hf_overrides"] == {"head_dtype": "float32"}
    assert "hf_overrides" not in plan(model_dir, head_dtype="auto").arguments
    assert "hf_overrides" not in plan(model_dir, dtype="float32").arguments
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"lm_head": True}}))
    settings = plan(model_dir)
    assert "hf_overrides" not in settings.arguments
    assert settings.head_dtype == "quantised"


def test_worker_plugin_is_loaded_for_every_engine_because_it_watches_the_parent(model_dir):
    for capture in (None, TopCapture()):
        assert plan(model_dir, capture=capture).arguments["worker_extension_cls"].endswith("vllm_worker.TailWorker")


def test_longer_than_the_model_knows_is_refused(model_dir):
    with pytest.raises(EngineError, match=r"max_model_len is 513 but .* knows 512"):
        plan(model_dir, max_model_len=513)


def test_missing_config_is_a_sentence(tmp_path):
    with pytest.raises(EngineError, match=r"config\.json: cannot be read"):
        plan(tmp_path)


def test_key_value_cache_holds_many_sequences_within_bounds():
    assert cache_bytes(CONFIG, 513, "bfloat16") == 2**28
    large = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    one = 2 * 28 * 8 * 128 * 2 * (513 + 256)
    assert one <= cache_bytes(large, 513, "bfloat16") <= 64 * one
    with pytest.raises(EngineError, match=r"lower teacher\.max_model_len"):
        cache_bytes(large, 2**30, "bfloat16")


def test_key_value_cache_keeps_to_the_limit_of_a_container(monkeypatch):
    """What the machine has free is not what a container may use; beyond its limit the kernel kills without a word."""
    large = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    assert cache_bytes(large, 513, "bfloat16") > 2**29 or available_bytes() < 2**31
    monkeypatch.setattr(machine, "memory_bytes", lambda: 2**31)
    assert cache_bytes(large, 513, "bfloat16") <= 2**29
    with pytest.raises(EngineError, match=r"2\.0 GiB of memory are free; lower teacher\.max_model_len"):
        cache_bytes(large, 10_000, "bfloat16")


def test_threads_are_halved_for_narrow_models_unless_the_environment_says(model_dir, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 256}))
    assert plan(model_dir).num_threads == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert plan(model_dir).num_threads is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 1024}))
    assert plan(model_dir).num_threads is None


@pytest.mark.parametrize(
    ("version", "capture", "words"),
    [
        ("0.32.0", TopCapture(temperatures=(1.0, 2.0)), None),
        ("0.31.2", None, "at least 0.32"),
        ("0.34.0", TopCapture(k=8), None),
        ("0.34.0", TopCapture(k=8, temperatures=(1.0, 2.0)), "expected below 0.34"),
        ("0.36.1+cpu", TopSampleCapture(mode="top+sample", k=8, draws=4), "expected below 0.34"),
        (None, TopCapture(), "not installed"),
    ],
)
def test_versions_that_cannot_capture_are_refused(monkeypatch, version, capture, words):
    monkeypatch.setattr(entry, "installed_vllm", lambda: version)
    found = refusal(VllmTeacher(model="m"), capture)
    assert found is None if words is None else words in found


class FlatLists:
    """Shaped as vLLM's FlatLogprobs: nothing for the first token, then equal rows."""

    def __init__(self, rows):
        self.start_indices = [0, *range(0, len(rows) * 3, 3)]
        self.token_ids = [token for row in rows for token in row]
        self.logprobs = [-float(token) for row in rows for token in row]

    def __len__(self):
        return len(self.start_indices)


def test_flat_lists_and_arrays_read_alike():
    ids, logprobs = columns_of(FlatLists([(1, 2, 3), (4, 5, 6)]), 3)
    assert ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    again = columns_of(PromptArrays(ids, logprobs), 3)
    assert again[0] is ids
    assert len(PromptArrays(ids, logprobs)) == 3


@pytest.mark.parametrize("found", [FlatLists([(1, 2, 3)]), [None, {1: 2}], None])
def test_other_shapes_are_refused(found):
    with pytest.raises(EngineError, match="vLLM returned"):
        columns_of(found, 4)


def test_memory_of_log_probabilities_is_that_of_the_rows_that_the_runner_scores_at_once():
    assert 1.3e9 < logprob_bytes(151_936, 8192) == logprob_bytes(151_936, 65_536) < 1.6e9
    assert logprob_bytes(1_000, 256) == 4 * 4 * 256 * 1_000


@pytest.mark.slow
def test_rows_at_once_are_those_of_the_installed_vllm():
    module = pytest.importorskip("vllm.v1.worker.gpu.sample.prompt_logprob")
    assert module.CHUNK_SIZE == vllm_settings.ROWS_AT_ONCE
