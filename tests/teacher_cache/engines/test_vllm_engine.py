"""A real vLLM on the CPU against the reference engine in float64, on a tiny random model.

Engines of this module run inside the test process, one at a time; each start takes a few seconds.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from shared.errors import EngineError
from shared.keys import row_salt
from shared.recipe.recipe import Capture, Generate
from shared.recipe.sections.capture import SampleCapture, TopCapture, TopSampleCapture
from shared.recipe.sections.teacher import TransformersTeacher, VllmTeacher
from teacher_cache.engines import GenerateRequest, ScoreRequest, open_engine
from teacher_cache.engines.transformers.transformers_engine import TransformersEngine
from teacher_cache.engines.transformers.transformers_model import CausalModel
from teacher_cache.engines.vllm import vllm_arrays, vllm_tail
from tests.tiny_models import VOCAB_SIZE, make_qwen3

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PADDED = VOCAB_SIZE + 32
LONGEST = 512
HYBRID = TopSampleCapture(mode="top+sample", k=8, draws=4, temperatures=(1.0, 2.0, 4.0))
ANSWER = Generate(max_new_tokens=24)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("teacher"), vocab_size=PADDED, max_position_embeddings=LONGEST)


@pytest.fixture(scope="module")
def exact(model_dir):
    return CausalModel.load(TransformersTeacher(model="m", engine="transformers"), model_dir, dtype="float64")


@contextmanager
def opened(model_dir, capture, generate=None, **teacher):
    engine = open_engine(VllmTeacher(model="m", **teacher), capture, for_generation=generate, model_dir=model_dir)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def float32(model_dir):
    with opened(model_dir, HYBRID, ANSWER, dtype="float32") as engine:
        yield engine


def sequences(count: int, seed: int = 0) -> list[ScoreRequest]:
    """Random tokens of many lengths, the longest that fits among them, some with two spans; every other one with a
    salt.
    """
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        length = LONGEST if i == 0 else int(rng.integers(2, 200))
        ids = rng.integers(0, VOCAB_SIZE, length).astype(np.int32)
        spans = [[1, length]] if length < 8 else [[2, length // 2], [length // 2 + 2, length]]
        salt = row_salt(bytes([i]) * 16) if i % 2 else 0
        found.append(ScoreRequest(("row", i), i // 8, ids, np.array(spans, np.int32), salt))
    return found


def scored(engine, requests) -> dict:
    found = {result.tag: result.targets for result in engine.score(iter(requests))}
    assert set(found) == {request.tag for request in requests}
    return found


def oracle(exact, capture, requests) -> dict:
    return scored(TransformersEngine(exact, capture, softmax_dtype=torch.float64), requests)


def prompts(count: int, seed: int = 2) -> list[GenerateRequest]:
    rng = np.random.default_rng(seed)
    return [
        GenerateRequest(i, i // 16, rng.integers(3, VOCAB_SIZE, int(rng.integers(2, 40))).tolist(), 2**62 + 17 * i)
        for i in range(count)
    ]


def answers(engine, requests, settings=ANSWER) -> dict:
    return {answer.tag: answer for answer in engine.generate(iter(requests), settings)}


def full_kl(expected, found) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return KL in nats, whether the top tokens agree, and the oracle's margin, per position, of whole-vocabulary
    heads.
    """
    rows = expected.num_positions
    p, q = (np.full((rows, VOCAB_SIZE), -np.inf) for _ in range(2))
    for dense, targets in ((p, expected), (q, found)):
        assert (targets.counts == VOCAB_SIZE).all()
        dense[np.repeat(np.arange(rows), VOCAB_SIZE), targets.ids] = targets.logprobs
    top = np.sort(p, 1)
    return (np.exp(p) * (p - q)).sum(1), p.argmax(1) == q.argmax(1), top[:, -1] - top[:, -2]


def compared(expected: dict, found: dict) -> list[np.ndarray]:
    return [
        np.concatenate(parts) for parts in zip(*(full_kl(expected[tag], found[tag]) for tag in expected), strict=True)
    ]


