"""`python -m tools.bench.students.translation`: the demo's teacher into students with other tokenizers, by each loss.

For each kind of tokenizer: a student (other_tokenizers.py), the cache translated for it, and four stages from one start
over equal rows and steps: the text alone (sft), likelihoods of chunks (alm), projected heads (projected), both.
The ceiling is the demo's student with the teacher's own tokenizer. Held-out text is the same for all, so bits per byte
compare. What is there is not made again. Cost: four trainings and evaluations per kind and seed, and one per seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from shared.cache.cache import Cache
from shared.cache.layer_choice import layer_of_capture
from shared.models.files import load_config
from shared.recipe.file import load_recipe
from tools.bench.benchmarks_page import called, measured_by, replace_section, table
from tools.bench.students.other_tokenizers import KINDS, make_student, train_tokenizer
from tools.bench.students.seeds import Figures, decant, interval, mean_rows, percents, run, write_recipe


def stages(text_weight: float) -> dict[str, list[dict[str, Any]]]:
    """Return the losses of each stage, of whose weight cross-entropy has `text_weight` and what the teacher says the
    rest.
    """
    sft, rest = {"name": "cross_entropy"}, 1 - text_weight
    text = {**sft, "weight": text_weight}
    return {
        "sft": [sft],
        "alm": [{"name": "alm", "weight": rest}, text],
        "projected": [{"name": "forward_kl", "weight": rest}, text],
        "both": [{"name": "forward_kl", "weight": rest / 2}, {"name": "alm", "weight": rest / 2}, text],
    }


def figures_of(model: dict[str, Any]) -> Figures:
    """Return bits per byte and task scores in percent of one model of a report."""
    return {"bits per byte": model["heldout"]["bits_per_byte"], **percents(model)}


def against(figures: Figures, control: Figures) -> Figures:
    """Return by how much figures exceed those of a control from the same seed."""
    return {name: value - control[name] for name, value in figures.items()}


def main(argv: list[str] | None = None) -> int:
    """Run every kind and seed, print the table and write it into docs/tokenizers.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tasks", nargs="*", metavar="NAME", help="some of the demo's tasks, or none (default: all)")
    parser.add_argument("--root", type=Path, default=Path("runs/translation"))
    weight = "weight of cross-entropy beside the teacher's losses (default: %(default)s)"
    parser.add_argument("--text-weight", type=float, default=0.1, help=weight)
    section = "part of docs/tokenizers.md to write (default: %(default)s)"
    parser.add_argument("--section", default="translation", help=section)
    options = parser.parse_args(argv)
    losses = stages(options.text_weight)
    ceiling = {"kd": stages(0.1)["projected"], "sft": losses["sft"]}
    demo = load_recipe(Path(options.recipe))
    decant("teach", options.recipe)
    assert demo.student is not None, "the demo has a student"
    cache, base = Path(demo.cache[0]), Path(demo.student.model)
    opened = Cache.open_sequences(cache)
    size = load_config(base, what="the demo's student", trust_remote_code=False).vocab_size
    texts = [text for i in range(len(opened)) for text in (opened.sequence(i).prompt, opened.sequence(i).response)]
    asked = [task for task in demo.evaluate.tasks if options.tasks is None or task.name in options.tasks]
    tasks = [task.model_dump(mode="json", exclude_unset=True) for task in asked]
    layer = str(layer_of_capture(demo))
    trainer = {"learning_rate": 1e-3, "max_steps": options.steps, "pack_tokens": 1024}
    own = options.root / "own" / "recipe.yaml"
    recipes = {"teacher's own": write_recipe(own, cache, base, ceiling, tasks, trainer=trainer, targets=layer)}
    for kind in options.kinds:
        here = options.root / kind.replace(" ", "-")
        if not (here / "student/model.safetensors").exists():
            make_student(base, train_tokenizer(kind, texts, size), here / "student")
        words = ("--tokenizer", str(here / "student"), "--targets", layer)
        decant("cache", "translate", str(cache), str(here / "cache"), *words)
        own = here / "recipe.yaml"
        recipes[kind] = write_recipe(own, here / "cache", here / "student", losses, tasks, trainer=trainer)
    rows, columns = [], []
    for kind, recipe in recipes.items():
        models = [run(recipe, seed, recipe.parent) for seed in options.seeds]
        runs = [{stage: figures_of(model) for stage, model in found.items()} for found in models]
        columns = list(next(iter(runs[0].values())))
        rows += [[kind, *row] for row in mean_rows(runs, runs[0])]
        differences = {stage: [against(run[stage], run["sft"]) for run in runs] for stage in runs[0] if stage != "sft"}
        rows += [
            [kind, f"{stage} - sft", *(interval([one[column] for one in found], "+") for column in columns)]
            for stage, found in differences.items()
        ]
    text = table(["student's tokenizer", "stage", *columns], rows)
    print(text)
    said = (
        f"{measured_by(called('tools.bench.students.translation', argv))} {options.steps} steps each, seeds "
        f"{options.seeds}; scores in percent; mean ± 95 % interval, "
        "differences paired by seed."
    )
    replace_section(options.section, f"{said}\n\n{text}", Path("docs/tokenizers.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
