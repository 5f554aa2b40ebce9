"""What is kept of one model's sampled answers, and when it may be used again.

    OUTPUT_DIR/evaluate/side_by_side/MODEL.json           identity, seconds, what ran
    OUTPUT_DIR/evaluate/side_by_side/MODEL.answers.jsonl  every answer with its prompt and temperature

The identity holds weights, engine, the chosen prompts by content, template settings, temperatures, seed and length.
Figures are worked out from the answers when they are read (`side_figures`), so they can never be of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.recipe.recipe import Recipe
from tools.evaluate.models.generate_answers import Answer
from tools.evaluate.models.model_ends import foreign_end_ids, named_ends
from tools.evaluate.models.models import ModelUnderTest
from tools.evaluate.results.results import write_result
from tools.evaluate.side_by_side.side_prompts import SidePrompt, digest_of, sources_of

SIDE_FORMAT = 1
"""Raised whenever answers would come out differently for the same inputs."""


def side_path(recipe: Recipe, name: str, ending: str = "json") -> Path:
    """Return a file of one model's sampled answers."""
    return recipe.output_dir / "evaluate" / "side_by_side" / f"{name}.{ending}"


def side_identity(recipe: Recipe, model: ModelUnderTest, prompts: Sequence[SidePrompt]) -> dict[str, Any]:
    """Return everything that a model's sampled answers depend on.

    Raises:
        ModelError: the model's weights cannot be read.
    """
    settings = recipe.evaluate.side_by_side
    assert settings is not None
    return {
        "format": SIDE_FORMAT,
        "weights": model.weights_id(),
        "dtype": model.dtype,
        "quantization": model.quantization,
        "engine": recipe.evaluate.engine,
        "prompts": digest_of(prompts),
        "num_prompts": len(prompts),
        "temperatures": list(settings.temperatures),
        "seed": settings.seed,
        "max_new_tokens": settings.max_new_tokens or recipe.evaluate.max_new_tokens,
        **named_ends(foreign_end_ids(recipe, model, sources_of(prompts))),
    }


def write_side_answers(
    recipe: Recipe,
    name: str,
    identity: Mapping[str, Any],
    prompts: Sequence[SidePrompt],
    answers: Mapping[float, Sequence[Answer]],
    provenance: Mapping[str, Any],
    seconds: float,
) -> None:
    """Write the answers at each temperature, prompt by prompt, and then the file that says they are whole."""
    rows = (
        {
            "temperature": temperature,
            "number": number,
            "label": prompt.label,
            "prompt": prompt.text,
            "reference": prompt.reference,
            "answer": answer.text,
            "tokens": answer.num_tokens,
            "truncated": answer.truncated,
        }
        for temperature, given in answers.items()
        for number, (prompt, answer) in enumerate(zip(prompts, given, strict=True))
    )
    result = {"identity": identity, "seconds": {"answer": round(seconds, 3)}, "provenance": provenance}
    write_result(side_path(recipe, name), result, rows)
