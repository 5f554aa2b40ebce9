"""Published benchmarks through lm-evaluation-harness: one process a model, folded into the run's report.

    OUTPUT_DIR/evaluate/lm_eval/MODEL.json   identity, TASK -> METRIC -> value and standard error

Tasks are the harness's names, or paths of task files in its YAML, whose own directory it then also searches; nothing
here downloads, and with HF_HUB_OFFLINE=1 nothing there does either. A kept result of the same weights, tasks, files and
version is used again.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from shared.errors import EvaluationError, UsageError, refused
from shared.recipe.recipe import Recipe
from shared.seconds import add_seconds
from shared.text.file_endings import ends_in
from shared.text.text_encoding import not_utf8
from tools.evaluate.models.model_ends import foreign_end_ids, named_ends
from tools.evaluate.models.model_process import run_in_process
from tools.evaluate.models.models import ModelUnderTest, model_under_test
from tools.evaluate.models.rendering import rendering_sources
from tools.evaluate.results.results import read_kept, write_result
from tools.evaluate.results.run_shapes import is_finite

LM_EVAL_FORMAT = 1
"""Raised whenever figures would come out differently for the same inputs."""
_LARGEST_TASK_FILE = 1 << 22
_WORD = re.compile(r"[\w./~-]+")
_ENDING = re.compile(r"(?<=.)\.(?:jsonl?|csv|parquet|arrow|py|ya?ml|txt)(?:\.gz)?")
_LONGEST_NAME = 4096
"""Longer ones are no paths."""


@dataclass(frozen=True, slots=True)
class LmEvalTasks:
    """What the harness is asked to do."""

    names: tuple[str, ...]
    directories: tuple[str, ...]
    """Of task files, searched besides the harness's own tasks."""
    needs_defaults: bool
    """A task is not one of these files, so the harness's own tasks are read, too."""
    files: Mapping[str, str]
    """Hash of each task file and of each local file that it names."""


def lm_eval_path(recipe: Recipe, name: str) -> Path:
    """Return the file of one model's results."""
    return recipe.output_dir / "evaluate" / "lm_eval" / f"{name}.json"


def parse_tasks(text: str) -> LmEvalTasks:
    """Read the option `--lm-eval TASKS`: names and paths of task files, with commas between them.

    Raises:
        UsageError: a file cannot be read or names no task.
    """
    names: list[str] = []
    files: dict[str, str] = {}
    paths = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if not ends_in(part, ".yaml", ".yml"):
            names.append(part)
            continue
        path = Path(part)
        try:
            if path.stat().st_size > _LARGEST_TASK_FILE:
                raise UsageError(
                    f"--lm-eval {path}: larger than {_LARGEST_TASK_FILE} bytes, which no task of the harness is"
                )
            content = path.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise UsageError(f"--lm-eval {path}: cannot be read ({refused(error)}); expected a task's file") from error
        if said := not_utf8(content):
            raise UsageError(f"--lm-eval {path}: the text {said}")
        found = re.search(r"^task:\s*['\"]?([\w./-]+)", content, re.MULTILINE)
        if found is None:
            raise UsageError(f"--lm-eval {path}: has no line `task: NAME`; expected a task of lm-evaluation-harness")
        names.append(found.group(1))
        paths.append(path)
        files |= _hashes(path, content)
    if not names:
        raise UsageError(f"--lm-eval {text!r} names no task; write names or task files with commas between them")
    directories = tuple(dict.fromkeys(str(path.resolve().parent) for path in paths))
    return LmEvalTasks(tuple(names), directories, len(paths) < len(names), files)


