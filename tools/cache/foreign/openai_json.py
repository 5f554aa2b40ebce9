"""Answers of OpenAI-style servers as JSON lines: chat completions, completions, and vLLM's `prompt_logprobs`.

A line is a response body with its request beside it: `{"messages": [...], "choices": [...]}`, or
`{"request": {...}, "response": {...}}` (a batch's `body` inside either is looked into). Each choice is a row:

- chat: `logprobs.content[]` with `token`, `bytes`, `logprob` and `top_logprobs[]` of the same three;
- completions: `logprobs.tokens`, `token_logprobs` and `top_logprobs`, a map from text to log-probability per token
  (with `echo` those of the prompt come first, and are supervised, too);
- `prompt_logprobs`: per prompt token null (the first) or a map from id to `logprob`, the token's own among them.

Tokens are told by id where the server says it (`token_id:123`, keys of `prompt_logprobs`, `prompt_token_ids`), else by
`bytes`, else by text; an alternative whose text is torn (U+FFFD) is left out and counted. Set aside is an answer with
such a token, one without log-probabilities, an error in place of an answer, and a text that its tokens do not spell;
more than a share of them is refused before anything is made. The prompt is `prompt_token_ids`, else the rendered
`messages`, else the tokenized `prompt`. Whether values are the model's own or after the request's temperature and
filters is not in the answer: the tail is unknown unless the user says that they are raw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import CacheError, DamagedError, NamingError
from shared.parts.cache_files import list_folder, open_regular, parse_json
from shared.schema import MAX_TOKENS_PER_ROW
from shared.text.file_endings import ends_in
from shared.tokens.token_bytes import read_vocabulary
from teacher_cache.prompts.problems import THRESHOLD, accepting, too_many
from teacher_cache.prompts.templates.kept_text import squeezed
from tools.cache.foreign.foreign_row import ForeignRow, check_entries
from tools.cache.foreign.openai_request import rendered_messages

_MOST_LINE_BYTES = 2**28
_MOST_ENTRIES = 4096
_NOT_AMONG_TOP = -9998.0
"""What servers write for a token that is not among the most probable ones: -9999."""
_SAME = 0.01
"""Two log-probabilities of one token that differ by less are one."""
_MOST_DIGITS = 12
_TORN = "\ufffd"
_NO_LOGPROBS = "it has no top log-probabilities; ask the server for them (logprobs, top_logprobs)"
_THOUGHTS = ("reasoning_content", "reasoning")
_REASONS = {"stop": "stop", "length": "length"}


class UnreadableAnswerError(Exception):
    """An answer that is set aside; the message is the reason."""


class OpenAIReader:
    """Reads JSON lines of one file, or of every *.jsonl of a directory."""

    form = "OpenAI JSON"
    labels = "all"
    vocab_size: int | None = None

    def __init__(self, path: Path, tokenizer: Any, tokenizer_json: bytes, max_set_aside: float | None = None) -> None:
        """Look for the longest list of alternatives. Cost: one pass over the files.

        Raises:
            CacheError: no such files, a tokenizer whose tokens have no bytes, or more answers that cannot be used than
                the share `max_set_aside` (None: 1 percent).
            DamagedError: a line is no JSON.
        """
        self.tail = "unknown"
        self._files = [path / n for n in list_folder(path) if ends_in(n, ".jsonl")] if path.is_dir() else [path]
        if not self._files:
            raise NamingError(f"{path} holds no *.jsonl files; expected answers as JSON lines")
        self._tokenizer = tokenizer
        octets = read_vocabulary(tokenizer_json).octets
        self._ids = {spelled: i for i, spelled in reversed(list(enumerate(octets))) if spelled is not None}
        self._num_tokens = len(octets)
        self.set_aside: dict[str, int] = {}
        self._first_aside = ""
        self._torn = 0
        widths = [row.ids.shape[1] for row in self.rows()]
        self._refuse_many_aside(len(widths), THRESHOLD if max_set_aside is None else max_set_aside)
        self.k = max(widths, default=1)
        self.notes: dict[str, object] = {"alternatives left out for torn text": self._torn}

    def _refuse_many_aside(self, num_rows: int, most: float) -> None:
        aside = sum(self.set_aside.values())
        total = num_rows + aside
        if too_many(aside, total, most):
            others = f", or import the others with --max-set-aside {accepting(aside, total):g}" if num_rows else ""
            raise CacheError(
                f"{self._first_aside} ({aside:,} of {total:,} answers cannot be used, more than the {most:.1%} that "
                f"are set aside); correct them{others}"
            )

    def _put_aside(self, where: str, reason: str) -> None:
        self._first_aside = self._first_aside or f"{where}: {reason}"
        self.set_aside[reason] = self.set_aside.get(reason, 0) + 1

    def rows(self) -> Iterator[ForeignRow]:
        """Yield every answer; see `ForeignReader`. Those that cannot be used are counted in `set_aside`."""
        self.set_aside, self._torn = {}, 0
        for where, document in _lines(self._files):
            request, body = _request_and_body(document)
            if _is_error(document, body):
                self._put_aside(where, "the server answered with an error")
                continue
            choices = body.get("choices")
            if not isinstance(choices, list) or not choices:
                raise DamagedError(f"{where} has no choices; expected a response of an OpenAI-style server")
            spelled = cache(partial(self._spelled_prompt, where, request))
            for number, choice in enumerate(choices):
                place = f"{where} choice {number}" if len(choices) > 1 else where
                try:
                    yield self._row(place, request, body, choice, spelled)
                except UnreadableAnswerError as error:
                    self._put_aside(place, str(error))
                except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
                    raise DamagedError(
                        f"{place} is no answer with log-probabilities ({type(error).__name__}: {error})"
                    ) from None

    def _row(
        self,
        where: str,
        request: Mapping[str, Any],
        body: Mapping[str, Any],
        choice: Any,
        spelled: Callable[[], list[int]],
    ) -> ForeignRow:
        prompt_logprobs = choice.get("prompt_logprobs") or body.get("prompt_logprobs")
        prompt_ids, question, prompt = _prompt(request, body, choice, spelled)
        logprobs = choice.get("logprobs")
        tokens: list[tuple[int, float, dict[int, float]]] = []
        if logprobs and logprobs.get("content"):
            tokens = [self._of_chat(entry) for entry in logprobs["content"]]
        elif logprobs and logprobs.get("top_logprobs"):
            columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
            written = list(zip(*columns, strict=True))
            if written[0][1] is None:  # `echo`: the prompt comes again, its first token without a log-probability
                prompt_ids, written = [self._told(self._id(written[0][0], None))], written[1:]
            tokens = [self._of_completion(*each) for each in written]
        first, answer = len(prompt_ids), [token_id for token_id, _, _ in tokens]
        if prompt_logprobs:
            inside = _of_prompt(where, prompt_ids, prompt_logprobs)
            tokens, first = [*inside, *tokens], 1
        if not tokens:
            raise UnreadableAnswerError(_NO_LOGPROBS)
        if not prompt_ids:
            raise CacheError(
                f"{where} has no prompt beside its answer; write the request's messages or prompt into the line"
            )
        token_ids = [*prompt_ids[:first], *(token_id for token_id, _, _ in tokens)]
        width = max(len(named) for _, _, named in tokens)
        if width > _MOST_ENTRIES or len(token_ids) > MAX_TOKENS_PER_ROW:
            raise DamagedError(f"{where} has {len(token_ids):,} tokens of {width:,} alternatives; too many")
        check_entries(len(tokens), width, where)
        ids, values = np.full((len(tokens), width), -1, np.int64), np.full((len(tokens), width), -np.inf)
        for s, (_, _, named) in enumerate(tokens):
            ids[s, : len(named)], values[s, : len(named)] = list(named), list(named.values())
        said = choice.get("text")
        response = self._response(choice, answer) if answer else None if said is None else _text(said, "the answer")
        return ForeignRow(
            where,
            np.array(token_ids, np.int64),
            np.arange(first, len(token_ids)),
            ids,
            values,
            np.array([logprob for _, logprob, _ in tokens]),
            prompt,
            question,
            response,
            None,
            _REASONS.get(str(choice.get("finish_reason")), "given"),
        )

    def _response(self, choice: Mapping[str, Any], token_ids: list[int]) -> str | None:
        """Return an answer's text: as the server says it, or, where it took thoughts or calls of tools out of it, as
        its tokens spell it.
        """
        message = choice.get("message")
        message = message if isinstance(message, dict) else {"content": choice.get("text")}
        texts = [message.get(name) for name in ("content", *_THOUGHTS)]
        said, *thoughts = [None if text is None else _text(text, "the answer") for text in texts]
        spelled = str(self._tokenizer.decode(token_ids))
        plain = squeezed(spelled), squeezed(str(self._tokenizer.decode(token_ids, skip_special_tokens=True)))
        for text in (said, *thoughts):
            if (
                text
                and max(token_ids) < self._num_tokens
                and not any(squeezed(text.rstrip(_TORN)) in one for one in plain)
            ):
                raise UnreadableAnswerError("its text is not what its tokens spell in this tokenizer")
        return spelled if any((*thoughts, message.get("tool_calls"), message.get("function_call"))) else said

    def _spelled_prompt(self, where: str, request: Mapping[str, Any]) -> list[int]:
        """Return ids of a request's messages or text; none where it has neither. Cost: that of the tokenizer."""
        messages, prompt = request.get("messages"), request.get("prompt")
        if messages:
            return rendered_messages(self._tokenizer, where, request)
        if isinstance(prompt, str):
            return list(self._tokenizer(_text(prompt, "the prompt"), add_special_tokens=True)["input_ids"])
        return []

    def _of_chat(self, entry: Mapping[str, Any]) -> tuple[int, float, dict[int, float]]:
        """Return id, log-probability and alternatives of a token of a chat completion."""
        token_id = self._id(entry["token"], entry.get("bytes"))
        own = _logprob(entry["logprob"])
        return self._with_own(
            token_id, own, [(o["token"], o.get("bytes"), o["logprob"]) for o in entry["top_logprobs"]]
        )

    def _of_completion(
        self, token: str, own: Any, named: Mapping[str, Any] | None
    ) -> tuple[int, float, dict[int, float]]:
        """Return id, log-probability and alternatives of a token of a completion; it may have none."""
        others = [(text, None, p) for text, p in (named or {}).items()]
        return self._with_own(self._id(token, None), _logprob(own), others)

    def _with_own(
        self, token_id: int | None, own: float, others: Sequence[tuple[str, Any, Any]]
    ) -> tuple[int, float, dict[int, float]]:
        token_id = self._told(token_id)
        named: dict[int, float] = {}
        for text, spelled, logprob in others:
            other = self._id(text, spelled)
            if other is None:
                self._torn += 1
            elif other not in named and _logprob(logprob) > _NOT_AMONG_TOP:
                named[other] = _logprob(logprob)
        if own <= _NOT_AMONG_TOP:
            return token_id, named.get(token_id, float("nan")), named
        if abs(named.setdefault(token_id, own) - own) > _SAME:
            raise UnreadableAnswerError("a token of the answer has two log-probabilities")
        return token_id, own, named

    @staticmethod
    def _told(token_id: int | None) -> int:
        """Return an id that could be told."""
        if token_id is None:
            raise UnreadableAnswerError("a token of the answer is none of the tokenizer's")
        return token_id

    def _id(self, text: str, spelled: Any) -> int | None:
        """Return the id of a token by its own word, its bytes or its text; None where it is no token."""
        if text.startswith("token_id:"):
            return _decimal(text.removeprefix("token_id:"))
        if isinstance(spelled, list):
            return self._ids.get(bytes(spelled))
        return None if _TORN in text else self._ids.get(text.encode())


