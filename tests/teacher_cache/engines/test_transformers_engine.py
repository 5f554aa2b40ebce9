"""The reference engine against dense float64 maths on a tiny random model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from shared.errors import EngineError
from shared.recipe.recipe import Generate
from shared.recipe.sections.capture import TopCapture, TopSampleCapture
from shared.recipe.sections.teacher import TransformersTeacher
from teacher_cache.engines import GenerateRequest, ScoreRequest, open_engine
from teacher_cache.engines.transformers.length_batches import length_batches
from teacher_cache.engines.transformers.transformers_engine import TransformersEngine
from teacher_cache.engines.transformers.transformers_model import CausalModel
from teacher_cache.engines.transformers.transformers_sampling import next_tokens
from tests.tiny_models import VOCAB_SIZE, make_llama, make_qwen3, overflow, spoil

PADDED = VOCAB_SIZE + 32


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("padded"), vocab_size=PADDED)


@pytest.fixture(scope="module")
def exact(model_dir):
    """The model in float64."""
    return CausalModel.load(
        TransformersTeacher(model="m", engine="transformers", dtype="float32"), model_dir, dtype="float64"
    )


def sequences(count: int, seed: int = 0) -> list[ScoreRequest]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        length = int(rng.integers(12, 40))
        ids = rng.integers(3, VOCAB_SIZE, length).astype(np.int32)
        found.append(ScoreRequest(i, i // 4, ids, np.array([[3, 7], [9, length]], np.int32)))
    return found


def dense_logprobs(model: CausalModel, token_ids: np.ndarray) -> np.ndarray:
    """Return [T, V] through the model's own forward."""
    with torch.no_grad():
        logits = model.model(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0]
    return logits.double().log_softmax(-1).numpy()


def scored(engine: TransformersEngine, requests: list[ScoreRequest]) -> dict:
    return {result.tag: result.targets for result in engine.score(iter(requests))}


def test_ids_above_one_that_is_left_out_are_tokens_and_no_padding(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "holes")
    document = json.loads((tmp_path / "holes" / "tokenizer.json").read_text())
    document["model"]["vocab"]["rs"] = PADDED - 1
    (tmp_path / "holes" / "tokenizer.json").write_text(json.dumps(document))
    teacher = TransformersTeacher(model="m", engine="transformers", dtype="float32")
    model = CausalModel.load(teacher, tmp_path / "holes", dtype="float64")
    engine = TransformersEngine(model, TopCapture(mode="top", k=PADDED), softmax_dtype=torch.float64)
    request = ScoreRequest(0, 0, np.array([5, 6, PADDED - 1, 7], np.int32), np.array([[1, 4]], np.int32))
    targets = scored(engine, [request])[0]
    assert PADDED - 1 in targets.ids and np.all(targets.tail_logmass < -20)


def test_scores_equal_dense_float64_maths(exact):
    capture = TopCapture(mode="top", k=9, mass=0.3, temperatures=(1.0, 1.5))
    engine = TransformersEngine(exact, capture, softmax_dtype=torch.float64)
    requests = sequences(6)
    results = scored(engine, requests)
    assert any(len(set(targets.counts.tolist())) > 1 for targets in results.values())
    for request in requests:
        targets = results[request.tag]
        logprobs = dense_logprobs(exact, request.token_ids)
        offsets = targets.offsets()
        tokens = [t for start, end in request.spans for t in range(start, end)]
        assert targets.num_positions == len(tokens)
        for s, t in enumerate(tokens):
            row = logprobs[t - 1]
            hot = np.exp(row / 1.5 - np.logaddexp.reduce(row / 1.5))
            order = sorted(range(VOCAB_SIZE), key=lambda v: (-row[v], v))[:9]
            cut = next((n for n in range(1, 9) if hot[order[:n]].sum() >= 0.3), 9)
            head = order[:cut]
            assert targets.ids[offsets[s] : offsets[s + 1]].tolist() == head
            assert np.allclose(targets.logprobs[offsets[s] : offsets[s + 1]], row[head], atol=1e-6)
            assert targets.label_logprobs[s] == pytest.approx(row[request.token_ids[t]], abs=1e-5)
            assert np.exp(targets.tail_logmass[s, 0]) == pytest.approx(1 - np.exp(row[head]).sum(), abs=1e-6)
            assert np.exp(targets.tail_logmass[s, 1]) == pytest.approx(1 - hot[head].sum(), abs=1e-6)


def test_float32_is_within_rounding_of_float64(model_dir, exact):
    capture = TopSampleCapture(mode="top+sample", k=8, draws=4, temperatures=(1.0, 2.0, 4.0))
    oracle = scored(TransformersEngine(exact, capture, softmax_dtype=torch.float64), sequences(6))
    teacher = TransformersTeacher(model="m", engine="transformers", dtype="float32")
    engine = open_engine(teacher, capture, for_generation=None, model_dir=model_dir)
    found = scored(engine, sequences(6))
    for tag, expected in oracle.items():
        assert np.array_equal(found[tag].ids, expected.ids)
        assert np.abs(found[tag].tail_logmass - expected.tail_logmass).max() < 1e-4
        for one, other in zip(found[tag].draws, expected.draws, strict=True):
            assert np.mean(one.counts == other.counts) > 0.99