def run_lm_eval(recipe: Recipe, tasks: LmEvalTasks, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the tasks for every model of the recipe, or take what is kept; return model -> TASK -> METRIC -> figures.

    Raises:
        EvaluationError: a model cannot be loaded, or the harness fails.
    """
    found = {}
    for name in recipe.evaluate.models:
        model = model_under_test(recipe, name)
        identity = lm_eval_identity(model, tasks, foreign_end_ids(recipe, model, rendering_sources(recipe)))
        if (kept := read_kept(lm_eval_path(recipe, name), identity)) is not None:
            say(f"reused lm-eval of {name}")
        else:
            started = time.monotonic()
            kept = _run(recipe, model, tasks, identity, say)
            add_seconds(recipe.output_dir, "evaluate", time.monotonic() - started)
            say(f"{name}: {', '.join(tasks.names)} ({time.monotonic() - started:.0f} s)")
        found[name] = kept["tasks"]
    return found


def require_lm_eval() -> None:
    """Refuse where the harness is not installed.

    Raises:
        EvaluationError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            "--lm-eval needs lm-evaluation-harness, which is not installed: pip install 'decant-kd[eval]'"
        )


def refuse_unknown(tasks: LmEvalTasks) -> None:
    """Refuse names that the harness does not have. Cost: it reads its own task files, ten seconds.

    Raises:
        UsageError: it has no task, group or tag of a name.
    """
    if not tasks.needs_defaults:
        return
    from lm_eval.tasks import TaskManager

    known = set(TaskManager(include_path=list(tasks.directories) or None).all_tasks)
    for name in tasks.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean '{near[0]}'?" if near else "; `lm-eval ls tasks` lists its names"
            raise UsageError(f"--lm-eval {name}: lm-evaluation-harness has no such task{meant}")


def lm_eval_identity(model: ModelUnderTest, tasks: LmEvalTasks, ends: Sequence[int]) -> dict[str, Any]:
    """Return everything that a model's results depend on; `ends` are end tokens that its files do not name.

    Raises:
        ModelError: the model's weights cannot be read.
    """
    return {
        "format": LM_EVAL_FORMAT,
        "weights": model.weights_id(),
        "dtype": model.dtype,
        "tasks": list(tasks.names),
        "files": dict(tasks.files),
        "lm_eval": metadata.version("lm_eval"),
        **named_ends(ends),
    }


def fold(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the harness's results as TASK -> METRIC[,FILTER] -> value and stderr; the filter `none` is left out.

    >>> fold({"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1}})
    {'t': {'acc': {'value': 0.5, 'stderr': 0.1}}}
    """
    folded: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, kind = str(key).partition(",")
            if metric.endswith("_stderr") or not is_finite(value) or not kind:
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric},{kind}"
            folded.setdefault(task, {})[name] = {
                "value": float(value),
                "stderr": float(error) if is_finite(error) else None,
            }
    return folded


def _run(
    recipe: Recipe, model: ModelUnderTest, tasks: LmEvalTasks, identity: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    if model.quantization is not None:
        raise EvaluationError(
            f"'{model.name}' is quantised with {model.quantization} by vLLM alone; leave it out of --lm-eval"
        )
    path = lm_eval_path(recipe, model.name)
    path.unlink(missing_ok=True)
    job = {
        "model": str(model.files.directory),
        "adapter": model.adapter,
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "names": list(tasks.names),
        "directories": list(tasks.directories),
        "needs_defaults": tasks.needs_defaults,
        "end_token_ids": identity.get("end_token_ids", []),
    }
    log = path.with_suffix(".log")
    found = run_in_process("tools.evaluate.lm_eval.lm_eval_model", job, log, model.name, say)
    result = {"identity": identity, "tasks": found}
    write_result(path, result)
    return result


def _hashes(path: Path, content: str) -> dict[str, str]:
    """Return hashes of a task file and of the local files that it names, relative to it or to the current directory."""
    places = [
        place
        for name in _named(content)
        for place in (Path(name), path.parent / name)
        if os.path.isfile(place)  # noqa: PTH113 - Path.is_file raises where a name is too long
    ]
    found = {str(path): xxhash.xxh3_128_hexdigest(content.encode())}
    for place in places:
        with place.open("rb") as stream:
            found[str(place)] = hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
    return found


def _named(content: str) -> list[str]:
    """Return what looks like a file's name, sorted. Cost: linear, whatever a text holds."""
    found = set()
    for word in _WORD.finditer(content):
        ends = [ending.end() for ending in _ENDING.finditer(word[0])]
        if ends and ends[-1] <= _LONGEST_NAME:
            found.add(word[0][: ends[-1]])
    return sorted(found)
