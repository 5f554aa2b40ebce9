"""A vLLM server in a thread: the endpoints that Decant asks, a model made of hashes, and accidents on demand."""

from __future__ import annotations

import itertools
import json
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

Accident = Callable[[BaseHTTPRequestHandler, bytes], None]
"""Handles a request instead of the server."""


def dense_logprobs(token: int, vocab_size: int, sharpness: float = 2.0) -> np.ndarray:
    """[V] float64 log-probabilities of what follows a token."""
    logits = sharpness * np.random.default_rng(token).normal(size=vocab_size)
    return logits - np.logaddexp.reduce(logits)


def drop(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    """Break the connection without a word."""
    handler.connection.close()


def respond(status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> Accident:
    """Answer with these bytes, announcing another length if asked."""

    def send(handler: BaseHTTPRequestHandler, _: bytes) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return send


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no news."""


class FakeVllmServer:
    """Serves on a free port of the loopback until `stop`; `start` may be called again and keeps the port."""

    def __init__(self, tokenizer: Any, name: str, *, key: str | None = None, certificate: Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.name = name
        self.key = key
        self.certificate = certificate
        """Key and certificate in one file; None: no TLS."""
        self.cards: list[dict] = [{"id": name, "root": name, "max_model_len": 129, "parent": None}]
        self.max_logprobs = 20
        self.sharpness = 2.0
        self.shift = 0.0
        """Added to every log-probability: no probabilities any more."""
        self.half = False
        """Round logits as 16 bits do."""
        self.most_tokens = 1000
        """The server's own limit of an answer."""
        self.seconds = 0.0
        self.accidents: list[Accident | None] = []
        """What happens to the next completions, one each; None: nothing."""
        self.always: Accident | None = None
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._port = 0
        self.start()

    def start(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.headers.append(dict(self.headers))
                fake.paths.append(self.path)
                fake.get(self)

            def do_POST(self) -> None:
                fake.headers.append(dict(self.headers))
                fake.post(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_: Any) -> None:
                pass

        self._http = _Http(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_address[1]
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http{'s' if self.certificate else ''}://127.0.0.1:{self._port}/v1"

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
            return respond(401, b'{"error": "Unauthorized"}')(handler, b"")
        documents = {"/v1/models": {"data": self.cards}, "/version": {"version": "0.32.0"}, "/health": {}}
        return respond(200, json.dumps(documents[handler.path]).encode())(handler, b"")

    def post(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        request = json.loads(body)
        if handler.path == "/tokenize":
            ids = self.tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]
            return respond(200, json.dumps({"tokens": ids}).encode())(handler, b"")
        if handler.path == "/detokenize":
            return respond(200, json.dumps({"prompt": self.tokenizer.decode(request["tokens"])}).encode())(handler, b"")
        with self._lock:
            self.requests.append(request)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            accident = self.accidents.pop(0) if self.accidents else self.always
        try:
            time.sleep(self.seconds)
            if accident is not None:
                return accident(handler, body)
            if request.get("prompt_logprobs", 0) > self.max_logprobs:
                message = f"Requested prompt logprobs of {request['prompt_logprobs']}, greater than {self.max_logprobs}"
                return respond(400, json.dumps({"error": {"message": message}}).encode())(handler, b"")
            return respond(200, json.dumps({"choices": [self.choice(request)]}).encode())(handler, b"")
        finally:
            with self._lock:
                self._in_flight -= 1

    def choice(self, request: dict) -> dict:
        prompt = request["prompt"]
        if "prompt_logprobs" in request:
            rows = [None, *(self.position(a, b, request["prompt_logprobs"]) for a, b in itertools.pairwise(prompt))]
            return {"prompt_token_ids": prompt, "token_ids": [1], "finish_reason": "length", "prompt_logprobs": rows}
        answer = answer_of(prompt, request["seed"], self.vocab_size)
        most = min(request["max_tokens"], self.most_tokens)
        end = request["stop_token_ids"][-1]
        ids, reason = (answer[:most], "length") if len(answer) >= most else ([*answer, end], "stop")
        return {"prompt_token_ids": prompt, "token_ids": ids, "finish_reason": reason}

    def position(self, before: int, label: int, k: int) -> dict:
        logprobs = dense_logprobs(before, self.vocab_size, self.sharpness) + self.shift
        if self.half:
            logprobs = np.round(logprobs * 8) / 8
            logprobs -= np.logaddexp.reduce(logprobs)
        top = np.argsort(-logprobs, kind="stable")[:k].tolist()
        found = {
            token: {"logprob": logprobs[token], "rank": rank, "decoded_token": "x"} for rank, token in enumerate(top, 1)
        }
        own = {"logprob": logprobs[label], "rank": int((logprobs > logprobs[label]).sum()) + 1, "decoded_token": "y"}
        return {label: own, **found}


def answer_of(prompt: Sequence[int], seed: int, vocab_size: int) -> list[int]:
    """Ids of an answer without its end token, a function of prompt and seed."""
    rng = np.random.default_rng([seed, *prompt])
    return rng.integers(3, vocab_size, int(rng.integers(1, 12))).tolist()
