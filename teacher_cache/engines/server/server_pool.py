"""Many servers as one: the least busy one gets the next request, and one that fails rests before it is tried again.

    up --failure--> down until back-off is over --one thread checks it--> up

A failed exchange moves the request to another server. A server rests for a back-off that doubles with each failure in a
row, with jitter so that many builds do not return together; then a single thread checks it (address, model, probe)
before it gets work again. With no server up, everybody waits, at most `patience_seconds`. A request that broke several
servers or was answered in nonsense several times ends the job, because it would again. Cost: a lock around counters.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shared.errors import EngineError
from shared.recipe.sections.teacher import KEY_VARIABLE
from teacher_cache.engines.server.server_http import Answer, Server, TooLargeError
from teacher_cache.engines.server.server_stream import ServerDownError

logger = logging.getLogger(__name__)

MAX_FAILURES = 6
"""Of one request that was handed to a server, before it ends the job."""
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
FREE_VALUES = 2**20
"""Values that any answer may hold; they take some 60 MB."""
BYTES_PER_VALUE = 32
"""Beyond them, an answer that may have so many bytes more may hold one value more."""
BUSY = (408, 425, 429)
"""Statuses of a server that is well but will not take this request now."""

Parsed = TypeVar("Parsed")


class MalformedError(Exception):
    """An answer that is not what was asked for; asking again may help."""


class ClosedError(Exception):
    """The pool was closed while a request was waiting."""


@dataclass(slots=True)
class _State:
    server: Server
    in_flight: int = 0
    up: bool = False
    checking: bool = False
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    reason: str = "it was never asked"


class ServerPool:
    """Hands requests to servers; every method may be called from any thread."""

    def __init__(
        self,
        servers: Sequence[Server],
        check: Callable[[Server], None],
        *,
        requests_per_server: int,
        patience_seconds: float,
        first_backoff_seconds: float = FIRST_BACKOFF_SECONDS,
    ) -> None:
        """Take the servers, all of them down until checked.

        Args:
            servers: at least one.
            check: raises `ServerDownError` for a server that cannot work now, `EngineError` for one that never may.
            requests_per_server: in flight, at most.
            patience_seconds: longest wait with no server up.
            first_backoff_seconds: of a server that failed once.
        """
        self._states = [_State(server) for server in servers]
        self._check = check
        self._most = requests_per_server
        self._patience = patience_seconds
        self._first_backoff = first_backoff_seconds
        self._changed = threading.Condition()
        self._closed = False
        self._down_since: float | None = time.monotonic()
        """Since when no server is up; None where one is."""

    @property
    def capacity(self) -> int:
        """Requests that all servers together take."""
        return self._most * len(self._states)

    def check_all(self, should_stop: Callable[[], bool]) -> None:
        """Check every server once and wait until one is up.

        Raises:
            EngineError: none came up within the patience, or one may never be used.
            ClosedError: `should_stop` said so.
        """
        for state in self._states:
            with self._changed:
                if state.up or state.checking:
                    continue
                state.checking = True
            self._try(state)
        while self._down_since is not None:
            if should_stop():
                raise ClosedError
            self._step(0.5)

    def ask(self, path: str, body: Callable[[str], bytes], max_bytes: int, parse: Callable[[Any], Parsed]) -> Parsed:
        """Post a request to some server until one answers it, and return what `parse` makes of the answer's JSON.

        Args:
            path: below the server's root.
            body: makes the request for the server of that name.
            max_bytes: of the answer.
            parse: raises `MalformedError` for an answer that is not what was asked for.

        Raises:
            EngineError: it is refused, fails again and again, or no server is up for too long.
            ClosedError: the pool was closed.
        """
        failures, reason = 0, ""
        while failures < MAX_FAILURES:
            state = self._take()
            pause = 0.0
            try:
                answer = state.server.post(path, body(state.server.name), max_bytes)
                if answer.status == 200:
                    parsed = parse(read_json(answer.body, max_bytes))
                    self._well(state)
                    return parsed
                reason = f"status {answer.status}: {error_text(state.server, answer)}"
                if answer.status in BUSY:
                    pause = max(answer.retry_after_seconds, self._backoff(failures))
                elif answer.status >= 500:
                    self._failed(state, reason, answer.retry_after_seconds)
                else:
                    raise EngineError(f"{state.server.name}: a request was refused with {reason}{_hint(answer.status)}")
            except ServerDownError as error:
                reason = str(error)
                self._failed(state, reason)
            except (MalformedError, TooLargeError) as error:
                reason = f"it sent {state.server.shown(error)}"
                pause = self._backoff(failures)
            finally:
                self._give_back(state)
            failures += 1
            where = state.server.name
            self._pause(pause)
        raise EngineError(
            f"{where}: one request failed {failures} times, the last time because of this: {reason}; see the server's "
            "log, mend it, and run the same command again to continue"
        )

    def close(self) -> None:
        """Break off what is in flight and wake everybody who waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for state in self._states:
            state.server.close()

    def _take(self) -> _State:
        """Wait for a server with room and count a request there."""
        while True:
            with self._changed:
                if self._closed:
                    raise ClosedError
                free = [state for state in self._states if state.up and state.in_flight < self._most]
                if free:
                    chosen = min(free, key=lambda state: state.in_flight)
                    chosen.in_flight += 1
                    return chosen
            self._step(1.0)

    def _step(self, seconds: float) -> None:
        """Check a server whose rest is over, or wait a moment for a change.

        Raises:
            EngineError: no server was up for longer than the patience.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            now = time.monotonic()
            if self._down_since is not None and now - self._down_since > self._patience:
                told = "; ".join(f"{state.server.name}: {state.reason}" for state in self._states)
                raise EngineError(
                    f"no server was up for {self._patience:,.0f} seconds ({told}); start one, and run the command "
                    "again to continue"
                )
            due = next((s for s in self._states if not s.up and not s.checking and s.rests_until <= now), None)
            if due is None:
                ends = [s.rests_until - now for s in self._states if not s.up and not s.checking]
                self._changed.wait(max(0.01, min([seconds, *ends])))
                return
            due.checking = True
        self._try(due)

    def _try(self, state: _State) -> None:
        try:
            self._check(state.server)
        except ServerDownError as error:
            self._failed(state, str(error))
            return
        except TooLargeError as error:
            raise EngineError(f"{state.server.name}: sent {error}; expected the address of a vLLM server") from error
        finally:
            with self._changed:
                state.checking = False
                self._changed.notify_all()
        with self._changed:
            if state.failures > 1:
                logger.warning("%s is back", state.server.name)
            state.up, state.failures, self._down_since = True, 0, None
            self._changed.notify_all()

    def _failed(self, state: _State, reason: str, at_least_seconds: float = 0.0) -> None:
        with self._changed:
            if self._closed:
                return
            # Requests that were in flight when it died all fail at once; together they are one failure.
            if state.up or state.rests_until <= time.monotonic():
                state.up = False
                rest = max(self._backoff(state.failures), at_least_seconds)
                state.rests_until = time.monotonic() + rest
                state.failures += 1
                if state.failures == 1 or state.failures % 10 == 0:
                    logger.warning("%s is left out for now: %s", state.server.name, reason)
            state.reason = reason
            if self._down_since is None and not any(other.up for other in self._states):
                self._down_since = time.monotonic()
            self._changed.notify_all()

    def _well(self, state: _State) -> None:
        with self._changed:
            state.failures = 0

    def _give_back(self, state: _State) -> None:
        with self._changed:
            state.in_flight -= 1
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; a close ends it."""
        if seconds:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, seconds)

    def _backoff(self, failures: int) -> float:
        """Return seconds: doubling per failure, bounded, with a jitter of half of it."""
        return min(LONGEST_BACKOFF_SECONDS, self._first_backoff * 2.0 ** min(failures, 16)) * random.uniform(0.5, 1.5)


def error_text(server: Server, answer: Answer) -> str:
    """Return what a server says about an error, in at most 300 characters."""
    text = answer.body.decode("utf-8", "replace")
    try:
        document = json.loads(text)
        error = document.get("error", document)
        text = str(error.get("message", text) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        text = text or "no reason given"
    return server.shown(text)


def read_json(body: bytes, max_bytes: int) -> Any:
    """Return an answer's JSON, which may take no more memory than one that was asked for.

    Args:
        body: at most `max_bytes`.
        max_bytes: what the answer may have; a log-probability counts for a kilobyte of them and has eight values.

    Raises:
        MalformedError: it is none, or holds so many values that they would take far more memory than its text.
    """
    values = sum(map(body.count, (b",", b"[", b"{", b":")))
    if values > max(FREE_VALUES, max_bytes // BYTES_PER_VALUE):
        raise MalformedError(f"{values:,} values in an answer of {len(body):,} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"an answer that is no JSON ({type(error).__name__})") from error


def _hint(status: int) -> str:
    return f"; set {KEY_VARIABLE} to the server's API key" if status in (401, 403) else ""
