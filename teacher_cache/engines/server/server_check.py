"""Is this server fit to speak for the teacher? Asked before its first request and whenever it comes back.

1. `/v1/models`: it serves the teacher (by name or by path), with an adapter where the recipe has one, and long enough
sequences.
2. `/tokenize` and `/detokenize`: a text of many kinds and ids spread over the vocabulary mean the same on both sides.
3. A probe of 24 tokens is scored: K columns are allowed; values are raw log-probabilities (none above 0, masses at most
   1, the label consistent); a head that was declared float32 shows no ties of 16-bit logits; and all servers agree on
   the probe.

What no server tells is its weights' type: `teacher.dtype` is the recipe's word. Cost: four small requests per server
and start.

Shape letters: P positions of the probe, K columns besides the label.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineError
from shared.recipe.recipe import Teacher
from teacher_cache.engines.server.server_answers import read_columns, score_body, score_bytes
from teacher_cache.engines.server.server_http import Answer, Server
from teacher_cache.engines.server.server_pool import MalformedError, error_text
from teacher_cache.engines.server.server_stream import ServerDownError

logger = logging.getLogger(__name__)

MAX_BYTES = 2**22
PROBE_TOKENS = 24
PROBE_TEXT = "A teacher writes: 3.14 × 2 = 6.28, naïve café; def f(x):\n\treturn x  # 你好, Привет 🙂 <|im_end|></s>"
VOCABULARY_SAMPLES = 512
MOST_TIES = 0.05
"""Share of neighbours in the top K that are equal to the bit: 16-bit heads tie in a tenth to a half, float32 heads
hardly ever.
"""
MOST_VARIATION = 0.1
"""Mean total variation between two servers' answers to the probe: rounding and kernels stay far below, other weights
above.
"""


@dataclass(slots=True)
class ServerCheck:
    """What every server is held against; safe to call from any thread."""

    teacher: Teacher
    model_dir: Path
    tokenizer: Any
    vocab_size: int
    num_logprobs: int | None
    """K; None where nothing will be scored."""
    model_ids: dict[str, str] = field(default_factory=dict)
    """By server: what requests call the model."""
    shown_ids: dict[str, str] = field(default_factory=dict)
    """By server: the same as it may be kept."""
    versions: dict[str, str] = field(default_factory=dict)
    max_model_len: int | None = None
    """Of the server that takes the shortest sequences, one token left for sampling."""
    _probe: tuple[str, NDArray[np.int32], NDArray[np.float32]] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, server: Server) -> None:
        """Check a server.

        Raises:
            ServerDownError: it cannot be asked now.
            EngineError: it must not be used.
        """
        with self._lock:
            cards = _cards(server)
            card = self._model_of(server, cards)
            name = str(card["id"])
            self.shown_ids[server.name] = server.shown(name)
            if self.model_ids.setdefault(server.name, name) != name:
                before, now = (server.shown(text, 80) for text in (self.model_ids[server.name], name))
                raise EngineError(f"{server.name}: served {before!r} before and {now!r} now; serve one model")
            self._check_length(server, card, cards)
            version = _document(server, server.get("/version", MAX_BYTES)).get("version", "unknown")
            self.versions[server.name] = server.shown(version, 40)
            self._check_vocabulary(server, name)
            if self.num_logprobs is not None:
                self._check_scores(server, name, self.num_logprobs)

    def _model_of(self, server: Server, cards: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the card of the teacher among the models that a server lists."""
        wanted, key = self.teacher.model, "teacher.model"
        names = _names(self.teacher.model) | _names(str(self.model_dir))
        if self.teacher.adapter is not None:
            wanted, key = self.teacher.adapter, "teacher.adapter"
            names = _names(self.teacher.adapter)
        for card in cards:
            if (card.get("parent") is not None) != (self.teacher.adapter is not None):
                continue
            if names & (_names(card["id"]) | _names(str(card.get("root")))):
                return card
        told = [(server.shown(card["id"], 80), server.shown(card.get("root"), 120)) for card in cards[:4]]
        found = ", ".join(f"{name!r} from {root!r}" for name, root in told) or "nothing"
        option = "--served-model-name" if self.teacher.adapter is None else "--lora-modules NAME=PATH"
        raise EngineError(
            f"{server.name}: serves {found} where {key} is {wanted!r}; start it with that model, or, if it is the same "
            f"one, let it say so with {option}"
        )

    def _check_length(self, server: Server, card: dict[str, Any], cards: list[dict[str, Any]]) -> None:
        """Hold the longest sequence against the recipe's; the card of an adapter has none, so its base
        model's counts.
        """
        base = next((other["max_model_len"] for other in cards if other.get("max_model_len")), None)
        length = card.get("max_model_len", base if card.get("parent") else None)
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise EngineError(
                f"{server.name}: does not say how long its sequences may be; expected a server started by `vllm serve`"
            )
        most = length - 1  # one token is sampled after a scored sequence
        if self.teacher.max_model_len is not None and most < self.teacher.max_model_len:
            raise EngineError(
                f"{server.name}: takes {length:,} tokens, one of them sampled, where {self.teacher.max_model_len:,} "
                f"were planned; start it with --max-model-len {self.teacher.max_model_len + 1}, or set "
                f"`teacher.max_model_len: {most}`"
            )
        self.max_model_len = most if self.max_model_len is None else min(most, self.max_model_len)

    def _check_vocabulary(self, server: Server, model: str) -> None:
        """Compare token ids of a text, and texts of token ids, with the tokenizer of `teacher.model`."""
        own = list(self.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"])
        request = {"model": model, "prompt": PROBE_TEXT, "add_special_tokens": False}
        answer = server.post("/tokenize", json.dumps(request).encode(), MAX_BYTES)
        if answer.status in (404, 405):
            logger.warning("%s: has no /tokenize, so its vocabulary is taken to be the teacher's unseen", server.name)
            return
        if _document(server, answer).get("tokens") != own:
            raise EngineError(
                f"{server.name}: splits a text into other tokens than the tokenizer of {self.teacher.model}; serve "
                "the same model"
            )
        ids = np.unique(np.linspace(0, self.vocab_size - 1, VOCABULARY_SAMPLES, dtype=np.int64)).tolist()
        request = {"model": model, "tokens": ids}
        told = _document(server, server.post("/detokenize", json.dumps(request).encode(), MAX_BYTES)).get("prompt")
        if told not in (self.tokenizer.decode(ids), self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)):
            raise EngineError(
                f"{server.name}: its token ids mean other texts than in the tokenizer of {self.teacher.model}; serve "
                "the same model"
            )

    def _check_scores(self, server: Server, model: str, num_logprobs: int) -> None:
        probe = [int(token) for token in (np.arange(1, PROBE_TOKENS + 1, dtype=np.int64) * 7919) % self.vocab_size]
        body, most_bytes = score_body(model, probe, num_logprobs), score_bytes(len(probe), num_logprobs)
        answer = server.post("/v1/completions", body, most_bytes)
        if answer.status == 400:
            raise EngineError(
                f"{server.name}: refuses {num_logprobs} log-probabilities per position ({error_text(server, answer)}); "
                f"start it with --max-logprobs {num_logprobs}"
            )
        try:
            ids, values = read_columns(_document(server, answer), probe, num_logprobs)
        except MalformedError as error:
            raise EngineError(
                f"{server.name}: answered a probe with {error}; expected a vLLM server with its usual settings"
            ) from error
        problem = scores_problem(ids, values, declared_float32=self.teacher.head_dtype == "float32")
        if problem is not None:
            raise EngineError(f"{server.name}: {problem}")
        if self._probe is None:
            self._probe = server.name, ids, values
        variation = total_variation(self._probe[1], self._probe[2], ids, values)
        if variation > MOST_VARIATION:
            raise EngineError(
                f"{server.name}: gives a probe probabilities that differ by {variation:.2f} (total variation) from "
                f"those of {self._probe[0]}; start every server with the same weights and settings, and again after "
                "a change"
            )


