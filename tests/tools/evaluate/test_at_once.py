"""Small models on a CPU at the same time, others one after another; one that fails ends them all."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shared.errors import EvaluationError
from tools.evaluate.models import at_once, model_process


def model(directory: Path, num_bytes: int) -> Any:
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.truncate(num_bytes)
    return SimpleNamespace(files=SimpleNamespace(directory=directory))


def evaluated_by(engine: str) -> Any:
    return SimpleNamespace(evaluate=SimpleNamespace(engine=engine))


def test_small_models_share_the_cores_of_a_machine_without_a_gpu(tmp_path, monkeypatch):
    small = [model(tmp_path / str(number), 1000) for number in range(5)]
    large = model(tmp_path / "large", at_once.SMALL_BYTES + 1)
    sharded = model(tmp_path / "sharded", at_once.SMALL_BYTES - 1)
    (tmp_path / "sharded" / "model.safetensors").rename(tmp_path / "sharded" / "model-1.safetensors")
    (tmp_path / "sharded" / "model-2.safetensors").write_bytes(b"12")
    monkeypatch.setattr(at_once, "num_cores", lambda: 4)
    monkeypatch.setattr(at_once, "memory_bytes", lambda: 64 << 30)
    monkeypatch.setattr(at_once, "list_gpus", list)
    assert at_once.num_at_once(evaluated_by("transformers"), small) == 4
    assert at_once.num_at_once(evaluated_by("transformers"), small[:3]) == 3
    assert at_once.num_at_once(evaluated_by("transformers"), []) == 1
    assert at_once.num_at_once(evaluated_by("vllm"), small) == 1
    assert at_once.num_at_once(evaluated_by("transformers"), [*small, large]) == 1
    assert at_once.num_at_once(evaluated_by("transformers"), [*small, sharded]) == 1
    monkeypatch.setattr(at_once, "memory_bytes", lambda: 8 << 30)
    assert at_once.num_at_once(evaluated_by("transformers"), small) == 2
    monkeypatch.setattr(at_once, "list_gpus", lambda: [("NVIDIA H200", (9, 0))])
    assert at_once.num_at_once(evaluated_by("transformers"), small) == 1


def test_as_many_run_at_a_time_as_are_allowed():
    both, done = threading.Barrier(2, timeout=60), []

    def job() -> None:
        both.wait()
        done.append(1)

    at_once.run_jobs([job] * 4, 2)
    assert len(done) == 4


def test_a_job_that_fails_ends_the_processes_of_the_others(tmp_path, monkeypatch):
    started: list[subprocess.Popen[bytes]] = []
    sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(model_process, "own_command", lambda *words: sleeps)

    def waits() -> None:
        model_process.run_in_process("sleeps", {}, tmp_path / "log", "one", lambda line: None)

    def fails() -> None:
        deadline = time.monotonic() + 60
        while not model_process._running and time.monotonic() < deadline:
            time.sleep(0.01)
        started.extend(model_process._running)
        raise EvaluationError("it failed")

    raised: list[BaseException] = []

    def run() -> None:
        try:
            at_once.run_jobs([waits, fails, *[waits] * 20], 2)  # most are cancelled before they begin
        except EvaluationError as error:
            raised.append(error)

    running = threading.Thread(target=run, daemon=True)
    running.start()
    running.join(60)
    assert not running.is_alive()
    assert [str(error) for error in raised] == ["it failed"]
    assert len(started) == 1
    assert started[0].poll() is not None
    assert not model_process._running
