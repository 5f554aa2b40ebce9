"""Worker side of vLLM: fill the columns of scored rows with exact tails at every captured temperature, and draws from
them.

Loaded into each worker through `worker_extension_cls` and switched on by `collective_rpc("decant_capture", ...)`. It
takes the place of stock top-k, label log-probability and rank while the full-width row still exists (see tail_columns).
Stock code runs unchanged whenever a request has another width or no layout is set.

- V1 runner (CPU, older GPUs): `Sampler.gather_logprobs`, while inside `GPUModelRunner._get_prompt_logprobs_dict`.
- V2 runner (GPU): the name `compute_topk_scores` in `vllm.v1.worker.gpu.sample.prompt_logprob`, while inside
  `PromptLogprobsWorker.compute_prompt_logprobs`; it gets logits in the model's type.

Both are replaced only where their signatures are the known ones. Draw keys come from the prompt's own tokens and its
row's salt, which travels in the request's name, so draws do not depend on how requests were batched or chunked.

Shape letters: P positions scored in one call, V entries of the model's head.
"""

from __future__ import annotations

import inspect
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.columns.draw_keys import prefix_keys, salted
from teacher_cache.engines.columns.tail_columns import extend_columns

_layout: ColumnLayout | None = None
_slices: deque[tuple[torch.Tensor, torch.Tensor]] | None = None
"""V1, while scoring: (labels [P], draw keys [P]) of each coming call, in order."""
_row_keys: torch.Tensor | None = None
"""V2, while scoring: draw keys of the rows still to come."""
_installed: dict[str, str] = {}
"""Runner -> "yes" or why not."""


_SALT = re.compile(r"decant-\d+-salt([0-9a-f]{16})(?![0-9a-f])")


def request_name(number: int, draw_salt: int) -> str:
    """Return the name of a request, which carries its row's salt to the workers; vLLM may append to it."""
    return f"decant-{number}-salt{draw_salt:016x}" if draw_salt else f"decant-{number}"


def salt_of(request_id: str) -> int:
    """Return the salt in a request's name, 0 where it has none.

    >>> salt_of(request_name(7, 255) + "-1b9ce0aa"), salt_of("decant-7")
    (255, 0)
    """
    found = _SALT.match(request_id)
    return 0 if found is None else int(found[1], 16)


class TailWorker:
    """Mixed into vLLM's worker class; its methods are called by name."""

    def decant_capture(self, plain_layout: dict[str, Any] | None) -> dict[str, Any]:
        """Set what scored rows hold (None: stock rows) and return what was installed."""
        global _layout
        for runner, install in (("v1", _install_v1), ("v2", _install_v2)):
            if runner not in _installed:
                _installed[runner] = _guarded(install)
        _layout = None if plain_layout is None else ColumnLayout.from_plain(plain_layout)
        runner = "v2" if getattr(self, "use_v2_model_runner", False) else "v1"
        return {"runner": runner, "installed": _installed[runner], "pid": os.getpid()}


def switch_off() -> None:
    """Let rows pass through again in this process, where an engine core ran inside it."""
    global _layout
    _layout = None


def _guarded(install: Callable[[], None]) -> str:
    """Install and return "yes", or the reason why a runner of this version cannot be extended."""
    try:
        install()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "yes"


def _expect_parameters(function: Callable[..., Any], *names: str) -> None:
    found = tuple(inspect.signature(function).parameters)
    if found[: len(names)] != names:
        raise TypeError(
            f"{function.__qualname__} takes {', '.join(found)}; expected it to begin with {', '.join(names)}"
        )


