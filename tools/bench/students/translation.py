"""`python -m tools.bench.students.translation`: the demo's teacher into students with other tokenizers, by each loss.

For each kind of tokenizer: a student (other_tokenizers.py), the cache translated for it, and four stages from one start
over equal rows and steps: the text alone (sft), likelihoods of chunks (alm), projected heads (projected), both.
"single digits" is the other direction: a teacher that joins digits, and the demo's student with its own tokenizer.
The ceiling of each teacher is a student with its tokenizer. Held-out text is the same for all students of a teacher, so
their bits per byte compare. What is there is not made again. Cost: four trainings and evaluations per kind and seed,
two per teacher and seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shared.cache.cache import Cache
from shared.cache.layer_choice import layer_of_capture
from shared.models.files import load_config, load_tokenizer
from shared.recipe.file import load_recipe
from tools.bench.benchmarks_page import called, measured_by, replace_section, table
from tools.bench.students.other_tokenizers import KINDS, joining_teacher, train_tokenizer, with_tokenizer
from tools.bench.students.seeds import Figures, decant, interval, mean_rows, percents, run, write_recipe

OWN, SINGLE_DIGITS = "teacher's own", "single digits"


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


def taught(recipe: str, *overrides: str) -> tuple[Path, str]:
    """Build what a teacher says; returns the cache and the layer's name."""
    decant("teach", recipe, *(word for one in overrides for word in ("--set", one)))
    demo = load_recipe(Path(recipe), overrides)
    return Path(demo.cache[0]), str(layer_of_capture(demo))


def other_tokenizer(kind: str, base: Path, cache: Path) -> Any:
    """Train a tokenizer of a kind on a cache's texts, as large as the model's."""
    opened = Cache.open_sequences(cache)
    rows = (opened.sequence(i) for i in range(len(opened)))
    texts = [text for row in rows for text in (row.prompt, row.response)]
    return train_tokenizer(
        kind, texts, load_config(base, what="the demo's student", trust_remote_code=False).vocab_size
    )


@dataclass(frozen=True)
class Pairs:
    """The recipes of all students; what is there is not made again."""

    root: Path
    base: Path
    text_weight: float
    of_all: dict[str, Any]
    """What every recipe says: `tasks` and the stages' `trainer`."""

    def with_tokens(self, out: Path, make: Callable[[], Any]) -> Path:
        """Return the directory of the demo's student with another tokenizer."""
        if not (out / "model.safetensors").exists():
            with_tokenizer(self.base, make(), out)
        return out

    def translated(self, kind: str, cache: Path, layer: str, student: Path) -> Path:
        """Translate a cache for a student and return the recipe of its stages."""
        out = self.root / kind.replace(" ", "-")
        decant("cache", "translate", str(cache), str(out / "cache"), "--tokenizer", str(student), "--targets", layer)
        return write_recipe(out / "recipe.yaml", out / "cache", student, stages(self.text_weight), **self.of_all)

    def ceiling(self, out: Path, cache: Path, layer: str, student: Path) -> Path:
        """Return the recipe of students with the teacher's tokenizer: the text alone, and distributions."""
        losses = {"kd": stages(0.1)["projected"], "sft": stages(self.text_weight)["sft"]}
        return write_recipe(out / "recipe.yaml", cache, student, losses, **self.of_all, targets=layer)

    def of_the_demos_teacher(self, kind: str, cache: Path, layer: str) -> Path:
        """Return the recipe of a kind of student of the demo's teacher."""
        if kind == OWN:
            return self.ceiling(self.root / "own", cache, layer, self.base)
        make = partial(other_tokenizer, kind, self.base, cache)
        student = self.with_tokens(self.root / kind.replace(" ", "-") / "student", make)
        return self.translated(kind, cache, layer, student)

    def of_a_joining_teacher(self, recipe: str, demo_teacher: Path) -> dict[str, Path]:
        """Return the recipes of the students of a teacher that joins digits."""
        root = self.root / "joining"
        teacher = joining_teacher(demo_teacher, root)
        places = {"teacher.model": teacher, "cache": root / "cache", "output_dir": root / "run"}
        cache, layer = taught(recipe, *(f"{key}={path}" for key, path in places.items()))
        student = self.with_tokens(root / "student", partial(load_tokenizer, teacher, trust_remote_code=False))
        return {
            "joining teacher's own": self.ceiling(root / "own", cache, layer, student),
            SINGLE_DIGITS: self.translated(SINGLE_DIGITS, cache, layer, self.base),
        }


def rows_of(kind: str, runs: Sequence[dict[str, Figures]]) -> list[list[str]]:
    """Return the table's rows of one kind: each stage, then what each is ahead of the text alone."""
    differences = {stage: [against(run[stage], run["sft"]) for run in runs] for stage in runs[0] if stage != "sft"}
    return [[kind, *row] for row in mean_rows(runs, runs[0])] + [
        [kind, f"{stage} - sft", *(interval([one[column] for one in found], "+") for column in runs[0]["sft"])]
        for stage, found in differences.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Run every kind and seed, print the table and write it into docs/tokenizers.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    kinds = [OWN, *KINDS, SINGLE_DIGITS]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tasks", nargs="*", metavar="NAME", help="some of the demo's tasks, or none (default: all)")
    parser.add_argument("--root", type=Path, default=Path("runs/translation"))
    weight = "weight of cross-entropy beside the teacher's losses (default: %(default)s)"
    parser.add_argument("--text-weight", type=float, default=0.5, help=weight)
    section = "part of docs/tokenizers.md to write (default: %(default)s)"
    parser.add_argument("--section", default="translation", help=section)
    options = parser.parse_args(argv)
    demo = load_recipe(Path(options.recipe))
    assert demo.student is not None, "the demo has a student"
    assert demo.teacher is not None, "the demo has a teacher"
    asked = [task for task in demo.evaluate.tasks if options.tasks is None or task.name in options.tasks]
    tasks = [task.model_dump(mode="json", exclude_unset=True) for task in asked]
    trainer = {"learning_rate": 1e-3, "max_steps": options.steps, "pack_tokens": 1024}
    base, of_all = Path(demo.student.model), {"tasks": tasks, "trainer": trainer}
    pairs = Pairs(options.root, base, options.text_weight, of_all)
    taught_by_demo = taught(options.recipe)
    of_demo = [kind for kind in options.kinds if kind != SINGLE_DIGITS]
    recipes = {kind: pairs.of_the_demos_teacher(kind, *taught_by_demo) for kind in of_demo}
    if SINGLE_DIGITS in options.kinds:
        recipes |= pairs.of_a_joining_teacher(options.recipe, Path(demo.teacher.model))
    rows, columns = [], []
    for kind, recipe in recipes.items():
        models = [run(recipe, seed, recipe.parent) for seed in options.seeds]
        runs = [{stage: figures_of(model) for stage, model in found.items()} for found in models]
        columns = list(runs[0]["sft"])
        rows += rows_of(kind, runs)
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
