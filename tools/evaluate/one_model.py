"""The process that evaluates one model: answers, scores, held-out figures. Started by `side_by_side`, never by hand.

A process of its own because engines leave processes and memory behind. It reads {"recipe", "model", ...} as the first line of stdin
and dies when stdin ends, that is, with its parent. Progress goes to the real stdout, one JSON object per line; whatever
libraries print goes to stderr, which is the model's log.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TextIO

from shared.errors import DecantError
from shared.recipe import Recipe, Task
from teacher_cache.model_files import load_tokenizer
from tools.evaluate import sandbox
from tools.evaluate.choose_answers import choice_ids, choose_answers
from tools.evaluate.generate_answers import Answer, Ask, generate_answers, open_for
from tools.evaluate.models import ModelUnderTest, model_under_test
from tools.evaluate.multiple_choice import normalised_scores
from tools.evaluate.questions import Question, Score, read_questions
from tools.evaluate.rendering import joints, render, source_of
from tools.evaluate.results import heldout_layer, result_path, write_result
from tools.evaluate.tasks import aggregate, task_kind

Asked = dict[str, tuple[Task, list[Question]]]
"""domain -> task and its questions"""

SHOWN_CHARACTERS = 20_000
"""Longest prompt, reference or answer kept in the answers file."""


def evaluate_model(
    recipe: Recipe, name: str, identity: dict[str, Any], allow_unsafe_code: bool, say: Callable[[str], None]
) -> None:
    """Evaluate one model and write its result.

    Raises:
        DecantError: it cannot be evaluated.
    """
    model = model_under_test(recipe, name)
    started = time.monotonic()
    tasks: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    asked = {task.domain: (task, read_questions(task, task_kind(task))) for task in recipe.evaluate.tasks}
    seconds = {"answer": 0.0, "score": 0.0, "heldout": 0.0}
    if asked:
        answers, provenance = _answers(model, recipe, asked, say)
        seconds["answer"] = time.monotonic() - started
        tasks = _score(recipe, name, asked, answers, allow_unsafe_code)
        seconds["score"] = time.monotonic() - started - seconds["answer"]
    before = time.monotonic()
    heldout = _heldout(recipe, model, say)
    seconds["heldout"] = time.monotonic() - before
    result = {
        "identity": identity,
        "tasks": tasks,
        "heldout": heldout,
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "provenance": provenance,
    }
    write_result(result_path(recipe, name), result)


def _answers(
    model: ModelUnderTest, recipe: Recipe, asked: Asked, say: Callable[[str], None]
) -> tuple[dict[str, list[Answer]], dict[str, Any]]:
    """Return domain -> answers, question by question with `task.samples` each, and what the engine says it ran."""
    tokenizer = load_tokenizer(model.files, trust_remote_code=model.trust_remote_code)
    asks, choosing, choices = [], [], {}
    for domain, (task, questions) in asked.items():
        source = source_of(recipe, task)
        ask = Ask(
            name=domain,
            prompts=render(tokenizer, source, questions),
            places=[question.place for question in questions],
            max_new_tokens=recipe.evaluate.max_new_tokens,
            temperature=task.temperature,
            samples=task.samples,
            seed=task.seed,
        )
        if task.name == "multiple_choice":
            ids = choice_ids(tokenizer, questions, joints(tokenizer, source, questions))
            choosing.append(replace(ask, longest_choice=max(len(tokens) for of in ids for tokens in of)))
            choices[domain] = (questions, ask.prompts, ids)
        else:
            asks.append(ask)
    say(f"starting {recipe.evaluate.engine} for {sum(len(ask.prompts) * ask.samples for ask in [*asks, *choosing])} answers")
    engine = open_for(model, recipe, asks, choosing)
    try:
        answers = generate_answers(engine, tokenizer, asks, say)
        answers |= choose_answers(engine, choices, say) if choices else {}
        return answers, dict(engine.provenance())
    finally:
        engine.close()


def _heldout(recipe: Recipe, model: ModelUnderTest, say: Callable[[str], None]) -> dict[str, Any] | None:
    if recipe.heldout.fraction == 0:
        return None
    from tools.evaluate.heldout import evaluate_heldout

    return evaluate_heldout(
        model.files.directory,
        [str(path) for path in recipe.cache],
        recipe.heldout.fraction,
        targets=heldout_layer(recipe),
        max_rows=recipe.evaluate.heldout_rows,
        seed=recipe.seed,
        adapter=model.adapter,
        trust_remote_code=model.trust_remote_code,
        say=say,
    )


def _score(recipe: Recipe, name: str, asked: Asked, answers: dict[str, list[Answer]], allow_unsafe: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    lines: list[str] = []
    for domain, (task, questions) in asked.items():
        kind = task_kind(task)
        repeated = [question for question in questions for _ in range(task.samples)]
        scores = kind.score_answers(
            [(question, answer.final) for question, answer in zip(repeated, answers[domain], strict=True)], allow_unsafe
        )
        lines += [
            _line(domain, index // task.samples, *row)
            for index, row in enumerate(zip(repeated, answers[domain], scores, strict=True))
        ]
        found[domain] = {
            "task": task.name,
            "metric": kind.METRIC,
            **asdict(aggregate(task, questions, scores)),
            "samples": task.samples,
            "temperature": task.temperature,
            "truncated": sum(answer.truncated for answer in answers[domain]) / len(answers[domain]),
            "mean_tokens": sum(answer.num_tokens for answer in answers[domain]) / len(answers[domain]),
        }
        if task.name == "multiple_choice":
            found[domain]["extra"] = normalised_scores(questions, [answer.choices for answer in answers[domain]])
        if task.name == "humaneval":
            found[domain]["sandbox"] = sandbox.require(allow_unsafe)
    path = result_path(recipe, name, "answers.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return found


def _line(domain: str, number: int, question: Question, answer: Answer, score: Score) -> str:
    row = {"domain": domain, "question": number, "prompt": question.prompt, "reference": question.reference, "answer": answer.text}
    row = {key: value[:SHOWN_CHARACTERS] if isinstance(value, str) else value for key, value in row.items()}
    row |= {"score": score.value, "reason": score.reason, "tokens": answer.num_tokens, "truncated": answer.truncated}
    if answer.choices:
        row["choices"] = [{"text": choice.text, "logprob_nats": choice.logprob_nats} for choice in answer.choices]
    return json.dumps(row) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Read the job, evaluate, report on the progress pipe; 0 when the result is written."""
    progress = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    recipe = Recipe.model_validate_json(job["recipe"])
    try:
        evaluate_model(
            recipe, job["model"], job["identity"], job["allow_unsafe_code"], lambda line: _send(progress, {"progress": line})
        )
    except DecantError as error:
        _send(progress, {"error": str(error)})
        return 1
    _send(progress, {"done": True})
    return 0


def _send(progress: TextIO, message: dict[str, Any]) -> None:
    progress.write(json.dumps(message) + "\n")
    progress.flush()


def _die_with_parent() -> None:
    sys.stdin.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an engine's threads must not keep a finished process alive