def test_float32_with_chunked_prompts_equals_the_oracle(model_dir, exact):
    """256 tokens per pass, so that the longest prompts are cut over several."""
    everything = TopCapture(k=VOCAB_SIZE)
    with opened(model_dir, everything, dtype="float32", max_num_batched_tokens=256) as engine:
        assert engine.provenance()["capture_path"] == "plugin+arrays"
        assert engine.provenance()["chunked_prefill"] is True
        kl, same_top, _ = compared(oracle(exact, everything, sequences(24)), scored(engine, sequences(24)))
    assert len(kl) > 1500
    assert kl.max() < 1e-5
    assert same_top.mean() >= 0.999


def test_bfloat16_stays_close_to_the_oracle(model_dir, exact):
    everything = TopCapture(k=VOCAB_SIZE)
    with opened(model_dir, everything, dtype="bfloat16") as engine:
        assert engine.provenance()["head_dtype"] == "float32"
        kl, same_top, margin = compared(oracle(exact, everything, sequences(24)), scored(engine, sequences(24)))
    assert same_top[margin > 0.1].mean() >= 0.99
    assert kl.mean() < 1e-3


def test_draws_without_a_head_are_unbiased(model_dir, exact):
    """Mode sample, 8 draws from the whole distribution at each temperature, with the same confidence."""
    # stands before the first test that shares an engine: an engine that closes takes its process's groups with it
    capture = SampleCapture(mode="sample", draws=8, temperatures=(1.0, 2.0, 4.0))
    requests = sequences(30, seed=6)
    with opened(model_dir, capture, dtype="float32") as engine:
        found = scored(engine, requests)
    full = oracle(exact, TopCapture(k=VOCAB_SIZE), requests)
    assert all((targets.counts == 0).all() and (targets.tail_logmass == 0).all() for targets in found.values())
    for j in range(len(capture.temperatures)):
        z = pooled_z_scores(found, full, capture, j)
        assert np.abs(z).max() < bonferroni_limit(len(capture.temperatures) * VOCAB_SIZE)
        assert 0.3 < z.std() < 1.2


def test_heads_tails_and_draws_equal_the_oracle(float32, exact):
    assert float32.provenance()["capture_path"] == "plugin+arrays"
    found, expected = scored(float32, sequences(40)), oracle(exact, HYBRID, sequences(40))
    same_ids, same_draws = [], []
    for tag, targets in expected.items():
        other = found[tag]
        assert np.array_equal(targets.counts, other.counts)
        assert max(other.ids) < VOCAB_SIZE
        same_ids.append(targets.ids == other.ids)
        assert np.abs(targets.logprobs - other.logprobs).max() < 1e-3
        assert np.abs(targets.label_logprobs - other.label_logprobs).max() < 1e-3
        assert np.abs(targets.tail_logmass - other.tail_logmass).max() < 0.01
        for one, two in zip(targets.draws, other.draws, strict=True):
            assert (np.add.reduceat(two.multiplicities, np.cumsum(two.counts) - two.counts) == 4).all()
            drawn = [set(zip(np.repeat(np.arange(len(d.counts)), d.counts), d.ids, strict=True)) for d in (one, two)]
            same_draws.append(len(drawn[0] & drawn[1]) / len(drawn[0]))
    assert np.concatenate(same_ids).mean() > 0.999
    assert np.mean(same_draws) > 0.999