def test_batching_changes_neither_targets_nor_draws(exact):
    capture = TopSampleCapture(mode="top+sample", k=6, draws=5, temperatures=(1.0, 2.0), mass=0.95)
    alone = scored(TransformersEngine(exact, capture, batch_tokens=1), sequences(8))
    together = scored(TransformersEngine(exact, capture, batch_tokens=4096), sequences(8))
    for tag, one in alone.items():
        other = together[tag]
        assert np.array_equal(one.ids, other.ids)
        assert np.allclose(one.tail_logmass, other.tail_logmass, atol=1e-5)
        for a, b in zip(one.draws, other.draws, strict=True):
            assert np.array_equal(a.ids, b.ids)
            assert np.array_equal(a.multiplicities, b.multiplicities)


def test_batches_never_cross_a_unit_and_stay_within_their_tokens():
    requests = sequences(12)
    batches = list(length_batches(requests, 0, 64))
    assert sorted(r.tag for batch in batches for r in batch) == list(range(12))
    for batch in batches:
        assert len({r.unit for r in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(len(r.token_ids) for r in batch) <= 64
    assert any(len(batch) > 1 for batch in batches)


def prompts(count: int) -> list[GenerateRequest]:
    rng = np.random.default_rng(2)
    return [
        GenerateRequest(i, 0, rng.integers(3, VOCAB_SIZE, int(rng.integers(2, 9))).tolist(), 1000 + i)
        for i in range(count)
    ]


def answers(engine: TransformersEngine, requests: list[GenerateRequest], settings: Generate) -> dict:
    return {answer.tag: answer for answer in engine.generate(iter(requests), settings)}


def test_answers_depend_on_their_seed_and_not_on_their_company(exact):
    settings = Generate(max_new_tokens=12)
    company = answers(TransformersEngine(exact, None), prompts(6), settings)
    alone = answers(TransformersEngine(exact, None, batch_tokens=1), prompts(6)[::-1], settings)
    assert company == alone
    other_seeds = [GenerateRequest(r.tag, r.unit, r.token_ids, r.seed + 1) for r in prompts(6)]
    assert answers(TransformersEngine(exact, None), other_seeds, settings) != company


@pytest.mark.slow
def test_rows_that_have_ended_are_no_longer_computed_and_the_others_do_not_see_it(exact, monkeypatch):
    settings = Generate(max_new_tokens=60)
    alone = answers(TransformersEngine(exact, None, batch_tokens=1), prompts(40), settings)
    rows: list[int] = []
    hidden = exact.hidden
    monkeypatch.setattr(exact, "hidden", lambda tokens, *more: rows.append(len(tokens)) or hidden(tokens, *more))
    assert answers(TransformersEngine(exact, None), prompts(40), settings) == alone
    lengths = sorted(len(answer.token_ids) for answer in alone.values())
    assert rows[0] == 40
    assert rows == sorted(rows, reverse=True)
    assert sum(lengths) <= sum(rows) < 2 * sum(lengths) < 40 * lengths[-1], "each row at most twice what it needs"


def test_greedy_answers_equal_the_models_own_generate(exact):
    settings = Generate(temperature=0.0, max_new_tokens=10)
    found = answers(TransformersEngine(exact, None), prompts(4), settings)
    for request in prompts(4):
        ids = torch.tensor([request.token_ids])
        own = exact.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)[0]
        assert found[request.tag].token_ids == own[len(request.token_ids) :].tolist()


def test_answers_end_with_the_end_token_or_at_their_limit(exact):
    engine = TransformersEngine(exact, None, max_model_len=30)
    found = answers(engine, prompts(40), Generate(max_new_tokens=100))
    reasons = {answer.finish_reason for answer in found.values()}
    assert reasons == {"stop", "length"}
    for request in prompts(40):
        answer = found[request.tag]
        ends = [t == engine.tokenizer.eos_token_id for t in answer.token_ids]
        assert not any(ends[:-1])
        assert ends[-1] == (answer.finish_reason == "stop")
        assert answer.finish_reason == "stop" or len(request.token_ids) + len(answer.token_ids) == 30
        assert max(answer.token_ids) < VOCAB_SIZE


def test_stop_text_ends_an_answer(exact):
    engine = TransformersEngine(exact, None)
    plain = answers(engine, prompts(1), Generate(max_new_tokens=20))[0]
    wanted = engine.tokenizer.decode(plain.token_ids[:4])
    stopped = answers(engine, prompts(1), Generate(max_new_tokens=20, stop=(wanted,)))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == plain.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) <= 4


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (5, 1.0, 0.7), (0, 0.8, 1.3), (6, 0.7, 1.0)]
)
def test_choice_follows_the_filtered_distribution(top_k, top_p, temperature):
    """Counts of 40,000 choices within 4.5 standard deviations of the distribution that the settings describe."""
    rng, count = np.random.default_rng(4), 40_000
    logits = rng.normal(0, 2, 20)
    p = np.exp(logits[:18] / temperature)
    order = np.argsort(-p)
    p[order[top_k or 18 :]] = 0
    p /= p.sum()
    kept = np.searchsorted(np.cumsum(p[order]), top_p - 1e-12) + 1
    p[order[kept:]] = 0
    p /= p.sum()
    seeds = torch.from_numpy(rng.integers(0, 2**62, count))
    rows = torch.from_numpy(logits)[None].expand(count, -1)
    chosen = next_tokens(rows, seeds, 3, Generate(temperature=temperature, top_k=top_k, top_p=top_p), 18).numpy()
    found = np.bincount(chosen, minlength=20)
    assert found[18:].sum() == 0
    assert found[:18][p == 0].sum() == 0
    some = (p > 0) & (p < 1)
    assert np.abs((found[:18] - count * p)[some] / np.sqrt(count * p * (1 - p))[some]).max() < 4.5