def _prompt(
    request: Mapping[str, Any], body: Mapping[str, Any], choice: Mapping[str, Any], spelled: Callable[[], list[int]]
) -> tuple[list[int], str | None, str | None]:
    """Return ids of the prompt, its first user turn and its text."""
    messages, prompt = request.get("messages"), request.get("prompt")
    question = next((m["content"] for m in messages if m["role"] == "user"), None) if messages else None
    if isinstance(question, list):
        question = "".join(part.get("text") or "" for part in question if isinstance(part, dict))
    texts = [_text(t, "the prompt") for t in (question, prompt) if isinstance(t, str)]
    known = choice.get("prompt_token_ids") or body.get("prompt_token_ids")
    if known is None and isinstance(prompt, list):
        known = prompt
    ids = spelled() if known is None else [_token_id(token_id) for token_id in known]
    return ids, *((texts[0], texts[0]) if texts else (None, None))


def _token_id(value: Any) -> int:
    """Return a token id that is written as a whole number."""
    if type(value) is not int:
        raise TypeError(f"a token id is {value!r:.40}, expected a whole number")
    return value


def _decimal(text: str) -> int:
    """Return a token id that is written as decimal digits."""
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < _MOST_DIGITS):
        raise ValueError(f"a token id is {text[:40]!r}, expected decimal digits")
    return int(text)


