"""What `decant doctor` and `make setup` ask of a machine with a GPU, against a made-up driver."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from shared.models.gpus import list_gpus
from tests.system.program import ROOT
from tools.doctor import doctor_gpu

SMI = """#!/bin/sh
case "$*" in
  *name,memory.total,driver_version*) echo "NVIDIA H200, 143771 MiB, {driver}.65.06" ;;
  *compute_cap*) echo "NVIDIA H200, 9.0" ;;
  *driver_version*) echo "{driver}.65.06" ;;
  *-L*) echo "GPU 0: NVIDIA H200" ;;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that puts a driver, and only the programs named, on the path."""

    def make(driver: int, *programs: str) -> Path:
        place = tmp_path / f"bin-{driver}-{len(programs)}"
        place.mkdir()
        (place / "nvidia-smi").write_text(SMI.format(driver=driver))
        (place / "nvidia-smi").chmod(0o755)
        for name in programs:
            (place / name).symlink_to(shutil.which(name) or "/bin/true")
        monkeypatch.setenv("PATH", str(place))
        return place

    return make


def answers(monkeypatch, said: str) -> dict[str, tuple]:
    real = doctor_gpu.output
    asked = lambda command: said if doctor_gpu.ASK_TORCH in command else real(command)  # noqa: E731
    monkeypatch.setattr(doctor_gpu, "output", asked)
    return {answer[0].split(" ")[0]: answer for answer in doctor_gpu.check_gpu()}


def test_name_and_ability_of_each_gpu_are_the_drivers(machine):
    machine(580, "sh")
    assert list_gpus() == [("NVIDIA H200", (9, 0))]


@pytest.mark.parametrize(
    "driver, torch_says, fine, oldest",
    [
        (580, "13.0 1", True, 580),
        (575, "13.0 1", False, 580),
        (575, "12.9 1", True, 525),
        (470, "12.4 0", False, 525),
        (575, "none 0", False, 580),
    ],
)
def test_driver_is_held_against_the_cuda_of_torchs_build(driver, torch_says, fine, oldest, machine, monkeypatch):
    machine(driver, "sh", "gcc")
    found = answers(monkeypatch, torch_says)
    name, passed, said, mend, required = found["driver"]
    assert (passed, required, said) == (fine, True, f"{driver}.65.06")
    assert name.startswith(f"driver {oldest} or newer")
    assert mend == ("" if fine else f"apt-get install nvidia-driver-{oldest} && reboot")
    assert found["GPU"][1] == torch_says.endswith("1")
    assert found["gcc"][1]


def test_compiler_and_header_that_triton_needs_are_named_with_their_packages(machine, monkeypatch, tmp_path):
    machine(580, "sh")
    monkeypatch.setattr(doctor_gpu.sysconfig, "get_path", lambda name: str(tmp_path))
    found = answers(monkeypatch, "13.0 1")
    assert (found["gcc"][1], found["gcc"][3]) == (False, "apt-get install gcc")
    assert not found["Python.h"][1]
    assert found["Python.h"][3].startswith("apt-get install python3.")
    (tmp_path / "Python.h").touch()
    assert answers(monkeypatch, "13.0 1")["Python.h"][1]


def test_machine_without_a_gpu_is_asked_for_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    [answer] = doctor_gpu.check_gpu()
    assert answer[:3] == ("GPU", True, "none; everything runs on the CPU")


TOOLS = ("sh", "test", "head", "cut", "df", "awk", "echo", "python3", "make")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "driver, programs, settings, why",
    [
        (580, ("gcc",), {"FREE_GB": "500"}, None),
        (575, ("gcc",), {"FREE_GB": "500"}, "the driver is 575 and CUDA 13 needs 580 or newer"),
        (580, (), {"FREE_GB": "500"}, "apt-get install gcc"),
        (580, ("gcc",), {"FREE_GB": "9", "VENV": "not-there"}, "9 GB are free here and the CUDA builds take over 10"),
        (580, ("gcc",), {"FREE_GB": "500", "PYTHON": "headless"}, "Triton needs Python.h"),
    ],
)
def test_setup_names_what_a_gpu_machine_lacks_before_it_installs(driver, programs, settings, why, machine, monkeypatch):
    make = shutil.which("make")
    place = machine(driver, *TOOLS, *programs)
    python = place / "with-header"
    python.write_text("#!/bin/sh\nexit 0\n")
    (place / "headless").write_text("#!/bin/sh\nexit 1\n")
    for path in (python, place / "headless"):
        path.chmod(0o755)
    words = [f"{name}={value}" for name, value in {"PYTHON": "with-header", **settings}.items()]
    done = subprocess.run(
        [make, "gpu-needs", *words], cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) == (why is None), done.stderr
    assert why is None or why in done.stdout
