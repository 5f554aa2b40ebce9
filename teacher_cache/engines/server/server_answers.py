"""Requests to `/v1/completions` of a vLLM server as JSON, and its answers as arrays.

Prompts go out as token ids and answers come back as token ids, so no text is tokenized on the way. A scored position is
an object `{id: {"logprob": ...}}` with the actual token and the top K, K + 1 entries or K where the token is among
them. Every sampling setting is sent, because a server fills what is left out from the model's generation_config.
Cost: about 1 microsecond per log-probability, in the thread that waited for the answer.

Shape letters: T tokens of a sequence, K columns besides the label.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineError
from shared.recipe.recipe import Generate
from teacher_cache.engines.answer_ends import AnswerEnds
from teacher_cache.engines.protocol import GenerateRequest
from teacher_cache.engines.server.server_pool import MalformedError

BASE_BYTES = 2**16
BYTES_PER_TOKEN = 256
"""Of an answer: its id, and its text, twice."""
BYTES_PER_LOGPROB = 1024
"""Id, log-probability, rank and the token's text with escapes; 70 are usual."""
NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
    "n": 1,
    "stream": False,
}
LARGEST_LOGPROB = 1e-3
"""Above this a number is no logarithm of a probability, whatever the rounding."""
LARGEST_MASS = 1.001
"""Above this probabilities are none, whatever the rounding."""


def generate_body(model: str, request: GenerateRequest, max_tokens: int, ends: AnswerEnds, settings: Generate) -> bytes:
    """Return the request for one answer of at most `max_tokens` tokens."""
    return _body(
        model,
        request.token_ids,
        max_tokens=max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=request.seed,
        stop=list(ends.texts),
        skip_special_tokens=False,
        stop_token_ids=list(ends.with_template(request.end_token_ids)),
    )


def score_body(model: str, token_ids: Sequence[int], num_logprobs: int) -> bytes:
    """Return the request for the distributions of one sequence; the one token that is sampled after it is not read."""
    return _body(model, token_ids, max_tokens=1, temperature=1.0, top_p=1.0, top_k=0, prompt_logprobs=num_logprobs)


def generate_bytes(num_prompt: int, max_tokens: int) -> int:
    """Return the most bytes that the answer to `generate_body` may have."""
    return BASE_BYTES + BYTES_PER_TOKEN * (num_prompt + max_tokens)


def score_bytes(num_tokens: int, num_logprobs: int) -> int:
    """Return the most bytes that the answer to `score_body` may have."""
    return BASE_BYTES + num_tokens * (BYTES_PER_TOKEN + BYTES_PER_LOGPROB * (num_logprobs + 1))


def read_answer(document: Any, token_ids: Sequence[int], max_tokens: int) -> tuple[list[int], str, bool]:
    """Return an answer's token ids, how the server calls its end, and whether a stop text ended it.

    Raises:
        MalformedError: the document holds no answer to these tokens.
        EngineError: the server cuts answers shorter than asked.
    """
    choice = _choice(document, token_ids)
    answer, reason = _ids(choice.get("token_ids")), choice.get("finish_reason")
    if not isinstance(reason, str) or not 0 <= len(answer) <= max_tokens:
        raise MalformedError(
            f"an answer of {len(answer)} tokens, at most {max_tokens} asked for, or one without an end"
        )
    if reason == "length" and len(answer) < max_tokens:
        raise EngineError(
            f"a server cut an answer after {len(answer):,} tokens where up to {max_tokens:,} were asked for; start it "
            "with --generation-config vllm, so that it sets no limit of its own"
        )
    return answer, reason, reason == "stop" and isinstance(choice.get("stop_reason"), str)


def read_columns(
    document: Any, token_ids: Sequence[int], num_logprobs: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return ids and natural logs [T - 1, 1 + K] of a scored sequence: the label, then the top K by descending value.

    Raises:
        MalformedError: rows are missing, have other widths or other tokens, or hold what is no log-probability.
    """
    rows = _choice(document, token_ids).get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(token_ids) or rows[0] is not None:
        raise MalformedError(f"no log-probabilities for the {len(token_ids)} tokens of a prompt")
    ids = np.empty((len(token_ids) - 1, 1 + num_logprobs), dtype=np.int32)
    values = np.empty(ids.shape, dtype=np.float32)
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        for i, (row, label) in enumerate(zip(rows[1:], token_ids[1:], strict=True)):
            _read_position(row, int(label), ids[i], values[i])
    if not bool(np.isfinite(values).all()):
        raise MalformedError("a log-probability beyond float32")
    if not bool((values <= LARGEST_LOGPROB).all()):
        raise MalformedError(
            f"{float(values.max()):.3g} as a log-probability; expected none above 0 (--logprobs-mode raw_logprobs)"
        )
    most = float(np.exp(values[:, 1:], dtype=np.float64).sum(-1).max(initial=0.0))
    if most > LARGEST_MASS:
        raise MalformedError(f"probabilities of one position that sum to {most:.3g} (--logprobs-mode raw_logprobs)")
    return ids, values


def _read_position(row: Any, label: int, ids: NDArray[np.int32], values: NDArray[np.float32]) -> None:
    """Fill one position's [1 + K] columns from the object of its entries."""
    try:
        found = [(-float(entry["logprob"]), int(token)) for token, entry in row.items()]
        own = -float(row[str(label)]["logprob"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise MalformedError(f"a position without the log-probability of its token ({type(error).__name__})") from error
    if any(value != value for value, _ in found):  # NaN has no place in an order
        raise MalformedError("a log-probability that is no number")
    if any(str(token) != key for (_, token), key in zip(found, row, strict=True)):  # '07' would be a second 7
        raise MalformedError("a token id that is not written as a decimal number")
    num_head = len(ids) - 1
    found.sort()
    if len(found) == num_head + 1:  # the actual token is not among the top K
        if own < found[-1][0]:
            raise MalformedError("a position with one entry too many")
        found.remove((own, label))
    if len(found) != num_head:
        raise MalformedError(f"{len(found)} log-probabilities for a position; expected {num_head}")
    if not 0 <= min((token for _, token in found), default=0) <= max((token for _, token in found), default=0) < 2**31:
        raise MalformedError("a token id out of range")
    ids[0], values[0] = label, -own
    ids[1:] = [token for _, token in found]
    values[1:] = [-value for value, _ in found]


def _body(model: str, token_ids: Sequence[int], **settings: Any) -> bytes:
    request: Mapping[str, Any] = {
        "model": model,
        "prompt": [int(token) for token in token_ids],
        "add_special_tokens": False,
        "return_token_ids": True,
        **NEUTRAL,
        **settings,
    }
    return json.dumps(request, separators=(",", ":")).encode()


def _choice(document: Any, token_ids: Sequence[int]) -> Mapping[str, Any]:
    try:
        (choice,) = document["choices"]
        sent = choice["prompt_token_ids"]
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError(f"no completion with token ids ({type(error).__name__})") from error
    if not isinstance(sent, list) or sent != [int(token) for token in token_ids]:
        raise MalformedError("the completion of another prompt")
    return dict(choice)


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise MalformedError("no token ids of an answer")
    return value
