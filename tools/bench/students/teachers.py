"""`python -m tools.bench.students.teachers`: two specialists tuned from the demo's teacher, and their students.

Students learn from one of them, from both mixed or from both routed; several seeds, one table.

The specialists (math, code) are stages of their own recipe: the demo's teacher trained on one domain's own answers. All
teachers score the same rows, the data's answers to the prompts of both domains, so students differ by the distributions
alone. Every student starts equal, over equal rows and steps.
Cost: two short trainings of the teacher, three scoring passes; four trainings and seven evaluations per seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from shared.recipe.file import dump_recipe
from shared.recipe.recipe import Recipe
from tools.bench.benchmarks_page import called, measured_by, replace_section, table
from tools.bench.students.seeds import Figures, decant, mean_rows, percents, run

DOMAINS = {"math": "gsm8k", "code": "humaneval"}
SOURCES = tuple(DOMAINS)
STUDENTS: dict[str, list[dict[str, Any]]] = {
    "of_math": [{"layer": "math"}],
    "of_code": [{"layer": "code"}],
    "mixed": [{"layer": name, "weight": 0.5} for name in SOURCES],
    "routed": [{"layer": name, "sources": [name]} for name in SOURCES],
}
MODELS = ["teacher", *SOURCES, "base", *STUDENTS]


def recipe(root: Path, name: str, **sections: Any) -> Path:
    """Write a recipe over the demo's prompts of both domains, answered by the data, and return its path."""
    prompts = [{"source": name, "path": f"data/demo/{name}.train.jsonl", "format": "messages"} for name in SOURCES]
    written = Recipe.model_validate(
        {
            "name": name,
            "output_dir": root / name,
            "teacher": _teacher("data/demo/teacher"),
            "prompts": prompts,
            "capture": {"k": 32, "mass": 0.999},
            "cache": root / "cache",
            "heldout": {"fraction": 0.05},
            **sections,
        }
    )
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{name}.yaml"
    path.write_text(dump_recipe(written), encoding="utf-8")
    return path


def specialists(root: Path, steps: int) -> Path:
    """Return the recipe that tunes the demo's teacher to each domain by itself."""
    stages = [
        {
            "name": name,
            "losses": [{"name": "cross_entropy"}],
            "mixture": {name: 1.0},
            "trainer": {"learning_rate": 3e-4, "max_steps": steps, "pack_tokens": 1024, "report_to": "none"},
        }
        for name in SOURCES
    ]
    return recipe(root, "specialists", student={"model": "data/demo/teacher"}, stages=stages)


def students(root: Path, steps: int) -> Path:
    """Return the recipe of the four students."""
    trained = root / "specialists" / "train"
    stages = [
        {
            "name": name,
            "losses": [{"name": "forward_kl", "weight": 0.9}, {"name": "cross_entropy", "weight": 0.1}],
            "targets": targets,
            "trainer": {"learning_rate": 1e-3, "max_steps": steps, "pack_tokens": 1024, "report_to": "none"},
        }
        for name, targets in STUDENTS.items()
    ]
    tasks = [{"name": task, "path": f"data/demo/{name}.test.jsonl.gz"} for name, task in DOMAINS.items()]
    return recipe(
        root,
        "students",
        teachers={name: _teacher(str(trained / name / "model")) for name in SOURCES},
        student={"model": "data/demo/student"},
        stages=stages,
        evaluate={"models": MODELS, "engine": "transformers", "tasks": tasks},
    )


def _teacher(model: str) -> dict[str, Any]:
    return {"model": model, "engine": "transformers", "dtype": "float32", "max_model_len": 512}


def figures_of(model: dict[str, Any]) -> Figures:
    """Return a model's scores in percent, and its distance to each specialist on that one's own domain."""
    by_layer = model["heldout"]["by_layer"]
    scores = {f"{name}, score": score for name, score in percents(model).items()}
    return scores | {f"{name}, nats to its teacher": by_layer[name]["by_source"][name]["kl_nats"] for name in SOURCES}


def main(argv: list[str] | None = None) -> int:
    """Tune, score, train and evaluate; print the table and write it into docs/teachers.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--specialist-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--root", type=Path, default=Path("runs/teachers"))
    options = parser.parse_args(argv)
    tuning = str(specialists(options.root, options.specialist_steps))
    for command in ("teach", "train"):
        decant(command, tuning)
    path = students(options.root, options.steps)
    decant("teach", str(path))
    runs = []
    for seed in options.seeds:
        found = run(path, seed, options.root)
        runs.append({name: figures_of(found[name]) for name in MODELS})
    text = table(["model", *runs[0]["routed"]], mean_rows(runs, MODELS))
    print(text)
    how = (
        f"{options.specialist_steps} steps per specialist, {options.steps} per student, seeds {options.seeds}; mean ± "
        "95 % interval (Student's t)."
    )
    said = f"{measured_by(called('tools.bench.students.teachers', argv))} {how}"
    replace_section("teachers", f"{said}\n\n{text}", Path("docs/teachers.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
