"""`make bench-quality`: the arms of quality.yaml from several seeds: is a difference more than noise?

The teacher answers and scores once; each seed trains the same stages (another order of packs, other answers in rounds)
and is evaluated on the same held-out rows and tasks. Differences are paired by seed: what two arms of one seed share
(its start, its order) falls out of them. Tables show means over seeds with 95 % intervals of Student's t.
Cost: a minute or two of a core per arm and seed, half of it for answers to 800 questions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from shared.atomic import write_atomic
from tools.bench.benchmarks_page import called, measured_by, replace_section, table
from tools.bench.students.seeds import Figures, decant, interval, mean_rows, percents, run
from tools.demo.domains import NUM_TRAIN, train_examples
from tools.demo.generate import conversations

RECIPE = "tools/bench/students/quality.yaml"
ROOT = Path("runs/quality")
ARMS = ("sft", "kd", "more", "fresh", "one", "two", "four")
PAIRS = (
    ("kd", "sft"),
    *((arm, control) for arm in ("one", "two", "four") for control in ("kd", "more", "fresh")),
)
"""Arm and control of each difference."""
NUM_FRESH = {"math": 120, "code": 120, "aiops": 120, "copy": 40}
"""Prompts beyond the demo's, which the arms `fresh` and those with rounds share."""


def write_fresh_prompts(path: Path) -> None:
    """Write the prompts that follow the demo's in each domain's train split."""
    fresh = [
        item
        for domain, count in NUM_FRESH.items()
        for item in train_examples(domain, NUM_TRAIN[domain] + count)[NUM_TRAIN[domain] :]
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, conversations(fresh), "fresh_prompts")


def figures_of(model: dict[str, Any]) -> Figures:
    """Pick the figures of one model out of a report: task scores in percent, their mean, distance to the teacher."""
    scores, heldout = percents(model), model["heldout"]
    own = heldout.get("own")
    return {
        **scores,
        "mean score": statistics.fmean(scores.values()),
        "held-out KL (nats)": heldout["kl_nats"],
        **({"KL on own answers (nats)": own["kl_nats"]} if own else {}),
        "top-1 agreement": 100 * heldout["top1_agreement"],
    }


def tables(runs: list[dict[str, Figures]], arms: list[str]) -> str:
    """The arms' means and their paired differences."""
    columns = list(runs[0][arms[0]])
    differences = [
        [
            f"{arm} - {control}",
            *(interval([one[arm][column] - one[control][column] for one in runs], "+") for column in columns),
        ]
        for arm, control in PAIRS
        if arm in arms and control in arms
    ]
    return f"{table(['arm', *columns], mean_rows(runs, arms))}\n\n{table(['difference', *columns], differences)}"


def main(argv: list[str] | None = None) -> int:
    """Run every seed, print the tables and write them into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument(
        "--section", default="quality", help="part of docs/benchmarks.md to write (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    write_fresh_prompts(ROOT / "fresh.jsonl")
    decant("teach", options.recipe)
    models = f"evaluate.models=[{', '.join(options.arms)}]"
    runs = []
    for seed in options.seeds:
        found = run(options.recipe, seed, options.root, models, stages=options.arms)
        runs.append({arm: figures_of(found[arm]) for arm in options.arms})
    text = tables(runs, options.arms)
    print(text)
    replace_section(
        options.section,
        f"{measured_by(called('tools.bench.students.quality', argv))} Seeds {options.seeds}; scores in percent; mean "
        f"± 95 % interval (Student's t), differences paired by seed.\n\n{text}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
