"""The process that evaluates one model: answers, scores, held-out figures. Started by `all_models`, never by hand."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from shared.recipe.recipe import Recipe
from tools.evaluate.asking import Asked, ask_model
from tools.evaluate.models.generate_answers import Answer
from tools.evaluate.models.model_process import serve
from tools.evaluate.models.models import ModelUnderTest, model_under_test
from tools.evaluate.results.results import heldout_layer, result_path, taught_layers, write_result
from tools.evaluate.sandbox import sandbox
from tools.evaluate.side_by_side.side_prompts import choose_prompts
from tools.evaluate.side_by_side.side_results import write_side_answers
from tools.evaluate.tasks.questions import Question, Score, read_questions
from tools.evaluate.tasks.registry import aggregate, task_kind

SHOWN_CHARACTERS = 20_000
"""Longest prompt, reference or answer kept in the answers file."""


def evaluate_model(
    recipe: Recipe, name: str, wanted: Mapping[str, Any], allow_unsafe_code: bool, say: Callable[[str], None]
) -> None:
    """Do what is wanted of one model (`evaluation`, `side_by_side`, each with its identity) and write the results.

    Raises:
        DecantError: it cannot be evaluated.
    """
    model = model_under_test(recipe, name)
    started = time.monotonic()
    asked = {task.domain: (task, read_questions(task, task_kind(task))) for task in recipe.evaluate.tasks}
    prompts = choose_prompts(recipe) if "side_by_side" in wanted else []
    answers = ask_model(model, recipe, asked if "evaluation" in wanted else {}, prompts, say)
    answered = time.monotonic() - started
    if "side_by_side" in wanted:
        write_side_answers(
            recipe, name, wanted["side_by_side"], prompts, answers.side_by_side, answers.provenance, answered
        )
    if "evaluation" not in wanted:
        return
    tasks, rows = _score(asked, answers.tasks, allow_unsafe_code)
    scored = time.monotonic() - started - answered
    before = time.monotonic()
    heldout = _heldout(recipe, model, say)
    seconds = {"answer": answered if asked else 0.0, "score": scored, "heldout": time.monotonic() - before}
    result = {
        "identity": wanted["evaluation"],
        "tasks": tasks,
        "heldout": heldout,
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "provenance": answers.provenance,
        "made": made(),
    }
    write_result(result_path(recipe, name), result, rows)


def _heldout(recipe: Recipe, model: ModelUnderTest, say: Callable[[str], None]) -> dict[str, Any] | None:
    if recipe.heldout.fraction == 0:
        return None
    from shared.cache.cache import Cache
    from tools.evaluate.heldout.heldout import evaluate_heldout

    layer = Cache.open(recipe.cache[0], heldout_layer(recipe, model.name)).layer
    if model.name == "teacher" and layer is not None and layer.derived_from:
        say("held-out rows are in the student's tokens, so the teacher is not measured on them")
        return None
    return evaluate_heldout(
        model.files.directory,
        [str(path) for path in recipe.cache],
        recipe.heldout.fraction,
        recipe=recipe,
        targets=heldout_layer(recipe, model.name),
        max_rows=recipe.evaluate.heldout_rows,
        seed=recipe.seed,
        adapter=model.adapter,
        trust_remote_code=model.trust_remote_code,
        as_captured=model.name == "teacher",
        several=taught_layers(recipe),
        say=say,
    )


def _score(
    asked: Asked, answers: dict[str, list[Answer]], allow_unsafe: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the figures of each task, and every answer with its score."""
    found: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for domain, (task, questions) in asked.items():
        kind = task_kind(task)
        repeated = [question for question in questions for _ in range(task.samples)]
        scores = kind.score_answers(
            [(question, answer.final) for question, answer in zip(repeated, answers[domain], strict=True)], allow_unsafe
        )
        rows += [
            _row(domain, index // task.samples, *row)
            for index, row in enumerate(zip(repeated, answers[domain], scores, strict=True))
        ]
        choices = [answer.choices for answer in answers[domain]] if kind.choices_of else ()
        found[domain] = {
            "task": task.name,
            "metric": kind.metric,
            **asdict(aggregate(task, questions, scores, choices)),
            "samples": task.samples,
            "temperature": task.temperature,
            "truncated": sum(answer.truncated for answer in answers[domain]) / len(answers[domain]),
            "mean_tokens": sum(answer.num_tokens for answer in answers[domain]) / len(answers[domain]),
        }
        if kind.runs_code:
            found[domain]["sandbox"] = sandbox.require(allow_unsafe)
    return found, rows


def _row(domain: str, number: int, question: Question, answer: Answer, score: Score) -> dict[str, Any]:
    row: dict[str, Any] = {
        "domain": domain,
        "question": number,
        "prompt": question.prompt,
        "reference": question.reference,
        "answer": answer.text,
    }
    row = {key: value[:SHOWN_CHARACTERS] if isinstance(value, str) else value for key, value in row.items()}
    row |= {"score": score.value, "reason": score.reason, "tokens": answer.num_tokens, "truncated": answer.truncated}
    if answer.choices:
        row["choices"] = [{"text": choice.text, "logprob_nats": choice.logprob_nats} for choice in answer.choices]
    return row


def made() -> dict[str, Any]:
    """Return date (UTC), decant, machine and peak_memory_bytes with memory_of, of this process and those it started.

    It stands beside the figures and is never compared.
    """
    try:
        number = version("decant-kd")
    except PackageNotFoundError:
        number = "not installed"
    memory, of, machine = _memory()
    date = datetime.now(UTC).isoformat(timespec="minutes")
    return {"date": date, "decant": number, "machine": machine, "peak_memory_bytes": memory, "memory_of": of}


def _memory() -> tuple[int, str, str]:
    import torch

    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated()), "CUDA tensors", f"{torch.cuda.get_device_name(0)}, {machine}"
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * 1024, "resident memory", machine


def _work(job: dict[str, Any], say: Callable[[str], None]) -> None:
    recipe = Recipe.model_validate_json(job["recipe"])
    evaluate_model(recipe, job["model"], job["wanted"], job["allow_unsafe_code"], say)


if __name__ == "__main__":
    serve(_work)
