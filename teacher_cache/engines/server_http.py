"""One HTTP exchange with one vLLM server: bounded in bytes, bounded in silence, key never in a message.

The standard library's client, one connection per exchange: a request carries a whole sequence, so a kept connection would save
nothing and could be stale. While an answer is awaited, a silent server is asked for its health on a second connection, so a
slow one is waited for and a hung one is not. Proxies of the environment are not used. Cost: a thread that waits.
"""

from __future__ import annotations

import http.client
import os
import selectors
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from shared.errors import EngineError
from shared.recipe_servers import KEY_VARIABLE, address_problem

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
"""Longest pause within an answer that has begun."""
SILENCE_SECONDS = 60.0
"""After this long without an answer a server is asked for its health."""
ANSWER_SECONDS = 4 * 3600.0
"""Longest wait for one answer, healthy server or not."""
CHUNK_BYTES = 2**20
MAX_ERROR_BYTES = 2**16
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ServerDownError(Exception):
    """The server cannot be reached, broke off, or hangs; another may do better, and so may this one later."""


class TooLargeError(Exception):
    """An answer is larger than the request allows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    body: bytes
    retry_after_seconds: float
    """As the server asks; 0 where it does not."""


def api_key() -> str | None:
    """Return the servers' key from the environment.

    Raises:
        EngineError: it cannot be a key; its text is not repeated.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise EngineError(f"{KEY_VARIABLE} holds characters that no HTTP header may carry; expected a key of printable ASCII")
    return key


@dataclass(slots=True)
class Server:
    """One server's address, and the connections that are open to it."""

    name: str
    """As in the recipe, ending in /v1."""
    scheme: str
    host: str
    port: int | None
    root: str
    """Path before /v1."""
    key: str | None = field(default=None, repr=False)
    silence_seconds: float = SILENCE_SECONDS
    _open: set[http.client.HTTPConnection] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Server:
        """Read an address.

        Raises:
            EngineError: it is none.
        """
        problem = address_problem(url)
        if problem is not None:
            raise EngineError(f"teacher.servers: {problem}")
        parts = urlsplit(url)
        root = parts.path.rstrip("/").removesuffix("/v1")
        host = str(parts.hostname)
        return cls(f"{parts.scheme}://{parts.netloc}{root}/v1", parts.scheme, host, parts.port, root, key)

    @property
    def sends_key_in_clear(self) -> bool:
        """Tell whether a key would travel unencrypted to another machine."""
        return self.key is not None and self.scheme == "http" and self.host not in LOOPBACK

    def get(self, path: str, max_bytes: int) -> Answer:
        """Exchange a GET; `path` is below the root, such as /v1/models."""
        return self._exchange("GET", path, None, max_bytes)

    def post(self, path: str, body: bytes, max_bytes: int) -> Answer:
        """Exchange a POST of JSON.

        Raises:
            ServerDownError: it cannot be reached, breaks off or hangs.
            TooLargeError: the answer has more than `max_bytes`.
        """
        return self._exchange("POST", path, body, max_bytes)

    def close(self) -> None:
        """Break off every exchange; those waiting raise `ServerDownError`."""
        with self._lock:
            self._closed = True
            connections = list(self._open)
        for connection in connections:
            if connection.sock is not None:
                try:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it broke off by itself

    def without_key(self, text: str) -> str:
        """Return a text of the server with the key blotted out."""
        return text.replace(self.key, "***") if self.key else text

    def _exchange(self, method: str, path: str, body: bytes | None, max_bytes: int) -> Answer:
        connection = self._connection()
        try:
            with self._lock:
                if self._closed:
                    raise ServerDownError("the engine is closed")
                self._open.add(connection)
            headers = {"Accept": "application/json", "Connection": "close"}
            if body is not None:
                headers["Content-Type"] = "application/json"
            if self.key is not None:
                headers["Authorization"] = f"Bearer {self.key}"
            connection.request(method, self.root + path, body, headers)
            assert connection.sock is not None
            self._await(connection.sock)
            connection.sock.settimeout(READ_SECONDS)
            return _read(connection.getresponse(), max_bytes)
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ServerDownError(self.without_key(reason)) from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self.scheme == "https":
            return http.client.HTTPSConnection(self.host, self.port, timeout=CONNECT_SECONDS, context=ssl.create_default_context())
        return http.client.HTTPConnection(self.host, self.port, timeout=CONNECT_SECONDS)

    def _await(self, sock: socket.socket) -> None:
        """Wait until the answer begins, as long as the server says that it is healthy."""
        deadline = time.monotonic() + ANSWER_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            while not selector.select(self.silence_seconds):
                if time.monotonic() > deadline:
                    raise ServerDownError(f"no answer within {ANSWER_SECONDS:,.0f} seconds")
                self._require_health()

    def _require_health(self) -> None:
        """Raise `ServerDownError` unless the server says within seconds that it is well."""
        connection = self._connection()
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        try:
            connection.request("GET", f"{self.root}/health", headers=headers)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            raise ServerDownError("it accepts requests and answers none") from error
        finally:
            connection.close()
        if status >= 500:
            raise ServerDownError(f"it says with status {status} that it is not well")


def _read(response: http.client.HTTPResponse, max_bytes: int) -> Answer:
    """Read an answer of at most `max_bytes`, of an error its beginning only."""
    most = max_bytes if response.status == 200 else MAX_ERROR_BYTES
    announced = response.length
    if response.status == 200 and announced is not None and announced > most:
        raise TooLargeError(f"an answer of {announced:,} bytes where at most {most:,} were expected")
    body = bytearray()
    while len(body) <= most:
        chunk = response.read(min(CHUNK_BYTES, most + 1 - len(body)))
        if not chunk:
            break
        body += chunk
    if len(body) > most and response.status == 200:
        raise TooLargeError(f"an answer of more than {most:,} bytes")
    if response.status == 200 and announced is not None and len(body) < announced:
        raise ServerDownError(f"it broke off after {len(body):,} of {announced:,} bytes")
    return Answer(response.status, bytes(body[:most]), _retry_after(response.getheader("Retry-After")))


def _retry_after(value: str | None) -> float:
    """Return seconds, at most a minute; a date is not worth parsing."""
    return min(float(value), 60.0) if value is not None and value.isascii() and value.isdigit() else 0.0
