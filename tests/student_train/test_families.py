"""Losses and gradients of a pack against each family's own eager forward of each row alone, or a refusal.

Rows are shorter and longer than the families' window (32) and rotation's switch (64), one exactly as long as each.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from shared.errors import ModelError, TrainingError
from student_train.layers.student_watch import StudentWatch
from student_train.losses import LossTerm
from student_train.student.forward_patch import Objective, patch_forward
from student_train.student.row_separation import separate_rows
from student_train.student.stored_weights import refuse_unopened_text_model
from student_train.student.student_head import StudentHead, body_of, check_head, head_of, run_body
from tests.tiny_families import FAMILIES, VOCAB_SIZE, make_family

LENGTHS = (5, 90, 33, 2, 64, 65, 32, 77)
ALONE = {
    *("bamba", "bloom", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "llama4", "llama_dynamic"),
    *("mamba", "mamba2", "mpt", "phi3_longrope", "qwen3_5", "qwen3_next", "recurrent_gemma", "falcon", "rwkv"),
}
"""Families whose layers cannot keep rows apart in one pass."""
QUICK = {
    *("ctrl", "doge", "gemma2", "gpt_oss", "lfm2", "llama_dynamic", "mistral", "phi3_longrope"),
    *("llama4", "phimoe", "qwen2_moe", "qwen3_5"),
}
EAGER_ONLY = {"bloom", "gpt_neo", "gpt_oss", "gptj", "mamba", "mamba2", "mpt", "rwkv"}
"""Families that transformers runs with no other attention."""


def quick_and_slow(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(names)]


def rows_of(lengths):
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def own_loss(name, spread, rows):
    """Return the mean cross entropy of a fresh model's own forward, row by row, and its gradient by the embeddings."""
    model = make_family(name, spread=spread)
    total, num_positions = 0.0, sum(len(row) - 1 for row in rows)
    for row in rows:
        if "dynamic" in name:  # its rotation remembers the longest row so far
            rotary = model.model.rotary_emb
            rotary.max_seq_len_cached, rotary.inv_freq = rotary.original_max_seq_len, rotary.original_inv_freq
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.double(), row[1:], reduction="sum") / num_positions
        loss.backward()
        total += float(loss.detach())
    return total, model.get_input_embeddings().weight.grad


def pack_loss(model, rows):
    """Return the loss of all rows in one pack, as training computes it, and its gradient by the embeddings."""
    starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    labels = torch.cat([row[1:] for row in rows])
    places = [torch.arange(len(row) - 1) + start for row, start in zip(rows, starts.tolist(), strict=False)]
    loss = model(
        input_ids=torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
        labels=labels,
        num_items_in_batch=torch.tensor(len(labels)),
        predictor_index=torch.cat(places),
    ).loss
    loss.backward()
    return loss.item(), model.get_input_embeddings().weight.grad


@pytest.mark.parametrize("spread", [0.02, 0.3])
@pytest.mark.parametrize("name", quick_and_slow(FAMILIES))
def test_pack_has_the_loss_and_gradient_of_each_row_alone(name, spread):
    rows = rows_of(LENGTHS)
    expected, expected_gradient = own_loss(name, spread, rows)
    model = make_family(name, spread=spread, attention="eager" if name in EAGER_ONLY else "sdpa")
    head = head_of(model, VOCAB_SIZE)
    check_head(model, head)
    assert (separate_rows(model, VOCAB_SIZE) == "alone") == (name in ALONE)
    objective = Objective(head, terms=[LossTerm("cross_entropy")])
    patch_forward(model, objective)
    loss, gradient = pack_loss(model, rows)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert float((gradient - expected_gradient).abs().max()) < 2e-3 * float(expected_gradient.abs().max())