def pooled_z_scores(found: dict, full: dict, capture: Capture, j: int) -> np.ndarray:
    """Return z-scores of each token's pooled count at one temperature, of tokens expected more than 5 times.

    Args:
        found: targets with draws by tag.
        full: whole distributions by tag.
        capture: what was captured.
        j: index of the temperature.
    """
    expected, variance, counts = (np.zeros(VOCAB_SIZE) for _ in range(3))
    for tag, targets in found.items():
        rows = targets.num_positions
        p = np.zeros((rows, VOCAB_SIZE))
        logprobs = full[tag].logprobs.astype(np.float64) / capture.temperatures[j]
        p[np.repeat(np.arange(rows), VOCAB_SIZE), full[tag].ids] = np.exp(logprobs)
        p[np.repeat(np.arange(rows), capture.k), targets.ids] = 0.0
        p /= p.sum(1, keepdims=True)
        expected += capture.draws * p.sum(0)
        variance += capture.draws * (p * (1 - p)).sum(0)
        draws = targets.draws[j]
        counts += np.bincount(draws.ids, draws.multiplicities, VOCAB_SIZE)
    return ((counts - expected) / np.sqrt(variance))[expected > 5]


def bonferroni_limit(comparisons: int) -> float:
    """Return the z-score that one of so many honest comparisons exceeds once in a million runs, at most."""
    return -NormalDist().inv_cdf(1e-6 / 2 / comparisons)


def test_draws_are_unbiased_over_a_real_text(float32, exact):
    """Mode top+sample. Confidence: pooled counts within the Bonferroni limit, which honest draws exceed once in a
    million runs.
    """
    requests = sequences(30, seed=5)
    found, full = scored(float32, requests), oracle(exact, TopCapture(k=VOCAB_SIZE), requests)
    for j in range(len(HYBRID.temperatures)):
        z = pooled_z_scores(found, full, HYBRID, j)
        assert np.abs(z).max() < bonferroni_limit(len(HYBRID.temperatures) * VOCAB_SIZE)
        assert 0.3 < z.std() < 1.2


def test_scoring_and_answering_alternate(float32):
    before = answers(float32, prompts(5))
    rows = scored(float32, sequences(3))
    assert answers(float32, prompts(5)) == before
    again = scored(float32, sequences(3))
    for tag, targets in rows.items():
        assert np.array_equal(targets.ids, again[tag].ids)


def test_seeds_make_answers_independent_of_their_company(float32):
    assert float32.provenance()["seeds_honoured"] is True
    together = answers(float32, prompts(48))
    for request in prompts(48)[::12]:
        assert answers(float32, [request]) == {request.tag: together[request.tag]}
    other = [GenerateRequest(r.tag, r.unit, r.token_ids, r.seed + 1) for r in prompts(48)]
    assert sum(answers(float32, other)[tag] != together[tag] for tag in together) > 20


def test_more_prompts_than_one_pass_holds_keep_their_seeds(float32):
    """600 prompts of 40 tokens exceed one pass: vLLM's CPU runner dies here if it cuts a seeded prompt in two."""
    rng = np.random.default_rng(0)
    requests = [GenerateRequest(i, 0, rng.integers(3, VOCAB_SIZE, 40).tolist(), i) for i in range(600)]
    assert len(answers(float32, requests, Generate(max_new_tokens=2))) == 600


def test_answers_end_with_the_end_token_or_at_their_limit(float32):
    found = answers(float32, prompts(64), Generate(max_new_tokens=60))
    end = float32.tokenizer.eos_token_id
    assert {answer.finish_reason for answer in found.values()} == {"stop", "length"}
    for answer in found.values():
        assert end not in answer.token_ids[:-1]
        assert (answer.token_ids[-1] == end) == (answer.finish_reason == "stop")
        assert answer.finish_reason == "stop" or len(answer.token_ids) == 60


def test_greedy_answers_equal_the_oracles(float32, exact):
    settings = Generate(temperature=0.0, max_new_tokens=16)
    assert answers(float32, prompts(12), settings) == answers(TransformersEngine(exact, None), prompts(12), settings)


