"""A recipe with rounds that every test can afford: tiny models, a dozen prompts, the transformers engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.recipe.recipe import Recipe
from tests.tiny_models import make_qwen3

LOOSE = {"cut": 1.0, "repeating": 1.0, "shortest": 0.0, "longest": 100.0}
"""Guards that let random models answer as they like."""


def make_models(directory: Path) -> tuple[Path, Path]:
    """Write a teacher and a student of one tokenizer."""
    return make_qwen3(directory / "teacher", end_scale=1.5), make_qwen3(
        directory / "student", end_scale=1.5, seed=1, num_layers=1
    )


def rounds_recipe(
    directory: Path, models: tuple[Path, Path], num_prompts: int = 24, rounds: Any = None, **settings: Any
) -> Recipe:
    """Return a recipe whose stage `own` has two rounds of a quarter of the prompts each."""
    path = directory / "math.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"How many apples, number {i}?"}) + "\n" for i in range(num_prompts)))
    trainer = {"max_steps": 3, "pack_tokens": 256, "learning_rate": 1e-3, "report_to": "none", "save_steps": 2}
    loss = [{"name": "forward_kl"}]
    own = {"count": 2, "prompts": 0.25, "max_new_tokens": 12, "guards": LOOSE, **(rounds or {})}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "output_dir": str(directory / "run"),
            "teacher": {"model": str(models[0]), "engine": "transformers", "dtype": "float32", "max_model_len": 128},
            "prompts": [{"source": "math", "path": str(path), "format": "prompt_completion"}],
            "generate": {"max_new_tokens": 12},
            "capture": {"k": 8},
            "cache": str(directory / "cache"),
            "rows_per_part": 4,
            "heldout": {"fraction": 0.2},
            "student": {"model": str(models[1])},
            "stages": [
                {"name": "kd", "losses": loss, "trainer": trainer},
                {"name": "own", "init_from": "kd", "losses": loss, "trainer": trainer, "rounds": own},
            ],
            **settings,
        }
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory by its name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
