"""The teacher behind one or more running `vllm serve` endpoints, by `/v1/completions`.

Requests are pulled lazily while there is room, posted by threads that each wait for one answer, and yielded as they
come.
What bounds memory: requests in flight per server, and log-probabilities in flight altogether. Seeds and token ids
travel with every request, so a server that dies and comes back changes nothing but time.
Cost: a server turns every log-probability into JSON text, which limits it to some thousand positions per second at K =
    64.
"""

from __future__ import annotations

import logging
import platform
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import DecantError, EngineError
from shared.models.end_tokens import declared_end_ids
from shared.recipe.recipe import Capture, Generate
from shared.recipe.sections.teacher import ServedTeacher
from shared.tokens.tokenizer_file import num_ids
from teacher_cache.engines.answer_ends import AnswerEnds
from teacher_cache.engines.columns.column_layout import ColumnLayout, required
from teacher_cache.engines.columns.sparse_columns import predicting_rows, targets_from_stock
from teacher_cache.engines.protocol import (
    FINISHED,
    Generated,
    GenerateRequest,
    Scored,
    ScoreRequest,
    require_scorable,
    room_of,
)
from teacher_cache.engines.server.server_answers import (
    generate_body,
    generate_bytes,
    read_answer,
    read_columns,
    score_body,
    score_bytes,
)
from teacher_cache.engines.server.server_check import ServerCheck
from teacher_cache.engines.server.server_http import Server, api_key
from teacher_cache.engines.server.server_pool import ClosedError, MalformedError, ServerPool

logger = logging.getLogger(__name__)

MAX_LOGPROBS_IN_FLIGHT = 2**23
"""About 600 MB of JSON; one request always goes."""
MAX_THREADS = 1024
PASSING_ENDS = ("abort", "error")
"""Ends of an answer that another try may not have: the server was told to stop, or lost a piece of its cache."""
TRIES_AGAIN = 2

Request = TypeVar("Request", GenerateRequest, ScoreRequest)
Result = TypeVar("Result", Generated, Scored)