def test_answers_end_at_the_end_token_of_their_own_prompts_template(float32):
    """Every other prompt has a template with end tokens that answers hold often; the draws are the same."""
    settings = Generate(max_new_tokens=60)
    plain = answers(float32, prompts(48), settings)
    counts = np.bincount([token for answer in plain.values() for token in answer.token_ids[:-1]], minlength=VOCAB_SIZE)
    ends = tuple((np.argsort(counts[3:])[-16:] + 3).tolist())
    mixed = [replace(request, end_token_ids=ends if request.tag % 2 else ()) for request in prompts(48)]
    found = answers(float32, mixed, settings)
    assert sum(found[tag] != plain[tag] for tag in found) >= 3
    for tag, answer in found.items():
        whole = plain[tag].token_ids
        first = next((i for i, token in enumerate(whole) if token in ends), None)
        if tag % 2 == 0 or first is None:
            assert answer == plain[tag]
        else:
            assert answer.token_ids == whole[: first + 1]
            assert answer.finish_reason == "stop"


@pytest.mark.parametrize("stop", ["e", "an", "s"])
def test_stop_text_and_what_follows_it_are_cut_as_vllms_own_text_is(float32, stop):
    """Prompts are whole letters: vLLM's text of an answer may begin with what half a letter before it held back.

    Special tokens but the end are text here as well: random weights say them, a stop text may be a part of one, and
    half of one is not said.
    """
    asked = [
        GenerateRequest(i, 0, float32.tokenizer(f"How many are {i} apples?")["input_ids"], 70 + i) for i in range(48)
    ]
    settings = Generate(max_new_tokens=60, stop=(stop,))
    specials, end = float32.tokenizer.all_special_tokens, float32.tokenizer.eos_token
    plain = answers(float32, asked, Generate(max_new_tokens=60))
    found = answers(float32, asked, settings)
    assert sum(answer.cut_at_stop for answer in found.values()) >= 5
    for tag, answer in found.items():
        texts = (float32.tokenizer.decode(one.token_ids) for one in (answer, plain[tag]))
        said, whole = (text.removesuffix(end) for text in texts)
        assert stop not in said
        assert answer.cut_at_stop == (stop in whole)
        before = whole.split(stop)[0]
        begun = {special[: special.find(stop)] for special in specials if stop in special and special in whole}
        halves = [half for half in begun if half and whole[len(before) - len(half) :].startswith(half + stop)]
        assert said == before.removesuffix(max(halves, key=len, default=""))


def test_stop_text_ends_an_answer(float32):
    request = next(r for r in prompts(64) if len(answers(float32, [r])[r.tag].token_ids) > 6)
    plain = answers(float32, [request])[request.tag]
    wanted = float32.tokenizer.decode(plain.token_ids[:4])
    stopped = answers(float32, [request], Generate(max_new_tokens=24, stop=(wanted,)))[request.tag]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == plain.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) <= 4


def test_answer_fills_the_model_length_and_no_more(float32):
    request = GenerateRequest(0, 0, np.arange(3, 3 + LONGEST - 5).tolist() and [7] * (LONGEST - 5), 11)
    answer = answers(float32, [request], Generate(max_new_tokens=100))[0]
    assert 1 <= len(answer.token_ids) <= 5
    with pytest.raises(EngineError, match="leaves no room"):
        answers(float32, [GenerateRequest(0, 0, [7] * LONGEST, 1)])


def test_bad_request_leaves_the_engine_usable(float32):
    too_long = ScoreRequest("long", 0, np.zeros(LONGEST + 1, np.int32), np.array([[1, 5]], np.int32))
    with pytest.raises(EngineError, match="expected 2 to"):
        list(float32.score([*sequences(2), too_long]))
    assert len(scored(float32, sequences(4))) == 4


def test_abandoned_results_leave_the_engine_usable(float32):
    results = float32.score(iter(sequences(30)))
    next(results)
    results.close()
    assert len(scored(float32, sequences(4))) == 4


def test_requests_are_pulled_only_as_far_as_they_fit_in_flight(float32, monkeypatch):
    monkeypatch.setattr("teacher_cache.engines.vllm.vllm_engine.MAX_IN_FLIGHT", 3)
    pulled = []

    def source():
        for request in sequences(12, seed=8):
            pulled.append(request.tag)
            yield request

    for done, _ in enumerate(float32.score(source())):
        assert len(pulled) <= done + 3 + 3
    assert len(pulled) == 12


