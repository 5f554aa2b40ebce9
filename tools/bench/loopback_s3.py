"""An S3 server on loopback behind a proxy that is slow and breaks off, as a network is.

moto's server keeps objects in memory; the proxy before it waits before every request and cuts every so-many-th answer
in its middle. A request whose sender was killed is dropped, as S3 drops it. Cost: about 10 ms of CPU per request.
"""

from __future__ import annotations

import http.client
import itertools
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tools.own_process import own_command

KEYS = {
    "AWS_ACCESS_KEY_ID": "test-id",
    "AWS_SECRET_ACCESS_KEY": "not-to-be-written-anywhere",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_OF_ONE_HOP = ("transfer-encoding", "connection", "expect", "content-length")


_SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
server.stop()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """Yield the address of an S3 server in a process of its own: vLLM does not start beside imported Flask."""
    words = own_command("-c", _SERVER)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


class Proxy(ThreadingHTTPServer):
    """Passes requests on, each after `seconds`, and cuts every `break_every`-th answer."""

    daemon_threads = True

    def __init__(self, backend: str, seconds: float, break_every: int) -> None:
        """Listen on a free port; `backend` is an address."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = backend.removeprefix("http://")
        self.seconds, self.break_every = seconds, break_every
        self.count, self.broken = itertools.count(1), 0
        self.requests: list[str] = []
        """Method and path of each."""
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that are killed break their connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def _pass(self) -> None:
        body, is_whole = self._body()
        if not is_whole:
            self.close_connection = True
            return
        self.server.requests.append(f"{self.command} {self.path}")
        time.sleep(self.server.seconds)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_ONE_HOP}
        if body or self.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        onward = http.client.HTTPConnection(self.server.backend, timeout=60)
        onward.request(self.command, self.path, body or None, headers)
        answer = onward.getresponse()
        data = answer.read()
        cut = bool(self.server.break_every) and next(self.server.count) % self.server.break_every == 0
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _OF_ONE_HOP:
                self.send_header(name, value)
        said = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", said or str(len(data)))
        self.end_headers()
        if cut:
            self.server.broken += 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(data)
        onward.close()

    def _body(self) -> tuple[bytes, bool]:
        """Return what was sent, and whether it is all of it."""
        length = int(self.headers.get("Content-Length") or 0)
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            body = self.rfile.read(length)
            return body, len(body) == length
        body = b""
        while line := self.rfile.readline():
            piece = self.rfile.read(int(line.split(b";")[0], 16) + 2)
            if piece == b"\r\n":
                return body, True
            body += piece[:-2]
        return body, False

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815 - names of http.server

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[Any]:
    """Run a server for a while."""
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def slow_s3(bucket: str, seconds: float = 0.05, break_every: int = 50) -> Iterator[Proxy]:
    """Yield the proxy of a server with one bucket, to which this process and those that it starts send what goes to
    `s3://`.
    """
    from shared.remote.transfer import Remote, _filesystem

    before = {name: os.environ.get(name) for name in (*KEYS, "AWS_ENDPOINT_URL")}
    with s3_server() as address, serving(Proxy(address, seconds, break_every)) as proxy:
        os.environ |= {**KEYS, "AWS_ENDPOINT_URL": proxy.address}
        try:
            _filesystem.cache_clear()  # of an earlier server
            Remote(f"s3://{bucket}")._files().mkdir(bucket)
            yield proxy
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
