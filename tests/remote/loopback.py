"""A web server on loopback that breaks off."""

from __future__ import annotations

import importlib.util
import itertools
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


def needs_s3_server() -> None:
    """Skip a test where none is installed; nothing of it is imported here."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("no S3 server is installed (moto)")


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


def flipped(file: Path, place: float = 0.5) -> bytes:
    """Return a file's bytes with one bit flipped, at a place from 0 to 1."""
    data = file.read_bytes()
    at = int(place * len(data))
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
