"""The GPU runner's hook, on the CPU: vLLM's own batching and chunking code with its two Triton kernels replaced by
torch.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.columns.draw_keys import prefix_keys_of, salted
from teacher_cache.engines.columns.sparse_columns import targets_from_plugin
from teacher_cache.engines.columns.tail_columns import extend_columns
from teacher_cache.engines.vllm import vllm_arrays, vllm_tail

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

VOCAB, HIDDEN = 50, 8
LAYOUT = ColumnLayout(6, (1.0, 2.0), 3, 0.9, VOCAB - 2)


@pytest.fixture
def runner_module(monkeypatch):
    """vLLM's module with plain torch instead of Triton, and our hook on top; all of it undone afterwards."""
    import vllm.v1.worker.gpu.sample.prompt_logprob as module
    from vllm.v1.outputs import LogprobsTensors

    def topk_scores(logits, num_logprobs, sampled_token_ids, logits_mode=False):
        logprobs = logits.float().log_softmax(-1)
        ids = torch.cat([sampled_token_ids[:, None], logits.topk(num_logprobs).indices], 1)
        return LogprobsTensors(ids, logprobs.gather(1, ids), torch.zeros(len(ids), dtype=torch.int64))

    def next_token_ids(num_tokens, query_start_loc, idx_mapping, num_computed_tokens, all_token_ids):
        found = torch.zeros(num_tokens, dtype=torch.int64)
        for i, slot in enumerate(idx_mapping.tolist()):
            start, stop = query_start_loc[i].item(), query_start_loc[i + 1].item()
            first = num_computed_tokens[slot].item() + 1
            found[start:stop] = all_token_ids[slot, first : first + stop - start]
        return found

    monkeypatch.setattr(module, "compute_topk_scores", topk_scores)
    monkeypatch.setattr(module, "get_prompt_logprobs_token_ids", next_token_ids)
    monkeypatch.setattr(
        module.PromptLogprobsWorker, "compute_prompt_logprobs", module.PromptLogprobsWorker.compute_prompt_logprobs
    )
    monkeypatch.setattr(module, "CHUNK_SIZE", 7)
    vllm_tail._install_v2()
    yield module
    vllm_tail.switch_off()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_runner_rows_do_not_depend_on_batching_and_chunking(runner_module, monkeypatch, dtype):
    """Three prompts, one of them scored in two passes; every row equals what the full row and its own prefix give."""
    monkeypatch.setattr(vllm_tail, "_layout", LAYOUT)
    rng = np.random.default_rng(0)
    head = torch.from_numpy(rng.normal(size=(VOCAB, HIDDEN))).to(dtype)
    lengths = {"a": 9, "b": 20, "c": 5}
    slots = {"a": 3, "b": 0, "c": 2}
    all_token_ids = torch.from_numpy(rng.integers(0, VOCAB - 2, (4, 32)))
    hidden = {name: torch.from_numpy(rng.normal(size=(length, HIDDEN))).to(dtype) for name, length in lengths.items()}
    worker = runner_module.PromptLogprobsWorker(4, torch.device("cpu"))
    parameters = SimpleNamespace(prompt_logprobs=LAYOUT.num_extra, prompt_logprob_token_ids=None)
    for name, slot in slots.items():
        worker.add_request(name, slot, parameters)
    prompt_lens = np.zeros(4, np.int64)
    for name, slot in slots.items():
        prompt_lens[slot] = lengths[name]
    results = {}
    computed = dict.fromkeys(lengths, 0)
    for scheduled in ({"a": 9, "b": 11}, {"b": 9, "c": 5}):
        names = list(scheduled)
        starts = np.concatenate([[0], np.cumsum(list(scheduled.values()))])
        batch = SimpleNamespace(
            req_ids=names,
            idx_mapping_np=np.array([slots[n] for n in names]),
            idx_mapping=torch.tensor([slots[n] for n in names]),
            num_computed_prefill_tokens_np=np.array([computed[n] for n in names]),
            num_scheduled_tokens=np.array(list(scheduled.values())),
            prefill_len_np=np.array([lengths[n] for n in names]),
            query_start_loc_np=starts,
            query_start_loc=torch.from_numpy(starts),
            num_tokens=int(starts[-1]),
        )
        rows = torch.cat([hidden[n][computed[n] : computed[n] + scheduled[n]] for n in names])
        num_computed = torch.zeros(4, dtype=torch.int64)
        for n in names:
            num_computed[slots[n]] = computed[n]
        results |= worker.compute_prompt_logprobs(
            lambda h: h @ head.T, rows, batch, all_token_ids, num_computed, prompt_lens
        )
        for n in names:
            computed[n] += scheduled[n]
    assert set(results) == set(lengths)
    for name, found in results.items():
        length, tokens = lengths[name], all_token_ids[slots[name]]
        logits = hidden[name][: length - 1] @ head.T
        logprobs = logits.float().log_softmax(-1)
        labels = tokens[1:length]
        top = logits[:, : VOCAB - 2].topk(6).indices
        ids, values = extend_columns(
            logprobs,
            labels,
            logprobs.gather(1, labels[:, None])[:, 0],
            top,
            logprobs.gather(1, top),
            prefix_keys_of(tokens.numpy())[: length - 1],
            LAYOUT,
        )
        assert found.logprob_token_ids.tolist() == ids.tolist()
        assert torch.allclose(found.logprobs, values, atol=1e-5)
        targets = targets_from_plugin(found.logprob_token_ids.numpy().astype(np.int32), found.logprobs.numpy(), LAYOUT)
        assert targets.num_positions == length - 1


