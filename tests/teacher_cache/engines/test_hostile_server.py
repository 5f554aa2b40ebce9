"""What a server must not break: dripping, endless or senseless answers, an echoed key; and TLS, where silence is
silence too.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from shared.errors import EngineError
from shared.models.files import load_fast_tokenizer
from shared.recipe.recipe import Generate
from shared.recipe.sections.capture import TopCapture
from shared.recipe.sections.teacher import ServedTeacher
from teacher_cache.engines.protocol import GenerateRequest, ScoreRequest
from teacher_cache.engines.server import server_http, server_stream
from teacher_cache.engines.server.server_answers import generate_bytes, read_columns, score_bytes
from teacher_cache.engines.server.server_engine import ServerEngine
from teacher_cache.engines.server.server_http import Server, TooLargeError
from teacher_cache.engines.server.server_pool import MalformedError, read_json
from teacher_cache.engines.server.server_stream import ServerDownError
from tests.teacher_cache.engines.fake_vllm_server import FakeVllmServer, respond
from tests.tiny_models import make_tokenizer

KEY = "sk-secret-0123456789"
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@contextmanager
def raw_server(handle: Callable[[socket.socket], None]) -> Iterator[Server]:
    """Serve connections with `handle` once their request has come; /health is not told apart."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection:
                try:
                    connection.recv(65536)
                    handle(connection)
                except OSError:
                    return  # the client went away, as it should

        def accept() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield Server.of(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        listener.shutdown(socket.SHUT_RDWR)


def sends(start: bytes, again: bytes = b"", pause: float = 0.0) -> Callable[[socket.socket], None]:
    """Send `start` and then `again` for ever."""

    def handle(connection: socket.socket) -> None:
        connection.sendall(start)
        while again:
            connection.sendall(again)
            time.sleep(pause)

    return handle


@pytest.mark.parametrize(
    "handle",
    [
        sends(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        sends(OK + b"X: ", b"a", 0.05),
        sends(OK + b"X: ", b"a" * 1000),
        sends(OK + b"Content-Length: 1000\r\n\r\n", b" ", 0.05),
        sends(OK + b"\r\n", b" ", 0.05),
        sends(CHUNKED, b"1\r\n \r\n", 0.05),
        sends(CHUNKED, b"0", 0.05),
        sends(CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: y\r\n" * 1000),
        sends(CHUNKED + b"2\r\n{}\r\n0\r\nX: ", b"y", 0.05),
        sends(CHUNKED + b"-5\r\n{}\r\n"),
        sends(CHUNKED + b"zz\r\n{}\r\n"),
        sends(OK + b"Content-Length: -5\r\n\r\n{}"),
        sends(OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}"),
        sends(OK + b"Content-Length: 100\r\n\r\n{}"),
        sends(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
        sends(b"HTTP/1.1 abc\r\n\r\n"),
        sends(bytes(range(256)) * 100),
        sends(b""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ask", [lambda server: server.post("/v1/completions", b"{}", 1000), Server._require_health])
def test_exchange_that_never_ends_or_is_no_http_ends_in_time(handle, ask, monkeypatch):
    monkeypatch.setattr(server_http, "REST_SECONDS", 0.3)
    monkeypatch.setattr(server_http, "HEALTH_SECONDS", 0.3)
    with raw_server(handle) as server, pytest.raises((ServerDownError, TooLargeError)):
        ask(server)


def test_answer_that_comes_in_pieces_within_its_time_is_read(monkeypatch):
    monkeypatch.setattr(server_http, "REST_SECONDS", 60.0)

    def handle(connection: socket.socket) -> None:
        for piece in (b"HTTP/1.1 200", b" OK\r\nContent-Le", b"ngth: 4\r\n\r\n", b"{ ", b" }"):
            connection.sendall(piece)
            time.sleep(0.05)

    with raw_server(handle) as server:
        assert server.post("/v1/completions", b"{}", 1000).body == b"{  }"


def test_request_that_a_server_does_not_take_is_given_up(monkeypatch):
    monkeypatch.setattr(server_stream, "CONNECT_SECONDS", 0.3)
    with raw_server(lambda connection: time.sleep(5)) as server, pytest.raises(ServerDownError):
        server.silence_seconds = 0.1
        server.post("/v1/completions", bytes(2**25), 1000)


def test_close_breaks_off_an_exchange_that_waits():
    with raw_server(lambda connection: time.sleep(60)) as server:
        timer = threading.Timer(0.2, server.close)
        timer.start()
        with pytest.raises(ServerDownError):
            server.post("/v1/completions", b"{}", 1000)
        with pytest.raises(ServerDownError, match="closed"):
            server.get("/version", 1000)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A key and a certificate of 127.0.0.1 that it signs itself, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", str(path.with_name("cert.pem"))]
    subprocess.run(words, check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_name("cert.pem").read_bytes())
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "teacher"
    make_tokenizer(directory)
    (directory / "config.json").write_text(
        json.dumps({"vocab_size": 512, "max_position_embeddings": 512, "eos_token_id": 2})
    )
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_fast_tokenizer(model_dir, trust_remote_code=False)


@pytest.fixture
def fake(tokenizer, model_dir):
    fake = FakeVllmServer(tokenizer, str(model_dir))
    yield fake
    fake.stop()


@pytest.fixture
def tls_fake(tokenizer, model_dir, certificate, monkeypatch):
    """The fake server over TLS 1.3, whose tickets can be read as soon as the handshake is over."""
    fake = FakeVllmServer(tokenizer, str(model_dir), certificate=certificate)
    server_http._tls.cache_clear()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("cert.pem")))
    yield fake
    fake.stop()
    server_http._tls.cache_clear()


def test_slow_answer_over_tls_is_waited_for_while_the_server_is_well(tls_fake, monkeypatch):
    monkeypatch.setattr(server_http, "REST_SECONDS", 0.2)  # far less than the answer takes to begin
    tls_fake.seconds = 1.0
    server = Server.of(tls_fake.url)
    server.silence_seconds = 0.1
    body = json.dumps({"prompt": [1, 2, 3], "prompt_logprobs": 2}).encode()
    assert server.post("/v1/completions", body, 10**5).status == 200
    assert "/health" in tls_fake.paths
    tls_fake.get = lambda handler: respond(500, b"")(handler, b"")
    with pytest.raises(ServerDownError, match="not well"):
        server.post("/v1/completions", body, 10**5)


def test_build_over_tls_reads_the_same_scores(tls_fake, fake, model_dir, tokenizer):
    found = [scores(model_dir, tokenizer, server) for server in (tls_fake, fake)]
    np.testing.assert_array_equal(found[0].ids, found[1].ids)
    np.testing.assert_array_equal(found[0].logprobs, found[1].logprobs)


def test_certificate_that_nobody_trusts_and_plain_text_behind_https_are_named(tls_fake, fake, monkeypatch):
    with pytest.raises(ServerDownError, match=r"(?i)ssl"):
        Server.of(fake.url.replace("http:", "https:")).get("/version", 1000)
    monkeypatch.delenv("SSL_CERT_FILE")
    server_http._tls.cache_clear()
    with pytest.raises(ServerDownError, match="CERTIFICATE_VERIFY_FAILED"):
        Server.of(tls_fake.url).get("/version", 1000)


def test_close_breaks_off_an_exchange_over_tls(tls_fake):
    tls_fake.seconds = 30.0
    server = Server.of(tls_fake.url)
    threading.Timer(0.3, server.close).start()
    with pytest.raises(ServerDownError):
        server.post("/v1/completions", json.dumps({"prompt": [1]}).encode(), 1000)


def test_handshake_that_never_ends_is_given_up(monkeypatch, certificate):
    monkeypatch.setattr(server_stream, "CONNECT_SECONDS", 0.3)
    with raw_server(sends(b"\x16\x03\x03\x40\x00", b"\x02", 0.05)) as server, pytest.raises(ServerDownError):
        Server.of(server.name.replace("http:", "https:")).get("/version", 1000)


@pytest.mark.parametrize(
    "row",
    [
        {"7": {"logprob": -2.0}, "3": {"logprob": float("nan")}, "5": {"logprob": -1.0}},
        {"7": {"logprob": float("nan")}, "3": {"logprob": -1.0}, "5": {"logprob": -2.0}},
        {"7": {"logprob": "nan"}, "3": {"logprob": -1.0}},
        {"3": {"logprob": -1.0}, "7": {"logprob": -2.0}, "07": {"logprob": -3.0}},
        {"3": {"logprob": -1.0}, "7": {"logprob": -2.0}, " 5": {"logprob": -3.0}},
        {"3": {"logprob": -1.0}, "7": {"logprob": -2.0}, "1_0": {"logprob": -3.0}},
        {"3": {"logprob": -1.0}, "7": {"logprob": -2.0}, "-5": {"logprob": -3.0}},
        {"3": {"logprob": -1.0}, "7": {"logprob": -2.0}, "9" * 5000: {"logprob": -3.0}},
        {"3": {"logprob": -1.0}, "7": {"logprob": float("-inf")}},
        {"3": {"logprob": -1.0}, "7": {"logprob": -1e300}},
        {"3": {"logprob": -1.0}, "7": {"logprob": -(10**400)}},
        {"3": {"logprob": -0.1}, "7": {"logprob": -0.2}},
    ],
)
def test_position_that_holds_no_log_probabilities_is_malformed(row):
    with pytest.raises(MalformedError):
        read_columns({"choices": [{"prompt_token_ids": [9, 3], "prompt_logprobs": [None, row]}]}, [9, 3], 2)


@pytest.mark.parametrize("path", ["/v1/models", "/version"])
def test_a_server_whose_description_never_ends_is_refused_by_name(fake, model_dir, tokenizer, path):
    usual = fake.get

    def get(handler) -> None:
        if handler.path == path:
            return respond(200, b"[" * 2**23)(handler, b"")
        return usual(handler)

    fake.get = get
    with pytest.raises(EngineError, match=r"127\.0\.0\.1.*: sent an answer of .* expected the address of a"):
        engine(model_dir, tokenizer, fake)


@pytest.mark.parametrize("piece", [b"[],", b"{},", b'"",', b"[[[]]],", b'{"":0},'])
def test_an_answer_of_values_alone_is_refused_unread(piece):
    """A kilobyte per log-probability is for texts; as values it would be fifty times that in memory."""
    most = score_bytes(2048, 64)
    body = b"[" + piece * (most // len(piece) - 1) + b"0]"
    tracemalloc.start()
    with pytest.raises(MalformedError, match=r"[\d,]+ values in an answer of"):
        read_json(body, most)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_an_answer_of_punctuation_alone_passes():
    token = {"logprob": -1.25, "rank": 3, "decoded_token": "::::[[[[,,,,{{{{"}
    rows = [None, *({str(i): token for i in range(65)} for _ in range(999))]
    body = json.dumps({"choices": [{"prompt_token_ids": list(range(1000)), "prompt_logprobs": rows}]}).encode()
    assert len(body) < score_bytes(1000, 64)
    assert read_json(body, score_bytes(1000, 64))["choices"][0]["prompt_logprobs"] == rows
    answer = json.dumps({"choices": [{"text": "[{:," * 20_000, "token_ids": [123_456] * 20_000}]}).encode()
    assert len(read_json(answer, generate_bytes(100, 20_000))["choices"][0]["token_ids"]) == 20_000


def test_key_that_a_server_echoes_is_kept_nowhere(fake, model_dir, tokenizer, monkeypatch):
    """Not in the version, not in a model's name, and not in a text that is cut off within the key."""
    monkeypatch.setenv("DECANT_SERVER_API_KEY", KEY)
    version, name = "v" * (39 - len(KEY) // 2) + KEY, f"models/{KEY}"
    fake.cards = [{"id": name, "root": str(model_dir), "max_model_len": 129, "parent": None}]
    usual = fake.get

    def get(handler) -> None:
        if handler.path == "/version":
            return respond(200, json.dumps({"version": version}).encode())(handler, b"")
        return usual(handler)

    fake.get = get
    with_servers = engine(model_dir, tokenizer, fake)
    list(with_servers.score(requests()))
    assert {request["model"] for request in fake.requests} == {name}  # the server still gets its own name
    kept = json.dumps(dict(with_servers.provenance()))
    assert "***" in kept
    fake.always = respond(400, b"x" * (299 - len(KEY) // 2) + KEY.encode())
    with pytest.raises(EngineError) as error:
        list(with_servers.score(requests()))
    fake.cards = [{"id": "x" * (79 - len(KEY) // 2) + KEY, "root": KEY * 200, "max_model_len": 129}]
    with pytest.raises(EngineError) as other:
        engine(model_dir, tokenizer, fake)
    for text in (kept, str(error.value), str(other.value)):
        assert KEY[:6] not in text


@pytest.mark.parametrize(
    "told, kept",
    [("tool_calls", "tool_calls"), ("content_filter", "content_filter"), ("", ""), (f"see {KEY}", "see ***")],
)
def test_end_that_is_neither_stop_nor_length_is_handed_on_by_its_name(
    told, kept, fake, model_dir, tokenizer, monkeypatch
):
    monkeypatch.setenv("DECANT_SERVER_API_KEY", KEY)
    answer = {"prompt_token_ids": [5, 6], "token_ids": [9, 9], "finish_reason": told}
    with_servers = engine(model_dir, tokenizer, fake)
    fake.always = respond(200, json.dumps({"choices": [answer]}).encode())
    (result,) = with_servers.generate([GenerateRequest(0, 0, [5, 6], 1)], Generate(max_new_tokens=4))
    assert (result.token_ids, result.finish_reason) == ([9, 9], kept)


@pytest.mark.parametrize(
    "cards",
    [
        [{"id": "x" * 5000, "root": "y" * 70_000, "max_model_len": 129}],
        [{"id": "a\0b", "root": "\ud800", "max_model_len": 129}],
        [{"root": "MODEL", "max_model_len": 129}],
        [{"id": 5, "root": "MODEL", "max_model_len": 129}],
        [{"id": "MODEL", "max_model_len": "129"}],
        {"id": "MODEL"},
        7,
    ],
)
def test_list_of_models_that_no_vllm_server_sends_is_refused_in_a_sentence(cards, fake, model_dir, tokenizer):
    fake.cards = json.loads(json.dumps(cards).replace("MODEL", str(model_dir)))
    with pytest.raises(EngineError):
        engine(model_dir, tokenizer, fake)


def engine(model_dir: Path, tokenizer, fake: FakeVllmServer) -> ServerEngine:
    settings = {"max_model_len": 128, "server_patience_seconds": 30}
    section = ServedTeacher.model_validate(
        {"model": str(model_dir), "engine": "server", "servers": [fake.url], **settings}
    )
    return ServerEngine(section, TopCapture(k=8), model_dir, tokenizer=tokenizer, first_backoff_seconds=0.02)


def requests() -> list[ScoreRequest]:
    return [ScoreRequest(0, 0, np.arange(5, 15, dtype=np.int32), np.array([[2, 10]], np.int32))]


def scores(model_dir: Path, tokenizer, fake: FakeVllmServer):
    with_servers = engine(model_dir, tokenizer, fake)
    (result,) = with_servers.score(requests())
    with_servers.close()
    return result.targets