@pytest.mark.parametrize(
    ("name", "way"),
    [("qwen2_moe", "stock"), ("lfm2", "alone"), ("phi3_longrope", "alone"), ("gemma2", "rows"), ("mamba", "alone")],
)
def test_narrow_weights_are_judged_in_float32_and_left_as_they_were(name, way):
    """Rounding of 16-bit products would hide a window or a convolution of fresh weights; Mamba reads a weight of a part
    that it never calls, and turns its states into the head's type."""
    model = make_family(name, attention="eager" if name in EAGER_ONLY else "sdpa").to(torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_head(model, head_of(model, VOCAB_SIZE))
    assert separate_rows(model, VOCAB_SIZE) == way
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())


@pytest.mark.parametrize("name", ["gemma2", "recurrent_gemma", "granite", "cohere"])
def test_logits_are_read_as_the_model_makes_them_whatever_their_size(name):
    changes = {"final_logit_softcapping": 3.0} if name == "gemma2" else {}
    model = make_family(name, **changes)
    head = head_of(model, VOCAB_SIZE)
    check_head(model, head)
    wrong = StudentHead(head.module, head.vocab_size, head.logit_scale * (1.0 if head.softcap else 1.01))
    with pytest.raises(TrainingError, match="does not declare"):
        check_head(model, wrong)


def test_student_without_sdpa_is_told_the_attention_that_works(tmp_path):
    from shared.recipe.recipe import Student
    from student_train.student.student import load_student

    make_family("gpt_oss").save_pretrained(tmp_path)
    cache = SimpleNamespace(tokenizer_hash=None, vocab_size=VOCAB_SIZE, path="cache")
    with pytest.raises(ModelError, match=r"set student\.attention to eager"):
        load_student(Student(model=str(tmp_path), init="random"), None, cache)
    model = load_student(Student(model=str(tmp_path), init="random", attention="eager"), None, cache)
    assert separate_rows(model, VOCAB_SIZE) == "rows"


@pytest.mark.parametrize(
    ("name", "recomputes"),
    [("qwen3_moe", False), ("qwen3_moe", True), ("mixtral", False), ("olmoe", False), ("phimoe", False)],
)
def test_balance_of_a_router_is_that_of_each_row_alone(name, recomputes):
    """Against the model's own training forward, whose loss is cross entropy + coefficient x its balancing loss."""
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    rows = rows_of((5, 90, 33, 2))
    own = make_family(name, spread=0.15, **asked)
    total, num_positions = 0.0, sum(len(row) - 1 for row in rows)
    for row in rows:
        loss = own(input_ids=row[None], labels=row[None], use_cache=False).loss * (len(row) - 1) / num_positions
        loss.backward()
        total += loss.item()
    model = make_family(name, spread=0.15, attention="sdpa", **asked)
    if recomputes:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    head = head_of(model, VOCAB_SIZE)
    separate_rows(model, VOCAB_SIZE)
    patch_forward(model, Objective(head, terms=[LossTerm("cross_entropy")]))
    loss, _ = pack_loss(model, rows)
    assert loss == pytest.approx(total, abs=1e-5)
    routers = [
        key for key, _ in model.named_parameters() if key.endswith(("gate.weight", "router.weight", "layer.weight"))
    ]
    assert routers
    for key in routers:
        got, expected = (dict(one.named_parameters())[key].grad for one in (model, own))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-6)


def test_balance_that_is_not_known_is_refused_with_what_to_set():
    model = make_family("jamba", output_router_logits=True)
    separate_rows(model, VOCAB_SIZE)
    with pytest.raises(TrainingError, match="set output_router_logits to false"):
        patch_forward(model, Objective(head_of(model, VOCAB_SIZE)))


def test_model_that_sees_what_follows_is_refused_however_its_embeddings_lie():
    """XLNet turns them round, [tokens, rows, width], and attends to both sides."""
    from transformers import XLNetConfig, XLNetLMHeadModel

    model = XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB_SIZE, d_model=64, n_layer=2, n_head=4, d_inner=96)).eval()
    row = rows_of([30])[0][None]
    other = row.clone()
    other[0, 20:] = 5
    with torch.no_grad():
        assert (model(row).logits - model(other).logits)[0, :20].abs().max() > 1e-3
    with pytest.raises(TrainingError, match=r"see what comes after them, so it cannot"):
        separate_rows(model, VOCAB_SIZE)


