"""Servers on loopback: S3, and a proxy before it that is slow and breaks off."""

from __future__ import annotations

import http.client
import itertools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

KEYS = {
    "AWS_ACCESS_KEY_ID": "test-id",
    "AWS_SECRET_ACCESS_KEY": "not-to-be-written-anywhere",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """Yield the address of an S3 server, moto's."""
    server = pytest.importorskip("moto.server", reason="no S3 server is installed (moto)")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        running.stop()


class Proxy(ThreadingHTTPServer):
    """Passes requests on; `seconds` of delay each, every `break_every`-th answer cut."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, backend: str, seconds: float = 0.0, break_every: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = backend.removeprefix("http://")
        self.seconds, self.break_every = seconds, break_every
        self.requests: list[tuple[str, str]] = []
        self.count = itertools.count(1)
        self.broken = 0
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Say nothing: clients that are killed break their connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass(self) -> None:
        length = self.headers.get("Content-Length")
        if length is not None:
            body = self.rfile.read(int(length))
        elif "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = b""
        self.server.requests.append((self.command, self.path))
        time.sleep(self.server.seconds)
        dropped = ("transfer-encoding", "connection", "expect", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        if body or self.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        onward = http.client.HTTPConnection(self.server.backend, timeout=60)
        onward.request(self.command, self.path, body or None, headers)
        answer = onward.getresponse()
        data = answer.read()
        number = next(self.server.count)
        cut = bool(self.server.break_every) and number % self.server.break_every == 0
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
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

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

    def log_message(self, *args) -> None:
        pass


class WebServer(ThreadingHTTPServer):
    """Serves the files of a directory, with ranges, as a web server does."""

    daemon_threads = True

    def __init__(self, directory: Path, break_every: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _FileHandler)
        self.directory, self.break_every = directory, break_every
        self.requests: list[str] = []
        self.count = itertools.count(1)
        self.broken = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/demo"

    def handle_error(self, request, client_address) -> None:
        """Say nothing: clients that are killed break their connections."""


class _FileHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_GET(self) -> None:
        name = self.path.removeprefix("/demo/")
        self.server.requests.append(name)
        file = self.server.directory / name
        found = file.is_file() and ".." not in name
        data = file.read_bytes() if found else b"no"
        ranged = self.headers.get("Range", "").removeprefix("bytes=").split("-")
        if found and len(ranged) == 2:
            data = data[int(ranged[0]) : int(ranged[1]) + 1 if ranged[1] else None]
        self.send_response_only(404 if not found else 206 if len(ranged) == 2 else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.server.break_every and next(self.server.count) % self.server.break_every == 0:
            self.server.broken += 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[ThreadingHTTPServer]:
    """Run a server for a while."""
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def flipped(file: Path, place: float = 0.5) -> bytes:
    """Return a file's bytes with one bit flipped, at a place from 0 to 1."""
    data = file.read_bytes()
    at = int(place * len(data))
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def client(address: str):
    """Return boto's own client."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=address, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
    )


def upload(address: str, bucket: str, folder: Path, prefix: str) -> None:
    """Put the files of a folder into a bucket, which is made."""
    s3 = client(address)
    s3.create_bucket(Bucket=bucket)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            s3.put_object(Bucket=bucket, Key=f"{prefix}/{file.relative_to(folder)}", Body=file.read_bytes())
