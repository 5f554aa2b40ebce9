"""One HTTP exchange with one vLLM server: bounded in bytes, bounded in time as a whole, key never in a message.

httpcore speaks HTTP; the connection below it is ours (server_stream), because only there every byte and every pause is
seen. One connection per exchange: a request carries a whole sequence, so a kept connection would save nothing and could
be stale. While an answer is awaited, a silent server is asked for its health on a second connection, so a slow one is
waited for and a hung one is not. Proxies of the environment are not used. Cost: a thread that waits.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import urlsplit

import httpcore

from shared.errors import EngineError
from shared.recipe.sections.teacher import KEY_VARIABLE, address_problem
from teacher_cache.engines.server.server_stream import BoundedBackend, Patience, ServerDownError

SILENCE_SECONDS = 60.0
"""After this long without an answer a server is asked for its health."""
ANSWER_SECONDS = 4 * 3600.0
"""Longest wait for an answer to begin, healthy server or not."""
REST_SECONDS = 10.0
BYTES_PER_SECOND = 10**6
"""From the first byte to the last an answer may take `REST_SECONDS` and as long as its most bytes take at this rate."""
HEALTH_SECONDS = 10.0
MAX_ERROR_BYTES = 2**16
LOOPBACK = ("localhost", "127.0.0.1", "::1")


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
        raise EngineError(
            f"{KEY_VARIABLE} holds characters that no HTTP header may carry; expected a key of printable ASCII"
        )
    return key


@dataclass(slots=True)
class Server:
    """One server's address, and the connections that are open to it."""

    name: str
    """As in the recipe, ending in /v1."""
    scheme: str
    host: str
    port: int | None
    netloc: str
    """Host and port as in the address."""
    root: str
    """Path before /v1."""
    key: str | None = field(default=None, repr=False)
    silence_seconds: float = SILENCE_SECONDS
    _open: set[BoundedBackend] = field(default_factory=set)
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
        name = f"{parts.scheme}://{parts.netloc}{root}/v1"
        return cls(name, parts.scheme, host, parts.port, parts.netloc, root, key)

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
            exchanges = list(self._open)
        for exchange in exchanges:
            exchange.break_off()

    def shown(self, text: object, most: int = 300) -> str:
        """Return what a server said as it may be kept and shown: key blotted out, one printable line of `most`
        characters.
        """
        line = " ".join(self.without_key(str(text)).split())
        return "".join(letter if letter.isprintable() else "?" for letter in line)[:most]

    def without_key(self, text: str) -> str:
        """Return a text of the server with the key blotted out."""
        return text.replace(self.key, "***") if self.key else text

    def _exchange(self, method: str, path: str, body: bytes | None, max_bytes: int) -> Answer:
        rest = REST_SECONDS + max_bytes / BYTES_PER_SECOND
        return self._ask(
            method, path, body, max_bytes, Patience(ANSWER_SECONDS, rest, self.silence_seconds, self._require_health)
        )

    def _require_health(self) -> None:
        """Raise `ServerDownError` unless the server says within seconds that it is well."""
        patience = Patience(HEALTH_SECONDS, HEALTH_SECONDS, HEALTH_SECONDS, lambda: None)
        try:
            status = self._ask("GET", "/health", None, MAX_ERROR_BYTES, patience).status
        except (ServerDownError, TooLargeError) as error:
            raise ServerDownError("it accepts requests and answers none") from error
        if status >= 500:
            raise ServerDownError(f"it says with status {status} that it is not well")

    def _ask(self, method: str, path: str, body: bytes | None, max_bytes: int, patience: Patience) -> Answer:
        url = httpcore.URL(scheme=self.scheme, host=self.host, port=self.port, target=self.root + path)
        headers: dict[bytes | str, bytes | str] = {
            "Host": self.netloc,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if body is not None:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        context = _tls() if self.scheme == "https" else None
        backend = BoundedBackend(patience)
        try:
            with (
                self._kept_open(backend),
                httpcore.HTTPConnection(url.origin, ssl_context=context, network_backend=backend) as connection,
                connection.stream(method, url, headers=headers, content=body) as response,
            ):
                return _read(response, max_bytes)
        except (*_BROKEN, OSError, UnicodeError) as error:
            raise ServerDownError(self.shown(error, 200) or type(error).__name__) from error

    @contextmanager
    def _kept_open(self, backend: BoundedBackend) -> Iterator[None]:
        """Let `close` reach an exchange while it lasts."""
        with self._lock:
            if self._closed:
                raise ServerDownError("the engine is closed")
            self._open.add(backend)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(backend)


_BROKEN = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError)


@cache
def _tls() -> ssl.SSLContext:
    """Return the settings of encrypted connections, with the certificates that the system trusts."""
    return ssl.create_default_context()


def _read(response: httpcore.Response, max_bytes: int) -> Answer:
    """Read an answer of at most `max_bytes`, of an error its beginning only."""
    headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
    most = max_bytes if response.status == 200 else MAX_ERROR_BYTES
    announced = headers.get(b"content-length", "")
    if response.status == 200 and announced.isdecimal() and int(announced[:20]) > most:
        raise TooLargeError(f"an answer of {int(announced[:20]):,} bytes where at most {most:,} were expected")
    body = bytearray()
    for piece in response.iter_stream():
        body += piece
        if len(body) > most:
            break
    if len(body) > most and response.status == 200:
        raise TooLargeError(f"an answer of more than {most:,} bytes")
    return Answer(response.status, bytes(body[:most]), _retry_after(headers.get(b"retry-after")))


def _retry_after(value: str | None) -> float:
    """Return seconds, at most a minute; a date is not worth parsing."""
    return min(float(value), 60.0) if value is not None and value.isascii() and value.isdigit() else 0.0
