"""Every model of a recipe on the same questions and the same held-out rows, one process each.

A kept evaluation of the same inputs is reused; seconds are added to the run's `evaluate` phase only where work was done. Models
run one after another: each may want the whole machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError
from shared.recipe import Recipe
from teacher_cache.seconds_file import add_seconds
from tools.evaluate import sandbox
from tools.evaluate.models import model_under_test
from tools.evaluate.questions import read_questions
from tools.evaluate.results import evaluation_identity, read_result, result_path, same_identity
from tools.evaluate.tasks import task_kind

_ROOT = Path(__file__).resolve().parents[2]


def evaluate_all(recipe: Recipe, allow_unsafe_code: bool = False, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Evaluate the recipe's models and return name -> result; `say` gets a line now and then (default: stderr).

    Raises:
        EvaluationError: a model does not exist, a task cannot be asked, or a model's process failed.
        CacheError: the cache cannot be read.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    if not recipe.evaluate.models:
        raise EvaluationError("evaluate.models names no model; list some of teacher, base and the stages' names")
    wanted = {name: evaluation_identity(recipe, model_under_test(recipe, name)) for name in recipe.evaluate.models}
    for task in recipe.evaluate.tasks:  # all of them before the first model starts: a bad row is found in a second, not in an hour
        read_questions(task, task_kind(task))
        if task.name == "humaneval":
            say(f"{task.domain}: programs run in the sandbox '{sandbox.require(allow_unsafe_code)}'")
    results: dict[str, Any] = {}
    for name, identity in wanted.items():
        kept = read_result(result_path(recipe, name))
        if kept is not None and same_identity(kept["identity"], identity):
            say(f"reused evaluation of {name}")
        else:
            started = time.monotonic()
            kept = _evaluate(recipe, name, identity, allow_unsafe_code, say)
            add_seconds(recipe.output_dir, "evaluate", time.monotonic() - started)
            say(f"{name}: {_figures(kept)} ({time.monotonic() - started:.0f} s)")
        results[name] = kept
    return results


def _evaluate(recipe: Recipe, name: str, identity: dict[str, Any], unsafe: bool, say: Callable[[str], None]) -> dict[str, Any]:
    path, log = result_path(recipe, name), result_path(recipe, name, "log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    job = {"recipe": recipe.model_dump_json(), "model": name, "identity": identity, "allow_unsafe_code": unsafe}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.evaluate.one_model"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            env=environment,
            start_new_session=True,
        )
        try:
            error = _follow(process, json.dumps(job), name, say)
        finally:
            _end(process)
    result = read_result(path)
    if error is not None:
        raise EvaluationError(f"'{name}' cannot be evaluated: {error}")
    if process.returncode != 0 or result is None:
        raise EvaluationError(f"evaluating '{name}' ended with status {process.returncode}: {_last_line(log)}; its log is {log}")
    return result


def _follow(process: subprocess.Popen[bytes], job: str, name: str, say: Callable[[str], None]) -> str | None:
    """Send the job, pass progress on, and return the sentence of an error; stdin stays open, since the child dies with it."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        process.wait()
        return None
    error = None
    for line in process.stdout:
        message = json.loads(line)
        if "progress" in message:
            say(f"{name}: {message['progress']}")
        if message.get("done"):
            break
        error = message.get("error", error)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
    return error


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the model's process group: engines leave workers behind."""
    with contextlib.suppress(ProcessLookupError):  # all gone already, as it should be
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = [line for line in stream.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def _figures(result: dict[str, Any]) -> str:
    parts = [f"{domain} {100 * task['score']:.1f} %" for domain, task in result["tasks"].items()]
    if result["heldout"]:
        parts.append(f"held-out KL {result['heldout']['kl_nats']:.4f} nats")
    return ", ".join(parts)