def scores_problem(ids: NDArray[np.int32], values: NDArray[np.float32], *, declared_float32: bool) -> str | None:
    """Say why [P, 1 + K] columns are no raw log-probabilities of the declared kind, or None."""
    head_ids, head = ids[:, 1:], values[:, 1:].astype(np.float64)
    inside = head_ids == ids[:, :1]
    if bool((inside & (np.abs(head - values[:, :1]) > 1e-4)).any()):
        return "gives the actual token two log-probabilities; expected a vLLM server with --logprobs-mode raw_logprobs"
    ties = float((head[:, 1:] == head[:, :-1]).mean()) if head.shape[1] > 1 else 0.0
    if declared_float32 and ties > MOST_TIES:
        return (
            f"{ties:.0%} of neighbouring log-probabilities tie, so its head runs in 16 bits where teacher.head_dtype "
            """is float32; start it with --hf-overrides '{"head_dtype": "float32"}', or write head_dtype: auto"""
        )
    return None


def total_variation(
    ids: NDArray[np.int32], values: NDArray[np.float32], other_ids: NDArray[np.int32], other_values: NDArray[np.float32]
) -> float:
    """Return the mean over positions of half the sum of |p - q| over both supports [P, 1 + K]; a token in one only
    counts fully.
    """
    distances = []
    for row in range(len(ids)):
        p = dict(zip(ids[row].tolist(), np.exp(values[row].astype(np.float64)).tolist(), strict=True))
        q = dict(zip(other_ids[row].tolist(), np.exp(other_values[row].astype(np.float64)).tolist(), strict=True))
        distances.append(sum(abs(p.get(token, 0.0) - q.get(token, 0.0)) for token in p.keys() | q.keys()) / 2)
    return float(np.mean(distances))


def _document(server: Server, answer: Answer) -> dict[str, Any]:
    if answer.status in (401, 403):
        raise EngineError(
            f"{server.name}: refuses access (status {answer.status}); set DECANT_SERVER_API_KEY to its API key"
        )
    if answer.status >= 500 or answer.status == 429:
        raise ServerDownError(f"status {answer.status}: {error_text(server, answer)}")
    if answer.status != 200:
        raise EngineError(
            f"{server.name}: answered with status {answer.status} ({error_text(server, answer)}); expected a vLLM "
            "server's address"
        )
    try:
        document = json.loads(answer.body)
    except (ValueError, RecursionError) as error:
        raise EngineError(
            f"{server.name}: answered with what is no JSON; expected the address of a vLLM server"
        ) from error
    if not isinstance(document, dict):
        raise EngineError(f"{server.name}: answered with no JSON object; expected the address of a vLLM server")
    return document


def _cards(server: Server) -> list[dict[str, Any]]:
    """Return the models that a server lists, those that have a name."""
    listed = _document(server, server.get("/v1/models", MAX_BYTES)).get("data")
    cards = listed if isinstance(listed, list) else []
    return [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]


def _names(text: str) -> set[str]:
    """Return by what a model may go: as written, as a real path, and its last part."""
    names = {text, text.rstrip("/").rsplit("/", 1)[-1]}
    try:
        return names | ({str(Path(text).resolve())} if Path(text).is_dir() else set())
    except (OSError, ValueError):  # too long for a path, or holding what no path can
        return names
