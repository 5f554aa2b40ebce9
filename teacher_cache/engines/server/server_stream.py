"""One connection to a server, bounded as a whole: what may be waited for is counted over the exchange and not per read.

    connect, handshake, send: CONNECT_SECONDS each | silence: as long as the server is well, at most `silent_seconds` |
    from the first byte of the answer to its last: `rest_seconds`

An answer is silent until a byte of it has been decrypted, so what TLS sends on its own account (session tickets) counts
as nothing. Every read looks at the clock, so that headers, interim answers, trailers and bodies that drip all end in
time.
Cost: a clock per read.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpcore

CONNECT_SECONDS = 10.0
"""Of connecting to one address, of TLS's handshake, and of each piece that is sent."""


class ServerDownError(Exception):
    """The server cannot be reached, broke off, or hangs; another may do better, and so may this one later."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one exchange may take."""

    silent_seconds: float
    """Until the answer begins."""
    rest_seconds: float
    """From its first byte to its last."""
    ask_after_seconds: float
    """A silence as long as this calls `ask`, and again after each such while."""
    ask: Callable[[], None]
    """Raises `ServerDownError` where the server is not well."""


class BoundedStream(httpcore.NetworkStream):
    """A connection whose reads share one deadline."""

    def __init__(self, stream: httpcore.NetworkStream, patience: Patience) -> None:
        """Take an open connection; the clock starts now."""
        self._stream, self._patience = stream, patience
        self._handle: socket.socket = stream.get_extra_info("socket").dup()  # TLS takes the first one over
        self._begun = False
        self._deadline = time.monotonic() + patience.silent_seconds

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what has come, after a wait within the bounds; `timeout` is that of one read and not used.

        Raises:
            ServerDownError: the time of the exchange is up, or the server says that it is not well.
        """
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise ServerDownError(self._too_slow())
            try:
                found = self._stream.read(max_bytes, min(left, self._patience.ask_after_seconds))
            except httpcore.ReadTimeout:
                if not self._begun and time.monotonic() < self._deadline:
                    self._patience.ask()
                continue
            if not self._begun:
                self._begun = True
                self._deadline = time.monotonic() + self._patience.rest_seconds
            return found

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send a piece of the request."""
        with self._at_most(CONNECT_SECONDS):
            self._stream.write(buffer, CONNECT_SECONDS)
        if not self._begun:
            self._deadline = time.monotonic() + self._patience.silent_seconds

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Return the encrypted connection."""
        with self._at_most(CONNECT_SECONDS):
            self._stream = self._stream.start_tls(ssl_context, server_hostname, CONNECT_SECONDS)
        return self

    def close(self) -> None:
        """Close the connection."""
        self._handle.close()
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection says about itself."""
        return self._stream.get_extra_info(info)

    def break_off(self) -> None:
        """Let whoever waits here fail at once; safe from any thread."""
        with suppress(OSError):  # it broke off by itself
            self._handle.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _at_most(self, seconds: float) -> Iterator[None]:
        """Break the connection off where the body takes longer."""
        timer = threading.Timer(seconds, self.break_off)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _too_slow(self) -> str:
        if self._begun:
            return f"its answer was not complete {self._patience.rest_seconds:,.0f} seconds after its first byte"
        return f"no answer within {self._patience.silent_seconds:,.0f} seconds"


class BoundedBackend(httpcore.NetworkBackend):
    """Opens the connections of one exchange and remembers the last, so that it can be broken off."""

    def __init__(self, patience: Patience) -> None:
        """Give every connection this patience."""
        self._patience = patience
        self._opened: BoundedStream | None = None

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Return a connection."""
        stream = httpcore.SyncBackend().connect_tcp(host, port, CONNECT_SECONDS, local_address, socket_options)
        self._opened = BoundedStream(stream, self._patience)
        return self._opened

    def break_off(self) -> None:
        """Let whoever waits on the connection fail at once."""
        if self._opened is not None:
            self._opened.break_off()