def _logprob(value: Any) -> float:
    """Return a log-probability that is written as a number."""
    if type(value) not in (int, float):
        raise TypeError(f"a log-probability is {value!r:.40}, expected a number")
    return float(value)


def _text(value: Any, what: str) -> str:
    """Return a text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is {value!r:.40}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half a surrogate pair at character {error.start}") from None
    return value


def _of_prompt(where: str, prompt_ids: Sequence[int], said: Sequence[Any]) -> list[tuple[int, float, dict[int, float]]]:
    """Return id, log-probability and alternatives of every prompt token but the first."""
    if len(said) != len(prompt_ids) or said[0] is not None:
        raise DamagedError(
            f"{where} has {len(prompt_ids)} prompt tokens and {len(said)} prompt_logprobs, of which the first is to be "
            "null; ask the server for prompt_token_ids too, or name the tokenizer that it had"
        )
    found = []
    for place, (token_id, named) in enumerate(zip(prompt_ids[1:], said[1:], strict=True), 1):
        values = {_decimal(key): _logprob(value["logprob"]) for key, value in named.items()}
        if token_id not in values:
            raise DamagedError(
                f"{where}: prompt token {place} is {token_id} and prompt_logprobs names {list(values)[:5]}; another "
                "tokenizer made them"
            )
        found.append((token_id, values[token_id], values))
    return found


def _lines(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        with open_regular(file) as source:
            number = 0
            while line := source.readline(_MOST_LINE_BYTES + 1):
                number += 1
                if len(line) > _MOST_LINE_BYTES:
                    raise DamagedError(f"{file}:{number} has more than {_MOST_LINE_BYTES:,} bytes")
                if line.strip():
                    yield f"{file}:{number}", parse_json(line, f"{file}:{number}")


def _is_error(document: Mapping[str, Any], body: Mapping[str, Any]) -> bool:
    """Tell whether a server, or a batch, says that there is no answer."""
    response = document.get("response", body)
    status = response.get("status_code") if isinstance(response, dict) else None
    failed = type(status) is int and not 200 <= status < 300
    return (
        bool(document.get("error") or body.get("error") or body.get("object") == "error") or failed or response is None
    )


def _request_and_body(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what was asked and what was answered, wherever the line keeps them."""

    def inner(value: Any) -> dict[str, Any]:
        value = value.get("body", value) if isinstance(value, dict) else {}
        return value if isinstance(value, dict) else {}

    body = inner(document["response"]) if "response" in document else document
    request = next((inner(document[name]) for name in ("request", "body") if name in document), document)
    return request, body