class ServerEngine:
    """A teacher in other processes, reached over HTTP."""

    def __init__(
        self,
        teacher: ServedTeacher,
        capture: Capture | None,
        model_dir: Path,
        *,
        tokenizer: Any,
        should_stop: Callable[[], bool] = lambda: False,
        first_backoff_seconds: float = 0.5,
    ) -> None:
        """Find the servers and check them; waits while none is up.

        Args:
            teacher: with `servers`.
            capture: what `score` keeps; None where nothing will be scored.
            model_dir: the teacher's files here, for vocabulary and end tokens.
            tokenizer: the teacher's.
            should_stop: asked while waiting for servers; a stream that stops so ends early.
            first_backoff_seconds: rest of a server that failed once.

        Raises:
            EngineError: a server serves something else, or none is up for too long.
        """
        self.tokenizer = tokenizer
        self.vocab_size = num_ids(tokenizer)
        self._layout = None if capture is None else ColumnLayout.of(capture, self.vocab_size)
        self._declared_ends = declared_end_ids(model_dir)
        self._should_stop = should_stop
        key = api_key()
        servers = [Server.of(url, key) for url in teacher.servers]
        self._servers = [server.name for server in servers]
        self._shown = servers[0].shown
        for server in servers:
            if server.sends_key_in_clear:
                logger.warning("%s: the API key travels unencrypted; use https outside a trusted network", server.name)
        width = None if self._layout is None else self._layout.num_head
        self._check = ServerCheck(teacher, model_dir, tokenizer, self.vocab_size, width)
        self._pool = ServerPool(
            servers,
            self._check,
            requests_per_server=teacher.server_requests,
            patience_seconds=teacher.server_patience_seconds,
            first_backoff_seconds=first_backoff_seconds,
        )
        self._closed = False
        try:
            self._pool.check_all(should_stop)
        except ClosedError:
            self._closed = True  # asked to stop while waiting: streams are empty
        except DecantError:
            self.close()
            raise
        self.max_model_len: int = teacher.max_model_len or self._check.max_model_len or 2**31

    def generate(self, requests: Iterable[GenerateRequest], settings: Generate) -> Iterator[Generated]:
        """Answer each request once, as it finishes.

        Raises:
            EngineError: a prompt leaves no room for an answer, or no server answers.
        """
        ends = AnswerEnds.of(self.tokenizer, self._declared_ends, settings)

        def answer(request: GenerateRequest) -> Generated:
            """Ask the servers for one answer."""
            most = min(settings.max_new_tokens, room_of(request, self.max_model_len))
            again = iter(range(TRIES_AGAIN))

            def read(document: Any) -> tuple[list[int], str, bool]:
                found = read_answer(document, request.token_ids, most)
                if found[1] in PASSING_ENDS and next(again, None) is not None:
                    raise MalformedError(f"an answer that ended with {found[1]!r}")
                return found

            token_ids, reason, by_text = self._pool.ask(
                "/v1/completions",
                lambda server: generate_body(self._check.model_ids[server], request, most, ends, settings),
                generate_bytes(len(request.token_ids), most),
                read,
            )
            shown = reason if reason in FINISHED else self._shown(reason)  # it is kept with the row that is set aside
            return ends.answer(request, token_ids, shown, by_text=by_text)

        return self._stream(requests, answer, lambda request: 0)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scored]:
        """Score each request once, as it finishes.

        Raises:
            EngineError: the engine was opened without a capture, a sequence is too long, or no server answers.
        """
        layout = required(self._layout)

        def answer(request: ScoreRequest) -> Scored:
            """Ask the servers for the columns of one sequence."""
            require_scorable(request, self.max_model_len)
            token_ids = request.token_ids.tolist()
            ids, values = self._pool.ask(
                "/v1/completions",
                lambda server: score_body(self._check.model_ids[server], token_ids, layout.num_head),
                score_bytes(len(token_ids), layout.num_head),
                lambda document: read_columns(document, token_ids, layout.num_head),
            )
            rows = predicting_rows(request.spans)
            return Scored(request.tag, targets_from_stock(ids[rows], values[rows], layout))

        return self._stream(requests, answer, lambda request: len(request.token_ids) * (layout.num_head + 1))

    def _stream(
        self, requests: Iterable[Request], answer: Callable[[Request], Result], weigh: Callable[[Request], int]
    ) -> Iterator[Result]:
        """Keep requests in flight and yield results as they come."""
        if self._closed and not self._should_stop():
            raise EngineError("the engine is closed; open another")
        waiting: Iterator[Request] = iter(requests)
        work: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[Request, Result | BaseException]] = queue.SimpleQueue()
        capacity = min(self._pool.capacity, MAX_THREADS)
        threads = 0
        in_flight, weight, exhausted = 0, 0, False

        def serve() -> None:
            while (request := work.get()) is not None:
                try:
                    done.put((request, answer(request)))
                except BaseException as error:  # noqa: BLE001 - raised again where results are read
                    done.put((request, error))

        try:
            while not self._should_stop():
                while not exhausted and in_flight < capacity and (weight < MAX_LOGPROBS_IN_FLIGHT or not in_flight):
                    request = next(waiting, None)
                    if request is None:
                        exhausted = True
                        break
                    in_flight, weight = in_flight + 1, weight + weigh(request)
                    if threads < in_flight:
                        threads += 1
                        threading.Thread(target=serve, name=f"decant-server-{threads}", daemon=True).start()
                    work.put(request)
                if not in_flight:
                    return
                try:
                    finished, result = done.get(timeout=1.0)
                except queue.Empty:
                    continue  # look whether a stop was asked for
                in_flight, weight = in_flight - 1, weight - weigh(finished)
                if isinstance(result, ClosedError):
                    raise EngineError("the engine was closed while at work; open another")
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            if in_flight:
                self.close()  # nobody will read what is under way
            for _ in range(threads):
                work.put(None)

    def provenance(self) -> Mapping[str, Any]:
        """Say what ran."""
        return {
            "engine": "server",
            "servers": self._servers,
            "served_models": sorted(set(self._check.shown_ids.values())),
            "vllm": sorted(set(self._check.versions.values())),
            "python": platform.python_version(),
            "max_model_len": self.max_model_len,
            "seeds_honoured": True,
            "capture_path": "none" if self._layout is None else "prompt_logprobs, JSON",
        }

    def close(self) -> None:
        """Break off what is in flight; safe to call twice."""
        self._closed = True
        self._pool.close()
