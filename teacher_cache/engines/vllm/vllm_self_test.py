"""Find out, on a short probe, which capture path of the running vLLM can be trusted.

1. Score the probe the stock way (flat lists), then with arrays, at full width: equal, or arrays stay off.
2. Switch the tail plug-in on, score the probe again, and recompute its head and tails from the full-width rows in
   float64 numpy: equal within `TOLERANCE_NATS`, or the plug-in stays off. The same in a batch with long prompts that
   are cut over passes (vllm_batch_test), and the draws of both.
3. Without the plug-in, plain top-k columns still do where only temperature 1 and no draws are asked; anything else is
   refused.

Before, the probe with another second half: a model that reads a whole prompt in both directions, as vLLM's HRM-Text
does, would say of each token what it has seen.

Cost: four prefills of 24 tokens, and those of vllm_batch_test.

Shape letters: P positions of the probe, V entries of the model's head, K head entries, J temperatures, m draws.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineError
from shared.models.no_numbers import NO_NUMBERS
from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.vllm import vllm_arrays
from teacher_cache.engines.vllm.vllm_batch_test import Columns, batch_problem, draws_problem, head_entries, long_prompts

logger = logging.getLogger(__name__)

PROBE_TOKENS = 24
TOLERANCE_NATS = 0.01
SEEN = 0.1
"""Mean difference of log-probabilities, over their standard deviation, that no kernel's rounding makes."""


def choose_capture_path(llm: Any, layout: ColumnLayout) -> str:
    """Switch on what works and return its name: "plugin+arrays", "plugin+flat", "stock+arrays" or "stock+flat".

    Raises:
        EngineError: the plug-in does not work and plain columns cannot hold what the layout asks for, or the model
            computes NaN.
    """
    probe = [int(token) for token in (np.arange(1, PROBE_TOKENS + 1, dtype=np.int64) * 7919) % layout.vocab_size]
    vllm_arrays.uninstall()
    flat_ids, flat_logprobs = _score(llm, probe, 4)
    if bool(np.isnan(flat_logprobs).any()):  # of infinite logits, too, which vLLM's own count does not see
        raise EngineError(NO_NUMBERS)
    reason = vllm_arrays.install()
    container = "arrays"
    dense = _dense(*_score(llm, probe, -1))
    if reason is None and not np.allclose(np.take_along_axis(dense, flat_ids, 1), flat_logprobs, atol=TOLERANCE_NATS):
        reason = "its arrays differ from its lists"
    if reason is not None:
        logger.warning("vLLM's log-probabilities are read from lists, which is about 30 times slower: %s", reason)
        vllm_arrays.uninstall()
        container = "flat"
        dense = _dense(*_score(llm, probe, -1))
    _refuse_what_follows(llm, layout, probe, dense)
    problem = _try_plugin(llm, layout, probe, dense) or _try_batch(llm, layout, probe, dense)
    if problem is None:
        return f"plugin+{container}"
    llm.collective_rpc("decant_capture", args=(None,))
    if not layout.stock_columns_suffice:
        raise EngineError(
            f"this vLLM cannot capture tails at temperatures {list(layout.temperatures)} with {layout.num_draws} draws "
            f"({problem}); use capture.temperatures [1.0] without draws, or teacher.engine transformers"
        )
    logger.warning("the tail is taken as 1 minus the head's sum, which is exact to about 1e-7: %s", problem)
    return f"stock+{container}"


