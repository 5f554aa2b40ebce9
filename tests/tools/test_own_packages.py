"""The program runs its own packages wherever it is started, or says in a sentence that it would not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.process.parent_watch import started_at
from tests.system.program import ROOT
from tools.own_process import own_command, own_environment

ENTRY = "import sys; from decant_entry import main; sys.exit(main())"


def package(place: Path, name: str) -> None:
    (place / name).mkdir()
    (place / name / "__init__.py").write_text("raise SystemExit('somebody else')\n")


def run(place: Path, *words: str, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [sys.executable, *words], cwd=place, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", ["shared", "teacher_cache", "student_train"])
@pytest.mark.parametrize("module", ["tools.cli", "tools.gpu_check"])
def test_package_of_the_directory_that_would_replace_ours_is_refused(name, module, tmp_path):
    package(tmp_path, name)
    done = run(tmp_path, "-m", module, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"decant: error: the package `{name}` would be loaded from {tmp_path / name}; expected {ROOT / name}; start "
        "the program as "
        "`decant` or with `python -P -m tools.cli`, and take other folders of that name out of PYTHONPATH\n"
    )
    assert run(tmp_path, "-P", "-m", module, "--help").returncode == 0  # the advice works


@pytest.mark.parametrize("name", ["shared", "tools"])
def test_package_on_the_path_that_would_replace_ours_is_refused_by_the_command(name, tmp_path):
    (tmp_path / "work").mkdir()
    package(tmp_path, name)
    done = run(tmp_path / "work", "-P", "-c", ENTRY, "--help", path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"decant: error: the package `{name}` would be loaded from {tmp_path / name}; expected {ROOT / name};"
    )
    assert len(done.stderr.splitlines()) == 1
    assert run(tmp_path / "work", "-P", "-c", ENTRY, "--help").returncode == 0


def test_children_run_our_packages_in_a_directory_that_has_others(tmp_path):
    for name in ("shared", "tools", "teacher_cache", "student_train", "json"):
        package(tmp_path, name)
    command = own_command("-c", "import json, shared, tools; print(json.dumps([shared.__file__, tools.__file__]))")
    done = subprocess.run(
        command, cwd=tmp_path, env=own_environment(), capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout) == [str(ROOT / name / "__init__.py") for name in ("shared", "tools")]


@pytest.mark.slow
def test_model_process_runs_our_module_in_a_directory_that_has_another(tmp_path, monkeypatch):
    from shared.errors import EvaluationError
    from tools.evaluate.models.model_process import run_in_process

    package(tmp_path, "tools")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match="one"):  # it started, and finds no model
        run_in_process("tools.evaluate.one_model", {}, tmp_path / "log.txt", "one", lambda line: None)
    assert "somebody else" not in (tmp_path / "log.txt").read_text()
    assert "tools/evaluate/one_model.py" in (tmp_path / "log.txt").read_text()


SPAWNS = """\
import multiprocessing, os, sys, time
{first}
def wait(path):
    time.sleep(60)
if __name__ == "__main__":
    from shared.process.parent_watch import announced
    with announced():
        child = multiprocessing.get_context("spawn").Process(target=wait, args=("x",))
        child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("first", ["from decant_entry import main", "import tools"])
def test_spawned_process_ends_with_its_starter_before_it_imports_what_it_works_with(first, tmp_path):
    (tmp_path / "starter").write_text(SPAWNS.format(first=first))  # without .py, as the installed command is
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "starter")], env=environment, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    bound = time.monotonic() + 30
    while started_at(child) is not None and time.monotonic() < bound:
        time.sleep(0.05)
    assert started_at(child) is None