def _columns(
    scores: torch.Tensor, labels: torch.Tensor, lognorm: torch.Tensor, keys: torch.Tensor, layout: ColumnLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and values [P, 1 + layout.num_extra] of rows of [P, V] scores whose log-sum-exp is `lognorm` [P]."""
    head_scores, head_ids = scores[:, : layout.vocab_size].topk(layout.num_head, dim=-1)
    label_logprobs = scores.gather(1, labels[:, None])[:, 0].float() - lognorm
    head_logprobs = head_scores.float() - lognorm[:, None]
    return extend_columns(scores, labels, label_logprobs, head_ids, head_logprobs, keys.to(scores.device), layout)


def _install_v1() -> None:
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    stock_gather, stock_prompt = Sampler.gather_logprobs, GPUModelRunner._get_prompt_logprobs_dict
    _expect_parameters(stock_gather, "logprobs", "num_logprobs", "token_ids")
    _expect_parameters(stock_prompt, "self", "hidden_states", "num_scheduled_tokens")
    _expect_parameters(LogprobsTensors, "logprob_token_ids", "logprobs", "selected_token_ranks")

    def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
        """Return the columns of a slice that is scored for a cache, else what vLLM returns."""
        if _layout is None or _slices is None:
            return stock_gather(logprobs, num_logprobs, token_ids)
        labels, keys = _slices.popleft()
        if not torch.equal(labels, token_ids.cpu().to(torch.int64)):
            raise RuntimeError("vLLM scored prompts in another order than expected; draws cannot be keyed")
        if num_logprobs != _layout.num_extra:
            return stock_gather(logprobs, num_logprobs, token_ids)
        ids, values = _columns(logprobs, token_ids, logprobs.new_zeros(len(logprobs)), keys, _layout)
        return LogprobsTensors(ids.to(torch.int32), values, ids.new_zeros(len(ids)))

    def get_prompt_logprobs_dict(self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        global _slices
        _slices = deque(_scored_slices(self, num_scheduled_tokens)) if _layout is not None else None
        try:
            return stock_prompt(self, hidden_states, num_scheduled_tokens)
        finally:
            _slices = None

    Sampler.gather_logprobs = staticmethod(gather_logprobs)
    GPUModelRunner._get_prompt_logprobs_dict = get_prompt_logprobs_dict


def _scored_slices(runner: Any, num_scheduled_tokens: dict[str, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (labels, draw keys) of each slice of a prompt that this pass scores, in the V1 runner's order."""
    for request_id in runner.num_prompt_logprobs:
        num_tokens = num_scheduled_tokens.get(request_id)
        request = runner.requests[request_id] if num_tokens is not None else None
        if request is None or request.prompt_token_ids is None:
            continue
        token_ids = np.asarray(request.prompt_token_ids, dtype=np.int64)
        start = request.num_computed_tokens
        stop = min(start + num_tokens, len(token_ids) - 1)
        if stop > start:
            keys = prefix_keys(torch.from_numpy(token_ids))[start:stop]
            yield torch.from_numpy(token_ids[start + 1 : stop + 1]), salted(keys, salt_of(request_id))


def _install_v2() -> None:
    import vllm.v1.worker.gpu.sample.prompt_logprob as module

    stock_scores, stock_compute = module.compute_topk_scores, module.PromptLogprobsWorker.compute_prompt_logprobs
    _expect_parameters(stock_scores, "logits", "num_logprobs", "sampled_token_ids")
    _expect_parameters(stock_compute, "self", "logits_fn", "hidden_states", "input_batch", "all_token_ids")

    def compute_topk_scores(
        logits: torch.Tensor, num_logprobs: int, sampled_token_ids: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        """Return the columns of rows that are scored for a cache, else what vLLM returns."""
        global _row_keys
        if _layout is None or _row_keys is None:
            return stock_scores(logits, num_logprobs, sampled_token_ids, *rest, **named)
        keys, _row_keys = _row_keys[: len(logits)], _row_keys[len(logits) :]
        if num_logprobs != _layout.num_extra:
            return stock_scores(logits, num_logprobs, sampled_token_ids, *rest, **named)
        stock = stock_scores(logits, 0, sampled_token_ids, *rest, **named)
        labels = stock.logprob_token_ids[:, 0].to(torch.int64)
        lognorm = logits.gather(1, labels[:, None])[:, 0].float() - stock.logprobs[:, 0]
        ids, values = _columns(logits, labels, lognorm, keys, _layout)
        return stock._replace(logprob_token_ids=ids.to(stock.logprob_token_ids.dtype), logprobs=values)

    def compute_prompt_logprobs(
        self: Any,
        logits_fn: Any,
        hidden_states: torch.Tensor,
        input_batch: Any,
        all_token_ids: torch.Tensor,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """Key the draws of the rows that vLLM's own function scores."""
        global _row_keys
        scores = _layout is not None and bool(np.any(self.uses_prompt_logprobs[input_batch.idx_mapping_np]))
        _row_keys = _batch_keys(input_batch, all_token_ids) if scores else None
        try:
            return stock_compute(self, logits_fn, hidden_states, input_batch, all_token_ids, *rest, **named)
        finally:
            _row_keys = None

    module.compute_topk_scores = compute_topk_scores
    module.PromptLogprobsWorker.compute_prompt_logprobs = compute_prompt_logprobs


def _batch_keys(input_batch: Any, all_token_ids: torch.Tensor) -> torch.Tensor:
    """Return draw keys of every row of a V2 batch, from the tokens that each request has up to that row."""
    starts = np.asarray(input_batch.query_start_loc_np)[: len(input_batch.req_ids) + 1]
    computed = np.asarray(input_batch.num_computed_prefill_tokens_np)[: len(input_batch.req_ids)]
    lengths = np.diff(starts)
    request = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(int(starts[-1])) - starts[request] + computed[request]
    longest = min(int((computed + lengths).max()), all_token_ids.shape[1])
    slots = torch.as_tensor(
        np.asarray(input_batch.idx_mapping_np)[: len(lengths)].astype(np.int64), device=all_token_ids.device
    )
    keys = prefix_keys(all_token_ids[slots, :longest])
    rows = torch.as_tensor(request.astype(np.int64), device=keys.device)
    places = torch.as_tensor(np.minimum(place, longest - 1).astype(np.int64), device=keys.device)
    salts = torch.tensor([salt_of(name) for name in input_batch.req_ids], dtype=torch.int64, device=keys.device)
    return salted(keys[rows, places], salts[rows])