def test_too_long_sequences_and_prompts_are_refused_in_a_sentence(exact):
    engine = TransformersEngine(exact, TopCapture(k=4), max_model_len=16)
    with pytest.raises(EngineError, match=r"expected 2 to teacher\.max_model_len 16"):
        list(engine.score([ScoreRequest(0, 0, np.arange(17, dtype=np.int32), np.array([[1, 17]], np.int32))]))
    with pytest.raises(EngineError, match="leaves no room"):
        list(engine.generate([GenerateRequest(0, 0, list(range(16)), 1)], Generate()))
    with pytest.raises(EngineError, match="without a capture"):
        list(TransformersEngine(exact, None).score([]))


def test_bfloat16_teacher_with_float32_head_has_few_ties(tmp_path):
    model_dir = make_llama(tmp_path)
    ties = {}
    for head_dtype in ("auto", "float32"):
        teacher = TransformersTeacher(model="m", engine="transformers", dtype="bfloat16", head_dtype=head_dtype)
        engine = open_engine(teacher, TopCapture(k=64), for_generation=None, model_dir=model_dir)
        targets = scored(engine, sequences(4))[0]
        gaps = np.diff(targets.logprobs.reshape(-1, 64), axis=1)
        ties[head_dtype] = int((gaps == 0).sum())
        assert engine.provenance()["head_dtype"] == ("float32" if head_dtype == "float32" else "bfloat16")
    assert ties["float32"] * 10 < ties["auto"]


def test_closed_engine_says_so(exact):
    engine = TransformersEngine(exact, TopCapture(k=4))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        list(engine.score(sequences(1)))


@pytest.mark.parametrize(
    ("factor", "dtype"), [(float("nan"), torch.float32), (1e7, torch.float16)], ids=["of weights", "of 16 bits"]
)
def test_a_model_that_computes_no_numbers_is_refused_at_its_start(model_dir, factor, dtype):
    """It was told as one whose logits are made in a way that is not known, with an advice that led on to a bug."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    model.model.norm.weight.data *= factor
    with pytest.raises(EngineError, match=r"computes NaN instead of numbers: .* set teacher\.dtype to float32"):
        CausalModel(model, AutoTokenizer.from_pretrained(model_dir))


def test_a_head_that_computes_no_numbers_is_no_unknown_way_of_making_logits(tmp_path):
    """Embeddings and head are one tensor, and one of its rows that the probe does not read is NaN."""
    spoil(make_qwen3(tmp_path), 0)
    with pytest.raises(EngineError, match="computes NaN instead of numbers"):
        CausalModel.load(TransformersTeacher(model="m", engine="transformers"), tmp_path)


def test_a_head_that_is_too_large_for_16_bits_is_no_unknown_way_of_making_logits(tmp_path):
    """Its logits are infinite; the advice to use vLLM led to answers that no distribution could be made of."""
    overflow(make_llama(tmp_path))
    teacher = TransformersTeacher(model="m", engine="transformers", dtype="float16", head_dtype="auto")
    with pytest.raises(EngineError, match="computes NaN instead of numbers"):
        CausalModel.load(teacher, tmp_path)
    assert CausalModel.load(teacher.model_copy(update={"dtype": "float32"}), tmp_path)


def test_a_model_that_cannot_run_here_is_refused_with_the_reason(model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(EngineError, match=r"Qwen3ForCausalLM cannot run on this machine's cpu \(.*dtype.*\); set"):
        CausalModel(model, AutoTokenizer.from_pretrained(model_dir))


def test_answers_are_refused_once_a_model_computes_nan(tmp_path):
    """One token's embedding is NaN: the answer went on with the last token of the vocabulary and was committed."""
    spoil(make_llama(tmp_path), VOCAB_SIZE // 2)
    engine = open_engine(
        TransformersTeacher(model="m", engine="transformers"), None, for_generation=None, model_dir=tmp_path
    )
    for settings in (Generate(max_new_tokens=8), Generate(max_new_tokens=8, temperature=0.0)):
        assert len(list(engine.generate([GenerateRequest(0, 0, [5, 6, 7], 1)], settings))) == 1
        with pytest.raises(EngineError, match="computes NaN instead of numbers"):
            list(engine.generate([GenerateRequest(1, 0, [5, VOCAB_SIZE // 2, 7], 1)], settings))
