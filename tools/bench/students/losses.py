"""`python -m tools.bench.students.losses`: every loss on the demo, three seeds, one table.

All start equal, over equal rows and steps. The demo's answers are reused: its cache gets a hidden layer and a layer of
drawn targets. Held-out KL is measured on the layer of 64 exact entries for all of them, whichever they were trained on.
Cost: as many trainings and evaluations as stages, for each seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shared.recipe.file import load_recipe
from tools.bench.benchmarks_page import called, measured_by, replace_section, table
from tools.bench.students.quality import figures_of
from tools.bench.students.seeds import decant, mean_rows, run

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
        runs.append({name: figures_of(found[name]) for name in models})
    text = table(["stage", *runs[0][models[0]]], mean_rows(runs, models))
    print(text)
    steps = recipe.stages[0].trainer.max_steps
    said = (
        f"{measured_by(called('tools.bench.students.losses', argv))} {steps} steps each, seeds {options.seeds}; scores "
        "and agreement in percent; mean ± 95 % interval."
    )
    replace_section(options.section, f"{said}\n\n{text}", Path("docs/losses.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
