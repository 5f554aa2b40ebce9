"""The server engine against fake servers: right arrays, balance, retries, outages, malformed answers, refusals, no key
anywhere.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from shared.errors import EngineError
from shared.models.files import load_fast_tokenizer
from shared.recipe.recipe import Capture, Generate, Teacher
from shared.recipe.sections.capture import TopCapture, TopSampleCapture
from shared.recipe.sections.teacher import ServedTeacher
from teacher_cache.engines import open_engine, refusal
from teacher_cache.engines.protocol import GenerateRequest, ScoreRequest
from teacher_cache.engines.server import server_http
from teacher_cache.engines.server.server_answers import read_columns, score_body
from teacher_cache.engines.server.server_engine import ServerEngine
from teacher_cache.engines.server.server_http import Server
from teacher_cache.engines.server.server_pool import MalformedError
from teacher_cache.engines.server.server_stream import ServerDownError
from tests.teacher_cache.engines.fake_vllm_server import FakeVllmServer, answer_of, dense_logprobs, drop, respond
from tests.tiny_models import VOCAB_SIZE, make_tokenizer

END = 2
KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "teacher"
    make_tokenizer(directory)
    (directory / "config.json").write_text(
        json.dumps({"vocab_size": 512, "max_position_embeddings": 512, "eos_token_id": END})
    )
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_fast_tokenizer(model_dir, trust_remote_code=False)


@pytest.fixture
def fakes(tokenizer, model_dir):
    started = [FakeVllmServer(tokenizer, str(model_dir)) for _ in range(2)]
    yield started
    for fake in started:
        fake.stop()


def teacher(model_dir: Path, *fakes: FakeVllmServer, **settings) -> Teacher:
    urls = [fake.url for fake in fakes]
    settings = {"max_model_len": 128, "server_patience_seconds": 60, "server_requests": 4, **settings}
    return ServedTeacher.model_validate({"model": str(model_dir), "engine": "server", "servers": urls, **settings})


def engine(
    model_dir: Path, tokenizer, *fakes: FakeVllmServer, capture: Capture | None = None, **settings
) -> ServerEngine:
    section = teacher(model_dir, *fakes, **settings)
    capture = capture or TopCapture(k=8)
    return ServerEngine(section, capture, model_dir, tokenizer=tokenizer, first_backoff_seconds=0.02)


def score_requests(count: int) -> list[ScoreRequest]:
    rng = np.random.default_rng(5)
    rows = [rng.integers(0, VOCAB_SIZE, int(rng.integers(4, 40))).astype(np.int32) for _ in range(count)]
    return [ScoreRequest(i, 0, ids, np.array([[2, len(ids)]], np.int32)) for i, ids in enumerate(rows)]


def generate_requests(count: int) -> list[GenerateRequest]:
    return [GenerateRequest(i, 0, [5, 6, 7 + i], 1000 + i) for i in range(count)]


def check_scores(requests: list[ScoreRequest], results: list, k: int = 8) -> None:
    assert sorted(result.tag for result in results) == [request.tag for request in requests]
    for result in results:
        ids = requests[result.tag].token_ids
        dense = np.stack([dense_logprobs(int(token), VOCAB_SIZE) for token in ids[1:-1]])
        targets = result.targets
        np.testing.assert_allclose(targets.label_logprobs, dense[np.arange(len(dense)), ids[2:]], rtol=1e-6)
        top = np.argsort(-dense, axis=1)[:, :k]
        np.testing.assert_array_equal(targets.ids.reshape(-1, k), top)
        outside = dense.copy()
        np.put_along_axis(outside, top, -np.inf, 1)
        np.testing.assert_allclose(targets.tail_logmass[:, 0], np.logaddexp.reduce(outside, axis=1), atol=1e-4)


def test_scores_are_the_distributions_that_the_servers_know(model_dir, tokenizer, fakes):
    requests = score_requests(30)
    with_servers = engine(model_dir, tokenizer, *fakes)
    check_scores(requests, list(with_servers.score(requests)))
    assert all(len(fake.requests) > 8 for fake in fakes)
    assert all(fake.most_in_flight <= 4 for fake in fakes)
    assert with_servers.provenance()["vllm"] == ["0.32.0"]
    with_servers.close()


def test_answers_follow_their_seeds_and_limits(model_dir, tokenizer, fakes):
    requests = generate_requests(40)
    results = list(
        engine(model_dir, tokenizer, *fakes).generate(
            requests, Generate(max_new_tokens=6, stop=("never said",), top_k=7)
        )
    )
    assert len(results) == 40
    for result in results:
        answer = answer_of(requests[result.tag].token_ids, requests[result.tag].seed, VOCAB_SIZE)
        whole = len(answer) < 6
        assert (result.token_ids, result.finish_reason) == (
            ([*answer, END], "stop") if whole else (answer[:6], "length")
        )
    sent = next(request for fake in fakes for request in fake.requests if "seed" in request)
    assert (sent["stop"], sent["top_k"], sent["repetition_penalty"], sent["stop_token_ids"]) == (
        ["never said"],
        7,
        1.0,
        [END],
    )


def test_requests_are_pulled_only_while_there_is_room(model_dir, tokenizer, fakes):
    pulled = []

    def stream():
        for request in score_requests(100):
            pulled.append(request.tag)
            yield request

    results = engine(model_dir, tokenizer, *fakes).score(stream())
    next(results)
    assert len(pulled) <= 2 * 4 + 1
    results.close()
    assert len(pulled) <= 2 * 4 + 1


@pytest.mark.parametrize(
    "accident",
    [
        drop,
        respond(500, b"boom"),
        respond(503, b"{}"),
        respond(429, b"slow down", {"Retry-After": "0"}),
        respond(200, b'{"choices": [{"token'),
        respond(200, b"[]"),
        respond(200, b'{"choices": []}', length=10_000),
        respond(200, b'{"choices": [{"prompt_token_ids": [1], "token_ids": [1], "finish_reason": "stop"}]}'),
        respond(200, b"[" * 100_000),
        respond(200, b"x", length=10**12),
    ],
    ids=["dropped", "500", "503", "429", "cut", "no object", "short", "other prompt", "nested", "oversize"],
)
def test_accident_of_a_server_costs_time_only(accident, model_dir, tokenizer, fakes):
    requests = score_requests(20)
    with_servers = engine(model_dir, tokenizer, *fakes)
    for fake in fakes:
        fake.accidents = [accident, None, accident, None, None, accident]
    check_scores(requests, list(with_servers.score(requests)))
    assert all(len(fake.accidents) < 6 for fake in fakes)  # how many each meets depends on which is back first


def test_server_that_is_down_is_left_out_and_used_again_when_it_is_back(model_dir, tokenizer, fakes):
    with_servers = engine(model_dir, tokenizer, *fakes)
    for fake in fakes:
        fake.seconds = 0.01
    requests, back = score_requests(5000), threading.Event()
    results = with_servers.score(itertools.takewhile(lambda _: not back.is_set(), requests))
    done = [next(results)]
    fakes[0].stop()
    done += [next(results) for _ in range(60)]
    while_down = len(fakes[0].requests)
    fakes[0].start()
    for result in results:
        done.append(result)
        if len(fakes[0].requests) > while_down + 5:
            back.set()
    assert back.is_set()
    check_scores(requests[: len(done)], done)


def test_whole_outage_is_waited_for(model_dir, tokenizer, fakes):
    with_servers = engine(model_dir, tokenizer, *fakes)
    requests = score_requests(60)
    results = with_servers.score(iter(requests))
    done = [next(results)]
    for fake in fakes:
        fake.stop()
    timer = threading.Timer(0.4, fakes[1].start)
    timer.start()
    done += list(results)
    check_scores(requests, done)


def test_outage_beyond_the_patience_is_one_sentence_with_every_address(model_dir, tokenizer, fakes):
    with_servers = engine(model_dir, tokenizer, *fakes, server_patience_seconds=0.3)
    for fake in fakes:
        fake.stop()
    with pytest.raises(
        EngineError, match=r"no server was up for 0 seconds .*Connection refused.*run the command again"
    ) as error:
        list(with_servers.score(score_requests(5)))
    assert all(fake.url in str(error.value) for fake in fakes)
    for fake in fakes:
        fake.start()


def test_stop_is_honoured_during_an_outage(model_dir, tokenizer, fakes):
    asked = threading.Event()
    section = teacher(model_dir, fakes[0], server_patience_seconds=60)
    with_servers = ServerEngine(section, TopCapture(k=8), model_dir, tokenizer=tokenizer, should_stop=asked.is_set)
    fakes[0].always = respond(503, b"")
    threading.Timer(0.2, asked.set).start()
    assert list(with_servers.score(score_requests(5))) == []  # beyond the patience it would be an error


def test_request_that_fails_everywhere_ends_the_job(model_dir, tokenizer, fakes):
    with_servers = engine(model_dir, tokenizer, *fakes)
    poison = score_requests(1)
    for fake in fakes:

        def burn(handler, body, serve=fake.choice):
            request = json.loads(body)
            if request["prompt"] == poison[0].token_ids.tolist():
                return respond(500, b'{"error": {"message": "tensor on fire"}}')(handler, body)
            return respond(200, json.dumps({"choices": [serve(request)]}).encode())(handler, body)

        fake.always = burn
    with pytest.raises(EngineError, match=r"failed 6 times.*tensor on fire"):
        list(with_servers.score(poison))


def test_refused_request_ends_the_job_at_once_with_what_the_server_said(model_dir, tokenizer, fakes):
    with_servers = engine(model_dir, tokenizer, *fakes)
    fakes[0].always = fakes[1].always = respond(400, b'{"error": {"message": "no such thing"}}')
    before = sum(len(fake.requests) for fake in fakes)
    with pytest.raises(EngineError, match=r"refused with status 400: no such thing"):
        list(with_servers.score(score_requests(1)))
    assert sum(len(fake.requests) for fake in fakes) == before + 1


def test_key_is_sent_and_appears_nowhere_else(model_dir, tokenizer, monkeypatch, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    fake = FakeVllmServer(tokenizer, str(model_dir), key=KEY)
    monkeypatch.delenv("DECANT_SERVER_API_KEY", raising=False)
    with pytest.raises(EngineError, match="set DECANT_SERVER_API_KEY"):
        engine(model_dir, tokenizer, fake)
    monkeypatch.setenv("DECANT_SERVER_API_KEY", KEY)
    with_servers = engine(model_dir, tokenizer, fake)
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in fake.headers[-4:])
    fake.accidents = [respond(500, f"the key {KEY} is odd".encode())]
    check_scores(score_requests(3), list(with_servers.score(score_requests(3))))
    fake.always = respond(400, f"bad key {KEY}".encode())
    with pytest.raises(EngineError) as error:
        list(with_servers.score(score_requests(1)))
    assert "bad key ***" in str(error.value)
    told = [
        str(error.value),
        caplog.text,
        json.dumps(dict(with_servers.provenance())),
        repr(with_servers._pool._states),
    ]
    told += list(capsys.readouterr())
    assert not any(KEY in text for text in told)
    assert "the key ***" in caplog.text
    monkeypatch.setenv("DECANT_SERVER_API_KEY", "two\nlines")
    with pytest.raises(EngineError, match="no HTTP header") as error:
        engine(model_dir, tokenizer, fake)
    assert "lines" not in str(error.value)
    fake.stop()


def test_silent_server_is_left_when_its_health_fails_and_waited_for_while_it_is_well(tokenizer, model_dir):
    fake = FakeVllmServer(tokenizer, str(model_dir))
    fake.seconds = 0.3
    server = Server.of(fake.url)
    server.silence_seconds = 0.05
    assert server.post("/v1/completions", score_body("m", [1, 2, 3], 2), 10**6).status == 200
    fake.get = lambda handler: respond(500, b"")(handler, b"")
    with pytest.raises(ServerDownError, match="not well"):
        server.post("/v1/completions", score_body("m", [1, 2, 3], 2), 10**6)
    fake.stop()


@pytest.mark.parametrize(
    "change, settings, why",
    [
        ({"cards": []}, {}, "serves nothing where teacher.model is"),
        (
            {"cards": [{"id": "llama", "root": "meta/llama", "max_model_len": 129}]},
            {},
            "'llama' from 'meta/llama' where",
        ),
        ({}, {"max_model_len": 129}, r"takes 129 tokens.*--max-model-len 130.*`teacher.max_model_len: 128`"),
        ({"max_logprobs": 7}, {}, "--max-logprobs 8"),
        ({"shift": 0.7}, {}, "raw_logprobs"),
        ({"shift": 9.0}, {}, "expected none above 0"),
        ({"half": True}, {}, "tie, so its head runs in 16 bits.*head_dtype: auto"),
        ({"most_tokens": 1}, {}, "--generation-config vllm"),
    ],
)
def test_server_that_does_not_fit_is_refused(change, settings, why, model_dir, tokenizer, fakes):
    for name, value in change.items():
        setattr(fakes[0], name, value)
    with pytest.raises(EngineError, match=why):
        list(
            engine(model_dir, tokenizer, fakes[0], **settings).generate(
                generate_requests(4), Generate(max_new_tokens=2)
            )
        )


def test_16_bit_head_is_accepted_where_the_recipe_says_so(model_dir, tokenizer, fakes):
    fakes[0].half = True
    accepted = engine(model_dir, tokenizer, fakes[0], head_dtype="auto")
    assert len(list(accepted.generate(generate_requests(2), Generate(max_new_tokens=2)))) == 2
    accepted.close()


def test_servers_with_different_weights_are_refused(model_dir, tokenizer, fakes):
    fakes[1].sharpness = 3.0
    with pytest.raises(EngineError, match=r"differ by 0\.\d+ \(total variation\)"):
        engine(model_dir, tokenizer, *fakes)


def test_server_that_comes_back_with_another_model_ends_the_job(model_dir, tokenizer, fakes):
    with_servers = engine(model_dir, tokenizer, fakes[0])
    fakes[0].sharpness = 3.0
    fakes[0].accidents = [respond(503, b"")]
    with pytest.raises(EngineError, match="total variation"):
        list(with_servers.score(score_requests(3)))


def test_other_vocabulary_is_refused(model_dir, tokenizer, fakes, tmp_path):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(model_dir)
    document = json.loads(other.backend_tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    from tokenizers import Tokenizer

    other._tokenizer = Tokenizer.from_str(json.dumps(document))
    fakes[0].tokenizer = other
    with pytest.raises(EngineError, match=r"its token ids mean other texts|splits a text into other tokens"):
        engine(model_dir, tokenizer, fakes[0])


def test_adapter_is_asked_for_by_the_name_that_the_server_gave_it(model_dir, tokenizer, fakes):
    fakes[0].cards += [{"id": "polite", "root": "adapters/polite", "parent": str(model_dir)}]
    with_servers = engine(model_dir, tokenizer, fakes[0], adapter="somewhere/polite")
    list(with_servers.score(score_requests(2)))
    assert {request["model"] for request in fakes[0].requests} == {"polite"}
    with pytest.raises(EngineError, match=r"where teacher.adapter is 'rude'.*--lora-modules"):
        engine(model_dir, tokenizer, fakes[0], adapter="rude")


@pytest.mark.parametrize("capture", [TopCapture(temperatures=(2.0,)), TopSampleCapture(mode="top+sample", draws=4)])
def test_tails_at_other_temperatures_and_draws_are_refused(capture, model_dir):
    section = ServedTeacher(model=str(model_dir), engine="server", servers=("http://127.0.0.1:9/v1",))
    assert "a server returns no" in str(refusal(section, capture))
    with pytest.raises(EngineError, match="a server returns no"):
        open_engine(section, capture, for_generation=None, model_dir=model_dir)


def test_position_with_a_wrong_number_of_entries_is_malformed():
    entries = {str(token): {"logprob": -1.0 - token} for token in (1, 2, 3)}

    def answer(row: dict) -> dict:
        return {"choices": [{"prompt_token_ids": [9, 3], "prompt_logprobs": [None, row]}]}

    ids, values = read_columns(answer(entries), [9, 3], 2)
    np.testing.assert_array_equal(ids, [[3, 1, 2]])
    np.testing.assert_allclose(values, [[-4.0, -2.0, -3.0]])
    np.testing.assert_array_equal(read_columns(answer(entries), [9, 3], 3)[0], [[3, 1, 2, 3]])
    for row, k in [
        (entries, 1),
        (entries, 4),
        ({"1": entries["1"]}, 1),
        (None, 2),
        ({"3": {"logprob": None}}, 1),
        ({"3": -1.0}, 1),
    ]:
        with pytest.raises(MalformedError):
            read_columns(answer(row), [9, 3], k)
    with pytest.raises(MalformedError, match="too many"):
        read_columns(answer({**entries, "3": {"logprob": -0.5}}), [9, 3], 2)
    with pytest.raises(MalformedError):
        read_columns(answer({**entries, "3": {"logprob": float("nan")}}), [9, 3], 3)


def test_answer_larger_than_its_bound_is_not_read(tokenizer, model_dir):
    fake = FakeVllmServer(tokenizer, str(model_dir))
    with pytest.raises(server_http.TooLargeError):
        Server.of(fake.url).post("/v1/completions", score_body("m", [1, 2, 3], 20), 100)
    fake.stop()
