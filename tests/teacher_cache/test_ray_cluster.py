"""What is refused before an engine is placed; a real Ray is tests/system/test_ray.py."""

from __future__ import annotations

import socket
import sys
import time
from importlib import metadata

import pytest

from shared.errors import EngineError, UsageError
from shared.recipe.sections.teacher import Workers
from teacher_cache.cluster import ray_cluster


class FakeRay:
    def __init__(self, *cpus: int) -> None:
        self.cpus = cpus

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in self.cpus] + [
            {"Alive": False, "Resources": {}}
        ]


def test_too_few_gpus_on_this_machine_are_refused_and_in_a_cluster_only_said(caplog):
    with pytest.raises(UsageError, match="asks for 2 engines of 4 GPUs and there are 7 GPUs here"):
        ray_cluster._check_room({"GPU": 7.0}, Workers(count=2, gpus_per_engine=4), local=True)
    ray_cluster._check_room({"GPU": 7.0}, Workers(count=2, gpus_per_engine=4), local=False)
    assert "start as they get a place" in caplog.text
    ray_cluster._check_room({}, Workers(count=2, gpus_per_engine=0), local=True)


@pytest.mark.parametrize(
    "nodes, count, gpus, cpus", [((8,), 2, 0, 4), ((8, 4), 3, 0, 4), ((2,), 3, 0, 1), ((8,), 2, 1, 1), ((7,), 2, 0, 3)]
)
def test_engines_on_cpus_share_the_cores_and_engines_on_gpus_take_one(nodes, count, gpus, cpus):
    assert ray_cluster.cpus_per_engine(FakeRay(*nodes), Workers(count=count, gpus_per_engine=gpus)) == cpus


def test_a_missing_ray_and_a_client_address_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(UsageError, match="names Ray's client port"), ray_cluster.ray_cluster(Workers(count=1)):
        pass

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UsageError, match="install the extra `cluster`"), ray_cluster.ray_cluster(Workers(count=1)):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "no-such-host.invalid", "auto"])
def test_an_address_where_no_head_is_is_refused_before_ray_waits_for_it(monkeypatch, tmp_path, host):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    if host == "auto":  # a cluster that ended leaves its address
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}\n")
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", host if host == "auto" else f"{host}:{port}")
    monkeypatch.setattr(ray_cluster, "SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(ray_cluster, "require_ray", lambda: None)
    if host != "auto":
        monkeypatch.setitem(sys.modules, "ray", None)  # is not asked
    begun = time.monotonic()
    with (
        pytest.raises(EngineError, match=r"^nothing answers at RAY_ADDRESS=.*\d\)?; start the cluster .*, or unset it"),
        ray_cluster.ray_cluster(Workers(count=1)),
    ):
        pass
    assert time.monotonic() - begun < 30


def test_files_of_builds_that_were_killed_are_removed_and_those_of_living_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(ray_cluster, "_LONGEST_SOCKET_DIRECTORY", 1000)
    dead, alive = tmp_path / "decant-ray-999999999-x", tmp_path / "decant-ray-1-x"
    for directory in (dead, alive):
        (directory / "session").mkdir(parents=True)
    made = ray_cluster._temporary_directory()
    assert made.parent == tmp_path and made.is_dir() and alive.is_dir() and not dead.exists()
