"""A web server that sends more than was asked for, or without end, takes no memory and gives no wrong bytes."""

from __future__ import annotations

import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shared.errors import CacheError, DamagedError
from shared.remote import transfer
from shared.remote.transfer import Remote

BODY = bytes(range(256)) * 4096
pytest.importorskip("aiohttp")


class Handler(BaseHTTPRequestHandler):
    attempts = 0

    def do_GET(self) -> None:
        if self.path.endswith("cut"):
            self.cut(*map(int, self.headers["Range"].removeprefix("bytes=").split("-")))
            return
        if self.path.endswith("silent"):
            self.silent()
            return
        self.send_response(404 if self.path.endswith("gone") else 200)  # and knows no ranges
        self.end_headers()
        if self.path.endswith("whole"):
            self.wfile.write(BODY)
        while self.path.endswith("endless"):
            self.wfile.write(BODY)

    def silent(self) -> None:
        """Send nothing the first time, half the second time, and all of it the third time."""
        Handler.attempts += 1
        if Handler.attempts == 1:
            time.sleep(5)
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[: len(BODY) // 2])
        self.wfile.flush()
        if Handler.attempts == 2:
            time.sleep(5)
        self.wfile.write(BODY[len(BODY) // 2 :])

    def cut(self, first: int, last: int) -> None:
        """Send half of a range the first time, other bytes the second time, and all of it the third time."""
        said = (first, last, last + 1) if Handler.attempts != 1 else (first + 1, last + 1, last + 2)
        Handler.attempts += 1
        data = BODY[said[0] : said[2]]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {said[0]}-{min(said[1], len(BODY) - 1)}/{len(BODY)}")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if Handler.attempts == 1 else data)

    def log_message(self, *args) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Say nothing: clients break their connections."""


@pytest.fixture
def remote():
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Remote(f"http://127.0.0.1:{server.server_address[1]}/demo")
    server.shutdown()


def test_a_small_file_without_end_is_refused_at_its_bound(remote):
    tracemalloc.start()
    with pytest.raises(DamagedError, match=r"demo/endless has more than 1,048,576 bytes"):
        remote.read("endless", 2**20)
    with pytest.raises(DamagedError, match=r"demo/files.json|demo/endless"):
        remote.read("endless", 2**22)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert remote.read("whole", len(BODY)) == BODY
    with pytest.raises(DamagedError, match="has more than"):
        remote.read("whole", len(BODY) - 1)


def test_a_range_of_a_server_that_knows_none_is_cut_from_what_it_sends(remote):
    for start, end in ((0, 10), (1000, 70_001), (len(BODY) - 3, len(BODY))):
        assert remote.read_range("whole", start, end) == BODY[start:end]
    assert remote.read_range("endless", 300_000, 300_100) == (BODY * 2)[300_000:300_100]


@pytest.mark.parametrize(("start", "end"), [(0, len(BODY) + 1), (70_000, 80_000)])
def test_a_range_that_ends_before_what_its_server_said_or_begins_elsewhere_is_asked_for_again(remote, start, end):
    Handler.attempts = 0
    if start:
        assert remote.read_range("cut", start, end) == BODY[start:end]
    else:
        assert remote.read("cut", len(BODY)) == BODY
    assert Handler.attempts == 3


def test_a_server_that_says_nothing_for_long_is_asked_again(remote, monkeypatch):
    monkeypatch.setattr(transfer, "_SILENT_SECONDS", 0.5)
    transfer._filesystem.cache_clear()
    Handler.attempts = 0
    started = time.monotonic()
    assert remote.read("silent", len(BODY)) == BODY
    assert Handler.attempts == 3
    assert time.monotonic() - started < 4
    transfer._filesystem.cache_clear()


def test_a_file_that_is_not_there_is_told_apart(remote, monkeypatch):
    monkeypatch.setattr("shared.remote.transfer.MOST_ATTEMPTS", 2)
    with pytest.raises(FileNotFoundError):
        remote.read("gone")
    with pytest.raises(CacheError, match="of 20 bytes came"):
        remote.read_range("whole", len(BODY) - 10, len(BODY) + 10)
