"""vLLM against the model's own eager forward in float32, over families with windows, soft caps and experts; or refused.

Rows go beyond the sliding window. The figure is KL(own || vLLM) over the head and the bucket of the rest, per position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import EngineError
from shared.recipe.sections.capture import TopCapture
from shared.recipe.sections.teacher import VllmTeacher
from teacher_cache.engines import ScoreRequest, open_engine
from tests.tiny_models import VOCAB_SIZE, make_tokenizer

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [4.0] * 16,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
HONOURED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral-window": ("mistral", {"sliding_window": 32}),
    "gemma2-softcap": ("gemma2", {"sliding_window": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0}),
    "gemma2-final-softcap": ("gemma2", {"query_pre_attn_scalar": 32, "final_logit_softcapping": 4.0}),
    "olmo3-by-transformers": ("olmo3", {"sliding_window": 32}),
    "qwen3-moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
}


def make(directory: Path, model_type: str, settings: dict[str, Any]) -> Any:
    """Save a random model of a family and return it with eager attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(directory)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings, **ids})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32).eval()
    model.save_pretrained(directory)
    return model


def requests() -> list[ScoreRequest]:
    rng = np.random.default_rng(0)
    lengths = (5, 33, 64, 65, 120, 200)
    rows = [rng.integers(3, VOCAB_SIZE, length).astype(np.int32) for length in lengths]
    return [ScoreRequest(i, 0, row, np.array([[1, len(row)]], np.int32)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("name", HONOURED)
def test_vllm_scores_as_the_models_own_forward(name: str, tmp_path: Path) -> None:
    own = make(tmp_path / "m", *HONOURED[name])
    teacher, capture = VllmTeacher(model="m", dtype="float32", max_model_len=256), TopCapture(k=64)
    engine = open_engine(teacher, capture, for_generation=None, model_dir=tmp_path / "m")
    try:
        found = {scored.tag: scored.targets for scored in engine.score(iter(requests()))}
    finally:
        engine.close()
    divergences = []
    for request in requests():
        with torch.no_grad():
            logits = own(input_ids=torch.from_numpy(request.token_ids.astype(np.int64))[None], use_cache=False).logits
        logprobs = logits[0, :-1].double().log_softmax(-1).numpy()
        targets = found[request.tag]
        ids = targets.ids.reshape(len(logprobs), -1)
        head = np.take_along_axis(logprobs, ids, 1)
        tail = np.log1p(-np.minimum(np.exp(head).sum(1), 1 - 1e-15))
        said = targets.logprobs.reshape(ids.shape).astype(np.float64)
        kl = (np.exp(head) * (head - said)).sum(1) + np.exp(tail) * (tail - targets.tail_logmass[:, 0])
        divergences.append(kl)
    assert np.concatenate(divergences).max() < 1e-5


def test_class_that_vllm_runs_by_transformers_own_code_makes_models_afterwards(tmp_path: Path) -> None:
    """The hidden pass of a build comes after the scores, in the same process."""
    own = make(tmp_path / "m", "olmo3", {"sliding_window": 32})
    row = torch.from_numpy(requests()[4].token_ids.astype(np.int64))[None]
    with torch.no_grad():
        before = own(input_ids=row, use_cache=False).logits
    teacher = VllmTeacher(model="m", dtype="float32", max_model_len=256)
    open_engine(teacher, TopCapture(k=8), for_generation=None, model_dir=tmp_path / "m").close()
    again = type(own).from_pretrained(tmp_path / "m", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=row, use_cache=False).logits, before)


@pytest.mark.parametrize("name", REFUSED)
def test_a_rotation_of_the_longest_row_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make(tmp_path / "m", *REFUSED[name])
    with pytest.raises(EngineError, match="rope"):
        open_engine(
            VllmTeacher(model="m", dtype="float32", max_model_len=256),
            TopCapture(k=8),
            for_generation=None,
            model_dir=tmp_path / "m",
        )


def test_a_model_whose_prompts_vllm_reads_in_both_directions_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "m", "hrm_text", {"num_key_value_heads": 2})
    teacher = VllmTeacher(model="m", dtype="float32", max_model_len=256)
    with pytest.raises(EngineError, match=r"see what comes after them in this model.*teacher\.engine to transformers"):
        open_engine(teacher, TopCapture(k=8), for_generation=None, model_dir=tmp_path / "m")
