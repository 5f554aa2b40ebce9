"""`make bench-quality`: the arms of `tools/bench/quality.yaml` from several seeds: is a difference more than noise?

The teacher answers and scores once; each seed trains the same stages (another order of packs, other answers in rounds)
and is evaluated on the same held-out rows and tasks. Differences are paired by seed: what two arms of one seed share
(its start, its order) falls out of them. Tables show means over seeds with 95 % intervals of Student's t.
Whatever is finished is used again, so that a run may be cut short and continued, or extended by seeds and arms.
Cost: a minute or two of a core per arm and seed, half of it for answers to 800 questions.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

from shared.atomic import write_atomic
from shared.errors import EvaluationError
from tools.bench.benchmarks_page import measured_by, replace_section, table
from tools.demo.domains import NUM_TRAIN, train_examples
from tools.demo.generate import conversations
from tools.own_process import own_command, own_environment

RECIPE = "tools/bench/quality.yaml"
ROOT = Path("runs/quality")
ARMS = ("sft", "kd", "more", "fresh", "one", "two", "four")
PAIRS = (
    ("kd", "sft"),
    *((arm, control) for arm in ("one", "two", "four") for control in ("kd", "more", "fresh")),
)
"""Arm and control of each difference."""
NUM_FRESH = {"math": 120, "code": 120, "aiops": 120, "copy": 40}
"""Prompts beyond the demo's, which the arms `fresh` and those with rounds share."""
STUDENT_T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantile of Student's t by number of seeds."""
Figures = dict[str, float]
"""Column -> value of one arm and seed."""


def interval(values: list[float], sign: str = "") -> str:
    """Format mean and half-width of the 95 % interval; `sign` "+" for differences."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:{sign}.4g}"
    half = STUDENT_T_975.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.4g} ± {half:.2g}"


def decant(*arguments: str) -> None:
    """Run one command of the program itself and stop with it where it fails."""
    done = subprocess.run(own_command("-m", "tools.cli", *arguments), env=own_environment(), check=False)  # noqa: S603 - our own interpreter
    if done.returncode:
        raise EvaluationError(
            f"`decant {' '.join(arguments)}` ended with exit code {done.returncode}; its message stands above"
        )


def write_fresh_prompts(path: Path) -> None:
    """Write the prompts that follow the demo's in each domain's train split."""
    drawn = [
        train_examples(domain, NUM_TRAIN[domain] + count)[NUM_TRAIN[domain] :] for domain, count in NUM_FRESH.items()
    ]
    contents = conversations(item for examples in drawn for item in examples)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != contents:
        write_atomic(path, contents, "fresh_prompts")


def run_seed(recipe: str, seed: int, arms: list[str], root: Path) -> dict[str, Figures]:
    """Train and evaluate the arms with one seed, reusing what is finished; return each arm's figures."""
    out = root / f"seed{seed}"
    sets = ["--set", f"seed={seed}", "--set", f"output_dir={out}", "--set", f"evaluate.models=[{', '.join(arms)}]"]
    for arm in arms:
        decant("train", recipe, *sets, "--from-stage", arm, "--to-stage", arm)
    decant("eval", recipe, *sets)
    decant("report", str(out))
    models = json.loads((out / "report.json").read_text())["models"]
    return {arm: figures_of(models[arm]) for arm in arms}


def figures_of(model: dict[str, dict[str, dict[str, float]]]) -> Figures:
    """Pick the figures of one model out of a report: task scores in percent, their mean, distance to the teacher."""
    heldout: dict[str, float] = model["heldout"]  # type: ignore[assignment]
    scores = {name: 100 * task["score"] for name, task in model["tasks"].items()}
    own = model["heldout"].get("own")
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
    means = [[arm, *(interval([run[arm][column] for run in runs]) for column in columns)] for arm in arms]
    differences = [
        [
            f"{arm} - {control}",
            *(interval([run[arm][column] - run[control][column] for run in runs], "+") for column in columns),
        ]
        for arm, control in PAIRS
        if arm in arms and control in arms
    ]
    return f"{table(['arm', *columns], means)}\n\n{table(['difference', *columns], differences)}"


def main(argv: list[str] | None = None) -> int:
    """Run every seed, print the tables and write them into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args(argv)
    write_fresh_prompts(ROOT / "fresh.jsonl")
    decant("teach", options.recipe)
    runs = [run_seed(options.recipe, seed, options.arms, options.root) for seed in options.seeds]
    text = tables(runs, options.arms)
    print(text)
    replace_section(
        "quality",
        f"{measured_by('make bench-quality')} Seeds {options.seeds}; scores in percent; mean ± 95 % interval "
        f"(Student's t), differences paired by seed.\n\n{text}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
