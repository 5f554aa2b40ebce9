"""The transformers engines over many families: scores, answers and states in any batch are those of each row alone.

The reference is the model's own eager forward of one row, with the rotation that a row of its length has.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.errors import EngineError
from shared.identity.hidden_identity import HiddenIdentity
from shared.recipe.recipe import Generate
from shared.recipe.sections.capture import TopCapture
from teacher_cache.engines.protocol import GenerateRequest, ScoreRequest
from teacher_cache.engines.transformers.hidden_engine import HiddenEngine
from teacher_cache.engines.transformers.transformers_engine import TransformersEngine
from teacher_cache.engines.transformers.transformers_model import CausalModel
from tests.tiny_families import FAMILIES, VOCAB_SIZE, make_family

LENGTHS = (5, 90, 33, 2, 64, 65, 32, 77)
GREEDY = Generate(max_new_tokens=8, temperature=0)
QUICK = {"gemma2", "lfm2", "llama_dynamic", "phi3_longrope", "recurrent_gemma", "qwen2_moe"}


def quick_and_slow(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(names)]


class Tokenizer:
    """What the engine asks of a tokenizer whose text is not needed."""

    eos_token_id = None
    added_tokens_decoder: dict = {}  # noqa: RUF012

    def __len__(self):
        return VOCAB_SIZE

    def get_vocab(self):
        return {str(token): token for token in range(VOCAB_SIZE)}


def rows_of(lengths):
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def own_logprobs(model, row):
    """Return [T, V] float64 of the model's own forward, after its dynamic rotation has forgotten longer rows."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if "dynamic" in str(getattr(rotary, "rope_type", "")):
        rotary.max_seq_len_cached, rotary.inv_freq = rotary.original_max_seq_len, rotary.original_inv_freq
    with torch.no_grad():
        return model(input_ids=row[None], use_cache=False).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("name", quick_and_slow(FAMILIES))
def test_scores_of_a_batch_are_those_of_each_row_alone(name):
    own = make_family(name, spread=0.3)
    stock = make_family(name, spread=0.3, attention="sdpa" if own._supports_sdpa else "eager")
    capture = TopCapture(k=VOCAB_SIZE - 1, mass=1.0)
    engine = TransformersEngine(
        CausalModel(stock, Tokenizer()), capture, max_model_len=512 if name == "llama_dynamic" else None
    )
    rows = rows_of(LENGTHS)
    requests = [ScoreRequest(i, 0, row.numpy(), np.array([[1, len(row)]])) for i, row in enumerate(rows)]
    found = {scored.tag: scored.targets for scored in engine.score(requests)}
    assert sorted(found) == list(range(len(rows)))
    for i, row in enumerate(rows):
        expected = own_logprobs(own, row)[:-1].gather(1, row[1:, None])[:, 0]
        np.testing.assert_allclose(found[i].label_logprobs, expected.numpy(), atol=2e-4)


@pytest.mark.parametrize(
    "name", ["llama_dynamic", "phi3_longrope", "gemma2", "lfm2", "llama4", "mamba", "moshi", "rwkv", "whisper"]
)
def test_greedy_answers_are_those_of_the_whole_prefix_each_time(name):
    """Also across the length where the rotation changes, where cached keys are of no use, where states are cached under
    another name or in another way, and where a cache drops keys that the whole row's attention sees.
    """
    own = make_family(name, spread=0.3)
    stock = make_family(name, spread=0.3, attention="sdpa" if own._supports_sdpa else "eager")
    engine = TransformersEngine(CausalModel(stock, Tokenizer()), None, max_model_len=512)
    rows = rows_of((7, 60, 12, 66))
    requests = [GenerateRequest(i, 0, row.tolist(), seed=i) for i, row in enumerate(rows)]
    answers = {answer.tag: list(answer.token_ids) for answer in engine.generate(requests, GREEDY)}
    for i, row in enumerate(rows):
        for _ in range(8):
            row = torch.cat([row, own_logprobs(own, row)[-1].argmax()[None]])
        assert answers[i] == row[-8:].tolist()


def test_model_without_use_of_the_cache_is_named_with_the_engine_that_is_fast(caplog):
    model = CausalModel(make_family("rwkv", spread=0.3), Tokenizer())
    with torch.inference_mode():
        assert model.new_cache() is None
        assert model.new_cache() is None
    assert caplog.text.count("teacher.engine vllm") == 1


@pytest.mark.parametrize("name", ["mamba", "llama", "gpt_oss"])
def test_teacher_in_16_bits_is_probed_in_float32(name):
    model = CausalModel(make_family(name, spread=0.3).to(torch.bfloat16), Tokenizer())
    with torch.inference_mode():
        assert (model.new_cache() is None) == (name == "mamba")
    assert {weight.dtype for weight in model.model.parameters()} == {torch.bfloat16}


def test_teacher_whose_prompts_are_read_in_both_directions_is_refused():
    with pytest.raises(EngineError, match=r"set prefix_lm to false to take it so"):
        CausalModel(make_family("hrm_text", prefix_lm=True), Tokenizer())


def test_head_behind_layers_of_another_width_is_refused():
    from transformers import RemBertConfig, RemBertForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = RemBertConfig(
        vocab_size=VOCAB_SIZE, input_embedding_size=32, output_embedding_size=48, is_decoder=True, **sizes
    )
    with pytest.raises(EngineError, match="makes its logits in a way"):
        CausalModel(RemBertForCausalLM(config), Tokenizer())


def test_layer_with_several_states_of_a_token_is_refused_to_the_capture_of_states():
    identity = HiddenIdentity(teacher="t", weights_hash="", tokenizer_hash="", num_layers=4, width=64, layers=(2,))
    engine = HiddenEngine(CausalModel(make_family("gemma3n"), Tokenizer()), identity, 100)
    request = ScoreRequest(0, 0, np.arange(5, dtype=np.int32), np.array([[1, 5]]))
    with pytest.raises(EngineError, match="layer 2 of the teacher passes on several states"):
        list(engine.capture([request]))


def test_teacher_that_sees_what_follows_is_refused():
    from transformers import BertGenerationConfig, BertGenerationDecoder

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    kinds = {
        is_decoder: BertGenerationConfig(vocab_size=VOCAB_SIZE, is_decoder=is_decoder, **sizes)
        for is_decoder in (True, False)
    }
    assert CausalModel(BertGenerationDecoder(kinds[True]), Tokenizer()).num_entries == VOCAB_SIZE
    with pytest.raises(EngineError, match="see what comes after"):
        CausalModel(BertGenerationDecoder(kinds[False]), Tokenizer())
