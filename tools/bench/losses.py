"""`python -m tools.bench.losses`: every loss on the demo, from equal starts over equal rows and steps, three seeds, one
table.

The demo's answers are reused: its cache gets a hidden layer and a layer of drawn targets. Held-out KL is measured on
the layer of 64 exact entries for all of them, whichever they were trained on. Cost: as many trainings and evaluations
as stages, for each seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from shared.recipe.file import load_recipe
from tools.bench.benchmarks_page import measured_by, replace_section, table
from tools.bench.quality import decant, figures_of, interval

DRAWN = ["capture.mode=top+sample", "capture.k=8", "capture.draws=4", "capture.mass=1", "capture.hidden=null"]
"""The second layer of targets."""


def main(argv: list[str] | None = None) -> int:
    """Train and evaluate every stage for every seed, print the table and write it into docs/losses.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/losses.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("runs/losses"))
    options = parser.parse_args(argv)
    recipe = load_recipe(Path(options.recipe))
    decant("teach", options.recipe)
    decant("teach", options.recipe, *(word for setting in DRAWN for word in ("--set", setting)))
    models = list(recipe.evaluate.models)
    runs = []
    for seed in options.seeds:
        out = options.root / f"seed{seed}"
        sets = ["--set", f"seed={seed}", "--set", f"output_dir={out}"]
        for command in ("train", "eval"):
            decant(command, options.recipe, *sets)
        decant("report", str(out))
        runs.append(json.loads((out / "report.json").read_text(encoding="utf-8"))["models"])
    per_model = {name: [figures_of(run[name]) for run in runs] for name in models}
    columns = list(per_model[models[0]][0])
    rows = [
        [name, *(interval([figures[column] for figures in per_model[name]]) for column in columns)] for name in models
    ]
    text = table(["stage", *columns], rows)
    print(text)
    steps = recipe.stages[0].trainer.max_steps
    said = (
        f"{measured_by('python -m tools.bench.losses')} {steps} steps each, seeds {options.seeds}; mean ± 95 % "
        "interval."
    )
    replace_section("losses", f"{said}\n\n{text}", Path("docs/losses.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
