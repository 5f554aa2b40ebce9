"""The V2 runner, which every GPU build uses, against the oracle in float64; its kernels are interpreted on the CPU.

Prompts are cut over passes, rows of several prompts share a pass, and a batch has more than 1,024 rows, which the
runner scores in pieces.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.recipe.sections.capture import TopSampleCapture
from shared.recipe.sections.teacher import TransformersTeacher
from tests.system.program import ROOT
from tests.teacher_cache.engines.test_vllm_engine import oracle, sequences
from tests.tiny_models import VOCAB_SIZE, make_qwen3

pytest.importorskip("vllm")
pytest.importorskip("triton")
pytestmark = pytest.mark.slow

HYBRID = {"mode": "top+sample", "k": 8, "draws": 4, "temperatures": [1.0, 2.0, 4.0]}


def interpreted(place: Path, model_dir: Path, requests, **teacher) -> dict:
    """Score requests with the V2 runner in a process of its own."""
    rows = [{"ids": r.token_ids.tolist(), "spans": r.spans.tolist(), "salt": r.draw_salt} for r in requests]
    job = {"model": str(model_dir), "capture": HYBRID, "rows": rows, "teacher": {"model": str(model_dir), **teacher}}
    (place / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_v2.py")), "job.json", "out.pickle"],
        cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = pickle.loads((place / "out.pickle").read_bytes())
    assert (found["status"]["runner"], found["status"]["installed"]) == ("v2", "yes")
    assert found["provenance"]["capture_path"] == "plugin+arrays"
    assert found["targets"].keys() == set(range(len(requests)))
    return {request.tag: found["targets"][i] for i, request in enumerate(requests)}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("teacher"), vocab_size=VOCAB_SIZE + 32, max_position_embeddings=512)


def same_draws(left, right) -> float:
    """Return the share of positions whose draws are the same tokens as often."""
    same, total = 0, 0
    for a, b in zip(left.draws, right.draws, strict=True):
        for p, q in zip(by_position(a), by_position(b), strict=True):
            same, total = same + (p == q), total + 1
    return same / total


def by_position(draws) -> list[list[tuple[int, int]]]:
    ends = np.cumsum(draws.counts)
    pairs = list(zip(draws.ids.tolist(), draws.multiplicities.tolist(), strict=True))
    return [pairs[end - count : end] for end, count in zip(ends, draws.counts, strict=True)]


@pytest.mark.parametrize(
    ("budget", "rows", "tokens"), [(256, 7, 512), (4096, 14, 1100)], ids=["chunked", "more than 1,024 rows at once"]
)
def test_float32_rows_tails_and_draws_are_those_of_the_oracle(model_dir, tmp_path, budget, rows, tokens):
    from teacher_cache.engines.transformers.transformers_model import CausalModel

    requests = sequences(rows)
    assert sum(len(request.token_ids) for request in requests) > tokens
    found = interpreted(tmp_path, model_dir, requests, dtype="float32", max_num_batched_tokens=budget)
    exact = CausalModel.load(TransformersTeacher(model="m", engine="transformers"), model_dir, dtype="float64")
    expected = oracle(exact, TopSampleCapture.model_validate(HYBRID), requests)
    for tag, targets in found.items():
        wanted = expected[tag]
        np.testing.assert_array_equal(targets.counts, wanted.counts)
        np.testing.assert_allclose(targets.logprobs, wanted.logprobs, atol=1e-4)
        np.testing.assert_allclose(targets.label_logprobs, wanted.label_logprobs, atol=1e-4)
        np.testing.assert_allclose(targets.tail_logmass, wanted.tail_logmass, atol=1e-4)
        assert (targets.ids == wanted.ids).mean() > 0.999
    assert np.mean([same_draws(found[tag], expected[tag]) for tag in found]) > 0.99


def test_16_bit_weights_with_a_float32_head_do_not_tie(model_dir, tmp_path):
    from teacher_cache.engines.transformers.transformers_model import CausalModel

    requests = sequences(6, seed=1)
    found = interpreted(tmp_path, model_dir, requests, dtype="bfloat16", max_num_batched_tokens=256)
    exact = CausalModel.load(TransformersTeacher(model="m", engine="transformers"), model_dir, dtype="float64")
    expected = oracle(exact, TopSampleCapture.model_validate(HYBRID), requests)
    ties, off = [], []
    for tag, targets in found.items():
        head = targets.logprobs.reshape(-1, HYBRID["k"])
        ties.append((head[:, 1:] == head[:, :-1]).mean())
        off.append(np.abs(targets.label_logprobs - expected[tag].label_logprobs).mean())
        masses = np.exp(head, dtype=np.float64).sum(1) + np.exp(targets.tail_logmass[:, 0], dtype=np.float64)
        np.testing.assert_allclose(masses, 1.0, atol=1e-4)
    assert np.mean(ties) < 0.01
    assert np.mean(off) < 0.05
    assert torch.isfinite(torch.tensor(off)).all()