def test_plain_columns_serve_where_the_plugin_cannot(model_dir, exact, monkeypatch, caplog):
    """The last two guards fail: lists instead of arrays, and the tail as 1 minus the head's sum."""
    capture = TopCapture(k=16, mass=0.9)
    monkeypatch.setattr(vllm_arrays, "install", lambda: "made to fail")
    monkeypatch.setattr(vllm_tail, "_installed", {"v1": "made to fail", "v2": "made to fail"})
    with caplog.at_level(logging.WARNING), opened(model_dir, capture, dtype="float32") as engine:
        assert engine.provenance()["capture_path"] == "stock+flat"
        found = scored(engine, sequences(6))
    assert sum("made to fail" in record.message for record in caplog.records) == 2
    for tag, targets in oracle(exact, capture, sequences(6)).items():
        assert np.array_equal(targets.counts, found[tag].counts)
        assert np.mean(targets.ids == found[tag].ids) > 0.99
        assert np.abs(targets.tail_logmass - found[tag].tail_logmass).max() < 1e-3


def test_tails_that_need_the_plugin_are_refused_without_it(model_dir, monkeypatch):
    monkeypatch.setattr(vllm_tail, "_installed", {"v1": "made to fail", "v2": "made to fail"})
    with pytest.raises(EngineError, match=r"cannot capture tails at temperatures \[1.0, 2.0\].*made to fail"):
        open_engine(
            VllmTeacher(model="m", dtype="float32"),
            TopCapture(temperatures=(2.0,)),
            for_generation=None,
            model_dir=model_dir,
        )


def test_wrong_arrays_are_found_out_and_lists_used(model_dir, exact, monkeypatch):
    honest = vllm_arrays.PromptArrays.__init__

    def shifted(self, ids, logprobs):
        honest(self, ids, logprobs + np.float32(0.1))

    monkeypatch.setattr(vllm_arrays.PromptArrays, "__init__", shifted)
    with opened(model_dir, HYBRID, dtype="float32") as engine:
        assert engine.provenance()["capture_path"] == "plugin+flat"
        found = scored(engine, sequences(3))
    for tag, targets in oracle(exact, HYBRID, sequences(3)).items():
        assert np.abs(targets.tail_logmass - found[tag].tail_logmass).max() < 0.01


def test_adapter_changes_the_scores_as_in_the_oracle(model_dir, tmp_path, exact):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(tmp_path)
    capture = TopCapture(k=16)
    with opened(model_dir, capture, dtype="float32", adapter=str(tmp_path)) as engine:
        found = scored(engine, sequences(4))
    teacher = TransformersTeacher(model="m", engine="transformers", adapter=str(tmp_path))
    adapted = CausalModel.load(teacher, model_dir, dtype="float64")
    plain = oracle(exact, capture, sequences(4))
    for tag, targets in oracle(adapted, capture, sequences(4)).items():
        assert np.abs(targets.label_logprobs - found[tag].label_logprobs).max() < 1e-3
        assert np.abs(targets.label_logprobs - plain[tag].label_logprobs).mean() > 0.1


def test_core_process_of_its_own_gives_the_same_rows(model_dir, exact, monkeypatch):
    """As on a GPU: the worker is reached by remote calls and rows come through a socket."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with opened(model_dir, HYBRID, ANSWER, dtype="float32") as engine:
        assert engine.provenance()["capture_path"] == "plugin+arrays"
        found = scored(engine, sequences(4))
        assert len(answers(engine, prompts(4))) == 4
    for tag, targets in oracle(exact, HYBRID, sequences(4)).items():
        assert np.array_equal(targets.ids, found[tag].ids)
        assert np.abs(targets.tail_logmass - found[tag].tail_logmass).max() < 0.01
