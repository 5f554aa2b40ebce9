"""`python -m tools.gpu_check` without a GPU: its refusal, its processes, its page; every part at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
import torch

from tools import gpu_check

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is there; run python -m tools.gpu_check itself"
)


def test_machine_without_a_gpu_is_told_so_in_one_sentence(capsys):
    assert gpu_check.main([]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("gpu_check: error: no NVIDIA GPU was found")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_bounds_of_all_parts_and_of_the_call_are_below_ten_minutes():
    assert sum(gpu_check.PARTS.values()) <= gpu_check.CALL_SECONDS < 600


def test_part_that_hangs_or_dies_does_not_cost_the_others(monkeypatch):
    def hangs(command, **settings):
        raise subprocess.TimeoutExpired(command, settings["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert gpu_check.run_apart("kernels", 20) == {"failed": "did not finish within 20 s"}
    assert gpu_check.run_apart("kernels", 2) == {"failed": "not begun: the call's time was up"}
    died = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nRuntimeError: CUDA error")
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: died)
    assert gpu_check.run_apart("kernels", 20) == {"failed": "exit code 1: RuntimeError: CUDA error"}


def test_section_is_written_after_every_part_and_keeps_what_was_done_when_the_call_is_cut_off(tmp_path, monkeypatch):
    page, begun = tmp_path / "page.md", []

    def part(name, seconds, files):
        begun.append((name, seconds, page.read_text() if page.exists() else ""))
        if name == "attention":
            raise KeyboardInterrupt
        return {"figure": 1.5}

    monkeypatch.setattr(gpu_check, "run_apart", part)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.run_all(dry_run=False, page=page, vllm_files=None, until=gpu_check.time.monotonic() + 70)
    assert [name for name, *_ in begun] == ["hook", "operator", "attention"]
    assert begun[0][1] == 40
    assert 60 < begun[1][1] <= 70, "no part gets more than is left of the call"
    assert "| hook.figure | 1.5 |" in begun[1][2]
    assert "| operator.figure | 1.5 |" in page.read_text()


def test_wheels_that_were_brought_along_are_there_for_the_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(RuntimeError, match="holds no wheel"):
        gpu_check.install(wheels, tmp_path / "target")
    info = "brought-1.dist-info"
    with zipfile.ZipFile(wheels / "brought-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought.py", "value = 7\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    gpu_check.install(wheels, tmp_path / "target")
    command = [sys.executable, "-P", "-c", "import brought; print(brought.value)"]
    child = subprocess.run(command, env=gpu_check.own_environment(), capture_output=True, text=True, timeout=60)
    assert child.stdout == "7\n", child.stderr


def test_page_names_every_figure_and_what_was_skipped():
    page = gpu_check.as_markdown(
        {"full": {"planned_over_allocated": 1.0312}, "qlora": {"skipped": "bitsandbytes is not installed"}}
    )
    assert "| full.planned_over_allocated | 1.031 |" in page
    assert "| qlora.skipped | bitsandbytes is not installed |" in page


@pytest.mark.slow
def test_dry_run_goes_through_every_part_and_writes_their_section(tmp_path, capsys):
    assert gpu_check.main(["--dry-run", "--page", str(tmp_path / "page.md")]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.split(": ", 1) for line in lines if line.split(": ")[0] in gpu_check.PARTS)
    assert list(found) == list(gpu_check.PARTS)
    figures = {name: json.loads(text) for name, text in found.items()}
    section = (tmp_path / "page.md").read_text()
    assert all(f"| {name}." in section for name in figures)
    if "skipped" not in figures["hook"]:
        assert max(value for name, value in figures["hook"].items() if name.startswith("error")) < 1e-4
        assert all(value == 1.0 for name, value in figures["hook"].items() if name.startswith("draws_outside"))
        assert all(abs(value) < 5 for name, value in figures["hook"].items() if name.startswith("z_of"))
    assert max(value for name, value in figures["operator"].items() if "error_float32" in name) < 1e-5
    assert max(value for name, value in figures["operator"].items() if "error_bfloat16" in name) < 2e-2
    assert max(value for name, value in figures["attention"].items() if "error_float32" in name) < 1e-5
    assert figures["separation"]["bfloat16_28_layers"] == "rows"
    for name in ("full", "lora", "long"):
        assert figures[name]["planned_bytes"] > 0
    assert figures["full"]["plain_tokens_per_second"] > 0
    assert "needs more than fits" in figures["refused"]["sentence"]
    training = figures["training"]
    assert (training["gpu_over_cpu_difference"], training["continued_over_whole_difference"]) == (0, 0)