@pytest.mark.parametrize(("kind", "refused"), [("mllama", True), ("emu3", True), ("qwen3_5", False), ("llama", False)])
def test_text_model_that_no_config_opens_again_is_refused(kind, refused, tmp_path):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[kind]()
    few = {"num_hidden_layers": 0, "layer_types": [], "hidden_size": 64, "vocab_size": 8}
    for name, value in few.items():
        setattr(config.get_text_config(), name, value)
    config.get_text_config().cross_attention_layers, config.get_text_config().pad_token_id = [], 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    if refused:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(TrainingError, match=r"does not open as a language model .*; choose another student"):
            refuse_unopened_text_model(tmp_path, config)
    else:
        AutoModelForCausalLM.from_pretrained(tmp_path)
        refuse_unopened_text_model(tmp_path, config)


def test_student_whose_prompts_are_read_in_both_directions_is_refused():
    with pytest.raises(TrainingError, match=r"set prefix_lm to false to take it so"):
        separate_rows(make_family("hrm_text", prefix_lm=True), VOCAB_SIZE)


def test_states_are_seen_where_a_layer_returns_a_list():
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4)).eval()
    row, watch = rows_of([9])[0][None], StudentWatch(model, [1, 2], [])
    with watch.on(), torch.no_grad():
        run_body(body_of(model), row, torch.arange(9)[None])
        own = model(row, output_hidden_states=True).hidden_states
    assert torch.equal(watch.states[1], own[1][0]) and torch.equal(watch.states[2], own[2][0])


def test_head_behind_layers_of_another_width_is_refused_with_both_widths():
    from transformers import RemBertConfig, RemBertForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = RemBertConfig(
        vocab_size=VOCAB_SIZE, input_embedding_size=32, output_embedding_size=48, is_decoder=True, **sizes
    )
    model = RemBertForCausalLM(config).eval()
    with pytest.raises(TrainingError, match=r"64 wide.* reads 48"):
        check_head(model, head_of(model, VOCAB_SIZE))


def test_layer_with_several_states_of_a_token_is_refused_to_the_loss_on_states():
    model = make_family("gemma3n")
    watch = StudentWatch(model, [2], [])
    with pytest.raises(TrainingError, match=r"layer 2 passes on several states.*map it to final"), watch.on():
        run_body(body_of(model), rows_of([5])[0][None], torch.arange(5)[None])


def test_adapter_on_all_linear_layers_leaves_routers_out_that_return_more_than_a_product():
    from shared.recipe.recipe import Adapter
    from student_train.student.student import add_adapter

    model = make_family("phimoe", attention="sdpa")
    wrapped = add_adapter(model, Adapter(kind="lora", r=4))
    adapted = {name for name, _ in wrapped.named_modules() if name.endswith("lora_A")}
    assert any("q_proj" in name for name in adapted) and not any("router" in name for name in adapted)
    assert torch.isfinite(wrapped(input_ids=rows_of([5])[0][None]).logits).all()


def test_student_that_cannot_recompute_activations_is_refused():
    from student_train.student.student import check_recomputes

    check_recomputes(make_family("llama"))
    with pytest.raises(TrainingError, match="set gradient_checkpointing to false"):
        check_recomputes(make_family("ctrl"))


def test_student_that_computes_nan_is_not_called_one_that_sees_what_follows():
    model = make_family("llama")
    model.get_input_embeddings().weight.data[:] = torch.nan
    with pytest.raises(TrainingError, match=r"computes NaN instead of numbers: .*student\.dtype"):
        separate_rows(model, VOCAB_SIZE)
