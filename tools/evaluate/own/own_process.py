"""The process of one step of own answers: a model answers, the teacher scores, a model is measured.

Started by `own_answers`, never by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shared.cache.layer_choice import layer_of_capture
from shared.parts.jobs import Job
from shared.recipe.recipe import Recipe
from tools.evaluate.models.model_process import serve
from tools.evaluate.models.models import ModelUnderTest, model_under_test
from tools.evaluate.own.own_answers import asked_of_models, own_cache, write_own


def answer(recipe: Recipe, model: ModelUnderTest) -> Job:
    """Let a model answer held-out prompts, or continue; return the job."""
    from teacher_cache.student_answers import answer_prompts

    assert recipe.teacher is not None
    section = model.settings(recipe, recipe.teacher.max_model_len or model.files.max_position_embeddings)
    answering, asking = asked_of_models(recipe)
    return answer_prompts(answering.model_copy(update={"teacher": section}), recipe.cache[0], asking)[0]


def score(recipe: Recipe) -> None:
    """Let the teacher score every answer that it has not scored."""
    from teacher_cache.build import teach

    teach(
        recipe.model_copy(update={"prompts": (), "generate": None, "cache": (own_cache(recipe),)}), seconds_under=None
    )


def measure(recipe: Recipe, model: ModelUnderTest, say: Callable[[str], None]) -> dict[str, Any]:
    """Return a model's figures on its own answers, and what those are like."""
    from tools.evaluate.heldout.heldout import evaluate_heldout
    from tools.rounds.guards import job_figures

    job, path = answer(recipe, model), own_cache(recipe)
    found = evaluate_heldout(
        model.files.directory,
        [path],
        recipe.heldout.fraction,
        targets=layer_of_capture(recipe, path),
        max_rows=recipe.evaluate.heldout_rows,
        seed=recipe.seed,
        adapter=model.adapter,
        trust_remote_code=model.trust_remote_code,
        as_captured=model.name == "teacher",
        only_job=job.id8,
        say=say,
    )
    answers = job_figures(path, job, recipe.cache).document
    return {**{key: value for key, value in found.items() if key not in ("row_kl", "partings")}, "answers": answers}


def _work(job: dict[str, Any], say: Callable[[str], None]) -> None:
    recipe = Recipe.model_validate(job["recipe"])
    if job["step"] == "score":
        score(recipe)
    elif job["step"] == "answer":
        answer(recipe, model_under_test(recipe, job["model"]))
    else:
        figures = measure(recipe, model_under_test(recipe, job["model"]), say)
        write_own(recipe, job["model"], {"identity": job["identity"], **figures})


if __name__ == "__main__":
    serve(_work)