def _refuse_what_follows(llm: Any, layout: ColumnLayout, probe: list[int], dense: NDArray[np.float64]) -> None:
    """Refuse a model whose rows [P, V] of the probe's first half depend on its second half.

    Raises:
        EngineError: it is no causal language model here.
    """
    half = PROBE_TOKENS // 2
    other = [*probe[:half], *((token + layout.vocab_size // 2) % layout.vocab_size for token in probe[half:])]
    rows, others = dense[: half - 1], _dense(*_score(llm, other, -1))[: half - 1]
    both = np.isfinite(rows) & np.isfinite(others)
    if float(np.abs(rows[both] - others[both]).mean()) > SEEN * float(rows[both].std()):
        raise EngineError(
            "vLLM lets the tokens of a prompt see what comes after them in this model, so what it says of the next one "
            "is no prediction; set teacher.engine to transformers, or choose a causal language model as teacher"
        )


def scoring_parameters(num_logprobs: int) -> Any:
    """Return vLLM's parameters of a request that scores its prompt with this many columns besides the label."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=num_logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _score(llm: Any, probe: list[int], num_logprobs: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    return _score_together(llm, [probe], num_logprobs)[0]


def _score_together(llm: Any, prompts: list[list[int]], num_logprobs: int) -> list[Columns]:
    """Return ids and natural logs of the rows of prompts that are given to vLLM at once."""
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(f"decant-probe-{i}", {"prompt_token_ids": prompt}, scoring_parameters(num_logprobs))
    finished: dict[str, Any] = {}
    while len(finished) < len(prompts):
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    width = 1 + (num_logprobs if num_logprobs >= 0 else llm.model_config.get_vocab_size())
    outputs = [finished[f"decant-probe-{i}"] for i in range(len(prompts))]
    return [vllm_arrays.columns_of(output.prompt_logprobs, width) for output in outputs]


def _dense(ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return [P, V] natural logs of full-width rows."""
    dense = np.full((len(ids), ids.shape[1] - 1), -np.inf)
    np.put_along_axis(dense, ids[:, 1:].astype(np.int64), logprobs[:, 1:].astype(np.float64), 1)
    return dense


def _try_plugin(llm: Any, layout: ColumnLayout, probe: list[int], dense: NDArray[np.float64]) -> str | None:
    """Switch the plug-in on in every worker and return what is wrong with it, or None."""
    statuses = llm.collective_rpc("decant_capture", args=(layout.to_plain(),))
    for status in statuses:
        if status["installed"] != "yes":
            return f"its {status['runner']} runner cannot be extended: {status['installed']}"
    ids, values = _score(llm, probe, layout.num_extra)
    return plugin_problem(ids, values, dense, layout) or draws_problem(ids, dense, layout)


def _try_batch(llm: Any, layout: ColumnLayout, probe: list[int], dense: NDArray[np.float64]) -> str | None:
    """Score long prompts together with the probe and return what is wrong with their rows, or None."""
    (status, *_) = llm.collective_rpc("decant_capture", args=(None,))
    config = llm.llm_engine.vllm_config
    batch_tokens, dtype = config.scheduler_config.max_num_batched_tokens, str(config.model_config.dtype).split(".")[-1]
    longest = config.model_config.max_model_len - 1
    prompts = long_prompts(status["runner"], longest, batch_tokens, layout.vocab_size)
    stock = _score(llm, prompts[0], max(layout.num_head, 1))
    stock = stock[0][:, : 1 + layout.num_head], stock[1][:, : 1 + layout.num_head]
    llm.collective_rpc("decant_capture", args=(layout.to_plain(),))
    *found, (ids, values) = _score_together(llm, [*prompts, probe], layout.num_extra)
    problems = [batch_problem(columns, stock, prompts[0], layout, dtype) for columns in found]
    problems.append(draws_problem(ids, dense, layout))
    if dtype == "float32":
        problems.append(plugin_problem(ids, values, dense, layout))
    return next((problem for problem in problems if problem is not None), None)


def plugin_problem(
    ids: NDArray[np.int32], values: NDArray[np.float32], dense: NDArray[np.float64], layout: ColumnLayout
) -> str | None:
    """Compare rows that the plug-in filled with full-width rows [P, V] and say what differs, or None."""
    if not (ids[:, layout.tail_start : layout.draw_start] == np.asarray(layout.sentinels)).all():
        return "its rows do not carry the sentinels"
    head = ids[:, 1 : layout.tail_start].astype(np.int64)
    kept = head >= 0
    in_head = head_entries(ids, dense.shape, layout)
    found = values[:, 1 : layout.tail_start].astype(np.float64)
    if not np.allclose(np.take_along_axis(dense, np.maximum(head, 0), 1)[kept], found[kept], atol=TOLERANCE_NATS):
        return "its head differs from the full rows"
    outside = np.where(in_head, -np.inf, dense)[:, : layout.vocab_size].max(-1, keepdims=True)
    if bool((kept & (found < outside - TOLERANCE_NATS))[:, : layout.num_head].any()):
        return "its head leaves out more probable tokens"
    for j, temperature in enumerate(layout.temperatures):
        scaled = np.exp((dense - dense.max(-1, keepdims=True)) / temperature)
        with np.errstate(divide="ignore"):
            expected = np.log((scaled * ~in_head).sum(-1) / scaled.sum(-1))
        found = values[:, layout.tail_start + j].astype(np.float64)
        if not np.allclose(np.maximum(found, -30), np.maximum(expected, -30), atol=TOLERANCE_NATS):
            worst = float(np.abs(np.maximum(found, -30) - np.maximum(expected, -30)).max())
            return f"its tails at temperature {temperature:g} are up to {worst:.3g} nats off"
    drawn = ids[:, layout.draw_start :].astype(np.int64)
    if drawn.size and bool((np.take_along_axis(in_head, np.maximum(drawn, 0), 1) & (drawn >= 0)).any()):
        return "it drew tokens of the head"
    return None
