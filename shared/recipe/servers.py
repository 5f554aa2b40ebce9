"""What a recipe may say about running vLLM servers (`teacher.engine: server`), and what it may not.

A server was started by somebody else: what decides how it runs is said there, so settings of Decant's own vLLM are
refused here instead of being ignored. An address must not carry a password, because recipes are written into run
directories.
Cost: nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from shared.recipe.base import Problem

if TYPE_CHECKING:
    from shared.recipe.capture import Capture, Teacher

KEY_VARIABLE = "DECANT_SERVER_API_KEY"
"""Environment variable with the servers' API key."""

_OF_THE_SERVER = ("tensor_parallel_size", "gpu_memory_utilization", "max_num_batched_tokens")
_OF_THIS_ENGINE = ("servers", "server_requests", "server_patience_seconds")


def teacher_problems(teacher: Teacher) -> list[Problem]:
    """Return what a `teacher` section says about servers and cannot be honoured."""
    if teacher.engine != "server":
        return [
            (
                (name,),
                f"only the engine 'server' asks servers and this teacher's engine is '{teacher.engine}'; leave it out",
            )
            for name in _OF_THIS_ENGINE
            if _is_set(teacher, name)
        ]
    problems: list[Problem] = []
    if not teacher.servers:
        problems.append(
            (("servers",), "the engine 'server' needs at least one address, such as http://127.0.0.1:8000/v1")
        )
    names = [url.rstrip("/").removesuffix("/v1") for url in teacher.servers]
    for i, url in enumerate(teacher.servers):
        problem = address_problem(url) or ("the same server is listed twice" if names[i] in names[:i] else None)
        if problem:
            problems.append((("servers", i), problem))
    for name in _OF_THE_SERVER:
        if _is_set(teacher, name):
            problems.append(((name,), "a server is started by `vllm serve`, which decides this there; leave it out"))
    if teacher.quantization is not None:
        problems.append(
            (
                ("quantization",),
                "a server does not tell how it quantises, so a layer could not say it either; leave it out and let "
                "`model` be "
                "a quantised checkpoint, or use vllm",
            )
        )
    if teacher.workers is not None:
        problems.append(
            (("workers",), "servers are engines already, so list them all under `servers` and leave it out")
        )
    return problems


def capture_problems(capture: Capture) -> list[Problem]:
    """Return what a `capture` section asks for that no server returns."""
    problems: list[Problem] = []
    if capture.mode != "top":
        problems.append(
            (("capture", "mode"), f"a server returns no drawn tokens, so '{capture.mode}' needs teacher.engine 'vllm'")
        )
    if capture.temperatures != (1.0,):
        problems.append(
            (
                ("capture", "temperatures"),
                "a server returns no tails at other temperatures than 1; use teacher.engine 'vllm'",
            )
        )
    return problems


def address_problem(url: str) -> str | None:
    """Say what is wrong with a server's address, without repeating a password in it, or None."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "it is no address of a server; expected one such as http://127.0.0.1:8000/v1"
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        return f"an address must hold no user or password, because recipes are kept; put an API key into {KEY_VARIABLE}"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not url.isascii() or " " in url:
        return "it is no address of a server; expected one such as http://127.0.0.1:8000/v1"
    if parts.query or parts.fragment:
        return "an address must end with its path, such as http://127.0.0.1:8000/v1; leave out what follows '?' or '#'"
    return None


def _is_set(teacher: Teacher, name: str) -> bool:
    return bool(getattr(teacher, name) != type(teacher).model_fields[name].default)
