"""`python -m tools.gpu_check` without a GPU: its refusal, its processes, its page; every part at tiny sizes."""

from __future__ import annotations

import subprocess
import sys

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


def test_bounds_of_all_parts_are_below_ten_minutes():
    assert sum(gpu_check.PARTS.values()) < 600


def test_part_that_hangs_or_dies_does_not_cost_the_others(monkeypatch):
    def hangs(command, **settings):
        raise subprocess.TimeoutExpired(command, settings["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert gpu_check.run_apart("kernels", dry_run=True) == {"failed": "did not finish within 60 s"}
    died = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nRuntimeError: CUDA error")
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: died)
    assert gpu_check.run_apart("kernels", dry_run=True) == {"failed": "exit code 1: RuntimeError: CUDA error"}


def test_page_names_every_figure_and_what_was_skipped():
    page = gpu_check.as_markdown(
        {"full": {"planned_over_allocated": 1.0312}, "qlora": {"skipped": "bitsandbytes is not installed"}}
    )
    assert "| full.planned_over_allocated | 1.031 |" in page
    assert "| qlora.skipped | bitsandbytes is not installed |" in page


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_every_part_runs_at_tiny_sizes(part):
    command = [sys.executable, "-m", "tools.gpu_check", "--dry-run", "--part", part]
    child = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-2000:]
    figures = gpu_check.json.loads(child.stdout.strip().splitlines()[-1])
    if part == "operator":
        assert figures["error_float32"] < 1e-5
    elif part == "kernels":
        assert figures["rows_apart_sdpa"]
    else:
        assert "skipped" in figures or figures["planned_bytes"] > 0
