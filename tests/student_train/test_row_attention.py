"""Attention row by row against dense float64 softmax under a mask, and inside whole models against the stock kind."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from student_train.student.row_attention import NAME, attend_rows, layout_of, switch_attention
from student_train.student.row_separation import separate_rows
from student_train.student.student_head import body_of, run_body


def positions(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def dense_attention(query, key, value, lengths, window, scale):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(row))[:, None] - torch.arange(len(row))
    seen = (row[:, None] == row) & (distance >= 0) & (distance < (window or len(row)))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.sampled_from([None, 5]), st.sampled_from([1, 2]))
def test_values_and_gradients_equal_dense_attention_under_a_mask(lengths, window, kv_heads):
    generator = torch.Generator().manual_seed(len(lengths))
    shapes = [(1, heads, sum(lengths), 8) for heads in (2, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    layout = layout_of(positions(lengths))
    got, weights = attend_rows(None, *inputs, None, scaling=0.3, sliding_window=window, row_layout=layout)
    expected = dense_attention(*inputs, lengths, window, 0.3)
    assert weights is None
    torch.testing.assert_close(got, expected)
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for left, right in zip(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(left, right)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_rectangles_are_less_than_half_empty_and_hold_every_token_once(lengths):
    layout = layout_of(positions(lengths))
    slots = torch.cat([rectangle.tokens for rectangle in layout.rectangles])
    assert torch.equal(slots[layout.places], torch.arange(sum(lengths)))
    assert len(slots) < 2 * sum(lengths)


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("recompute", [False, True])
def test_model_has_the_hidden_states_and_gradients_of_stock_attention(tiny, family, recompute):
    results = []
    for attention in ("sdpa", NAME):
        model = load(getattr(tiny, family)).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        switch_attention(model, attention)
        hidden = run_body(body_of(model), torch.arange(60)[None], positions([7, 30, 1, 22]))
        (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        results.append((hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)


def test_models_with_stock_attention_train_row_by_row_and_others_keep_theirs(tiny):
    model = load(tiny.qwen3)
    separate_rows(model, 512)
    assert model.config._attn_implementation == NAME
    switch_attention(model, "eager")
    separate_rows(model, 512)
    assert model.config._attn_implementation == "eager"


def test_model_whose_layers_hand_nothing_on_keeps_stock_attention(tiny):
    """The probe sees the rows leak and leaves the model as it was, whose stock attention then keeps them apart."""
    model = load(tiny.qwen3)
    for layer in body_of(model).layers:
        layer.self_attn.forward = functools.partial(_without_layout, layer.self_attn.forward)
    separate_rows(model, 512)
    assert model.config._attn_implementation == "sdpa"


def _without_layout(forward, *args, row_layout=None, **kwargs):
    return forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.float32, None), (torch.float32, 5), (torch.bfloat16, 5), (torch.bfloat16, None)]
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_no_layer_holds_scores_of_whole_rows(dtype, window, kv_heads, monkeypatch):
    """Torch's fused kernels serve every call, and shared keys meet them only where each of them takes such keys."""
    seen = []

    def spy(query, key, value, **options):
        seen.append((query.shape[1] == key.shape[1], options["enable_gqa"], options["attn_mask"]))
        return scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr("student_train.student.row_attention.scaled_dot_product_attention", spy)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 30, 16, generator=generator).to(dtype) for n in (4, kv_heads, kv_heads))
    layout = layout_of(positions([17, 13]))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):  # not the one that holds scores
        got, _ = attend_rows(None, query, key, value, sliding_window=window, row_layout=layout)
    expected = dense_attention(query.double(), key.double(), value.double(), [17, 13], window, 0.25)
    torch.testing.assert_close(got.double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    for has_own_keys, shares, mask in seen:
        assert has_own_keys or (shares and mask is None and dtype == torch.bfloat16)
        assert mask is None or mask.dtype == dtype
    assert len({mask.data_ptr() for *_, mask in seen if mask is not None}) == len(layout.masks)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("softcap", "sinks"), [(2.0, False), (None, True), (1.5, True)])
def test_caps_and_sinks_equal_dense_float64(window, softcap, sinks, monkeypatch):
    """Also where queries come in several blocks."""
    monkeypatch.setattr("student_train.student.row_attention.SCORES_AT_ONCE", 64)
    generator, lengths = torch.Generator().manual_seed(1), [9, 1, 20]
    shapes = [(1, heads, sum(lengths), 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator).double().requires_grad_() for shape in shapes]
    s_aux = torch.randn(4, generator=generator).double().requires_grad_() if sinks else None
    found, _ = attend_rows(
        None,
        *inputs,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        s_aux=s_aux,
        row_layout=layout_of(positions(lengths)),
    )
    query, key, value = (inputs[0], *(tensor.repeat_interleave(2, dim=1) for tensor in inputs[1:]))
    scores = query @ key.transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    row = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    distance = torch.arange(30)[:, None] - torch.arange(30)
    seen = (row[:, None] == row) & (distance >= 0) & (distance < (window or 30))
    scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, 4, 1, 1).expand(1, 4, 30, 1)], -1)
    expected = (scores.softmax(-1)[..., :30] @ value).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    leaves = [*inputs, *([s_aux] if sinks else [])]
    direction = torch.randn(expected.shape, generator=generator).double()
    for left, right in zip(
        torch.autograd.grad(found, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def test_attention_that_is_not_known_is_not_guessed_at():
    tensors = [torch.zeros(1, 2, 3, 4)] * 3
    for option in ({"position_bias": torch.zeros(1)}, {"attention_mask": torch.zeros(1)}, {"is_causal": False}):
        with pytest.raises(TypeError, match="does not know"):
            attend_rows(None, *tensors, **option)