def test_rows_of_a_batch_are_keyed_by_their_own_prefix_and_the_salt_in_their_name():
    """Two requests with the same tokens, one of them salted and begun in an earlier pass, and one without a salt."""
    tokens = torch.arange(5, 17).repeat(3, 1)
    names = [
        vllm_tail.request_name(3, 2**62 + 5) + "-1b9ce0aa",
        vllm_tail.request_name(4, 9),
        vllm_tail.request_name(5, 0),
    ]
    batch = SimpleNamespace(
        req_ids=names,
        idx_mapping_np=np.array([2, 0, 1]),
        num_computed_prefill_tokens_np=np.array([4, 0, 0]),
        query_start_loc_np=np.array([0, 3, 8, 12]),
    )
    found = vllm_tail._batch_keys(batch, tokens)
    plain = prefix_keys_of(tokens[0].numpy())
    expected = [salted(plain[4:7], 2**62 + 5), salted(plain[:5], 9), plain[:4]]
    assert torch.equal(found, torch.cat(expected))
    assert not set(expected[1].tolist()) & set(plain.tolist())
    assert [vllm_tail.salt_of(name) for name in (*names, "decant-probe", "x-" + names[0])] == [2**62 + 5, 9, 0, 0, 0]


def test_other_widths_pass_through(runner_module, monkeypatch):
    monkeypatch.setattr(vllm_tail, "_layout", LAYOUT)
    logits = torch.randn(4, VOCAB)
    monkeypatch.setattr(vllm_tail, "_row_keys", torch.arange(9))
    found = runner_module.compute_topk_scores(logits, 5, torch.zeros(4, dtype=torch.int64), logits_mode=False)
    assert found.logprob_token_ids.shape == (4, 6)
    assert torch.equal(vllm_tail._row_keys, torch.arange(4, 9))


@pytest.mark.parametrize("target", ["compute_topk_scores", "compute_prompt_logprobs"])
def test_changed_signature_is_not_replaced(monkeypatch, target):
    import vllm.v1.worker.gpu.sample.prompt_logprob as module

    def changed(self, other):
        raise AssertionError

    owner = module if target == "compute_topk_scores" else module.PromptLogprobsWorker
    monkeypatch.setattr(owner, target, changed)
    assert vllm_tail._guarded(vllm_tail._install_v2).startswith("TypeError: ")
    assert getattr(owner, target) is changed


def test_arrays_replace_lists_for_requests_without_text_only():
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsTensors

    def processor(tokenizer=None):
        return LogprobsProcessor(tokenizer, None, [None], None, None, 2)

    rows = LogprobsTensors(torch.tensor([[4, 5, 6], [7, 8, 9]]), -torch.rand(2, 3), torch.tensor([1, 2]))
    stock = LogprobsProcessor._update_prompt_logprobs
    assert vllm_arrays.install() is None
    try:
        plain = processor()
        plain._update_prompt_logprobs(rows)
        ids, logprobs = vllm_arrays.columns_of(plain.prompt_logprobs, 3)
        assert ids.tolist() == rows.logprob_token_ids.tolist()
        assert np.array_equal(logprobs, rows.logprobs.numpy())
        plain._update_prompt_logprobs(rows)
        assert len(plain.pop_prompt_logprobs()) == 5
        with_text = processor(
            SimpleNamespace(decode=lambda ids: "x", convert_ids_to_tokens=lambda ids: ["x"] * len(ids))
        )
        with_text._update_prompt_logprobs(rows)
        assert list(with_text.prompt_logprobs[1]) == [4, 5, 6]
    finally:
        vllm_arrays.uninstall()
    assert LogprobsProcessor._update_prompt_logprobs is stock


def test_arrays_are_not_installed_on_another_signature(monkeypatch):
    from vllm.v1.engine.logprobs import LogprobsProcessor

    def changed(self, tensors, extra):
        raise AssertionError

    monkeypatch.setattr(LogprobsProcessor, "_update_prompt_logprobs", changed)
    assert "takes" in vllm_arrays.install()
    assert LogprobsProcessor._update_prompt_logprobs is changed
