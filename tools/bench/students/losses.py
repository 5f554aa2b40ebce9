"""`python -m tools.bench.students.losses`: every loss on the demo, three seeds, one table.

All start equal, over equal rows and steps. The demo's answers are reused: its cache gets a hidden layer and a layer of
drawn targets. Held-out KL is measured on the layer of 64 exact entries for all of them, whichever they were trained on.
Cost: as many trainings and evaluations as stages, for each seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from shared.recipe.file import load_recipe
from shared.recipe.recipe import Recipe
from tools.bench.benchmarks_page import called, measured_by, replace_section, table
from tools.bench.students.quality import figures_of
from tools.bench.students.seeds import Figures, decant, mean_rows, run
from tools.evaluate.heldout.heldout import evaluate_heldout
from tools.evaluate.results.results import heldout_layer

DRAWN = ["capture.mode=top+sample", "capture.k=8", "capture.draws=4", "capture.mass=1", "capture.hidden=null"]
"""The second layer of targets."""


def main(argv: list[str] | None = None) -> int:
    """Train and evaluate every stage for every seed, print the table and write it into docs/losses.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/losses.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("runs/losses"))
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="some of the recipe's (default: all)")
    parser.add_argument("--section", default="losses", help="part of docs/losses.md to write (default: %(default)s)")
    options = parser.parse_args(argv)
    recipe = load_recipe(Path(options.recipe))
    decant("teach", options.recipe)
    decant("teach", options.recipe, *(word for setting in DRAWN for word in ("--set", setting)))
    models = options.stages or recipe.evaluate.models
    runs = []
    for seed in options.seeds:
        evaluated = f"evaluate.models=[{', '.join(models)}]"
        found = run(options.recipe, seed, options.root, evaluated, stages=options.stages or ())
        of_seed = options.root / f"seed{seed}"
        runs.append({name: figures_on_one_layer(recipe, of_seed, name, found[name]) for name in models})
    text = table(["stage", *runs[0][models[0]]], mean_rows(runs, models))
    print(text)
    steps = recipe.stages[0].trainer.max_steps
    said = (
        f"{measured_by(called('tools.bench.students.losses', argv))} {steps} steps each, seeds {options.seeds}; scores "
        "and agreement in percent; mean ± 95 % interval."
    )
    replace_section(options.section, f"{said}\n\n{text}", Path("docs/losses.md"))
    return 0


def figures_on_one_layer(recipe: Recipe, run_dir: Path, name: str, model: dict[str, Any]) -> Figures:
    """Pick a stage's figures out of a report; held-out ones against the first stage's layer, whichever it learned
    from.
    """
    layer = heldout_layer(recipe)
    if heldout_layer(recipe, name) == layer:
        return figures_of(model)
    heldout = evaluate_heldout(
        run_dir / "train" / name / "model",
        recipe.cache,
        recipe.heldout.fraction,
        recipe=recipe,
        targets=layer,
        max_rows=recipe.evaluate.heldout_rows,
        seed=recipe.seed,
    )
    return figures_of({**model, "heldout": heldout})


if __name__ == "__main__":
    sys.exit(main())
