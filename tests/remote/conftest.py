import shutil

import pytest

from shared.cache.sync import mirror
from shared.cache.sync.listing import listing_of
from shared.remote import part_store, transfer
from tests.remote.fake_hub import FakeHub
from tests.remote.loopback import WebServer
from tests.shared.small_cache import build
from tools.bench.loopback_s3 import KEYS, serving


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """A cache of 10 parts."""
    path = tmp_path_factory.mktemp("remote") / "cache"
    build(path, 0, 40)
    return path


@pytest.fixture
def new_store(tmp_path, monkeypatch):
    """A machine that has fetched nothing, and keys for S3."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DECANT_STORE_GB", raising=False)

    def make(name: str = "store"):
        monkeypatch.setenv("DECANT_STORE", str(tmp_path / name))
        mirror._bring_once.cache_clear()
        part_store._checked.clear()
        transfer._filesystem.cache_clear()

    make()
    return make


@pytest.fixture
def web(new_store, local, tmp_path):
    """A web server that holds the cache at its `url`."""
    shutil.copytree(local, tmp_path / "served")
    names = [str(file.relative_to(local)) for file in local.rglob("*") if file.is_file()]
    (tmp_path / "served" / "files.json").write_bytes(listing_of(local, names))
    with serving(WebServer(tmp_path / "served")) as server:
        yield server


@pytest.fixture
def hub(new_store, monkeypatch):
    """A hub, asked with a token."""
    import huggingface_hub.constants as constants

    with serving(FakeHub()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server
