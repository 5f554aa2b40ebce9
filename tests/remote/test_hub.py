"""A hub that does not answer is asked once, and after that its library looks into its cache alone."""

from __future__ import annotations

import http.server
import os
import socket
import threading

import pytest
from huggingface_hub import constants

from shared.errors import CacheError, ModelError
from shared.models.files import load_config
from shared.remote import hub
from shared.remote.transfer import Remote


class Answers(http.server.BaseHTTPRequestHandler):
    """A hub that has nothing."""

    asked: list[str] = []  # noqa: RUF012 - of all of them

    def do_HEAD(self) -> None:
        """Say no."""
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "_silent", {})


def test_a_hub_that_does_not_answer_is_asked_no_more(online, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(ModelError, match="org/nothing"):
            load_config("org/nothing", what="the student", trust_remote_code=False)
        assert "does not answer" in str(hub.ask_hub("org/nothing"))
    assert constants.is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_hub_that_answers_is_asked_once_and_stays_in_use(online, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        for _ in range(3):
            assert hub.ask_hub("org/nothing") is None
        server.shutdown()
    assert len(Answers.asked) == 1
    assert not constants.is_offline_mode()


def test_a_directory_asks_nobody(online, tmp_path):
    assert hub.ask_hub(tmp_path) is None
    assert not hub._silent


@pytest.mark.parametrize("url", ["hf://datasets/name", "hf://datasets", "hf://name"])
def test_a_place_without_a_repository_is_refused_before_anything_is_asked(url):
    with pytest.raises(CacheError, match="names no repository; expected hf://datasets/ORG/NAME"):
        Remote(url)
