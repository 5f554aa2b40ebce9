"""`make bench-quality`: the demo's students trained from several seeds, so that a difference is more than noise.

The teacher's cache is the demo's and is reused; each seed trains the same stages (another order of packs, another
dropout) and is evaluated on the same held-out rows and tasks, once as the recipe says and once with several sampled
answers per question, which is both less noisy and closer to what was distilled. The tables show the mean over seeds and
a 95 % interval of Student's t.
Cost: two trainings and four evaluations per seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

from shared.errors import EvaluationError
from shared.recipe.file import load_recipe
from tools.bench.benchmarks_page import measured_by, replace_section, table
from tools.own_process import own_command, own_environment

STUDENT_T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantile of Student's t by number of seeds."""


def interval(values: list[float]) -> str:
    """Format mean and half-width of the 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4g}"
    half = STUDENT_T_975.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.4g} ± {half:.2g}"


def decant(*arguments: str) -> None:
    """Run one command of the program itself and stop with it where it fails."""
    done = subprocess.run(own_command("-m", "tools.cli", *arguments), env=own_environment(), check=False)  # noqa: S603 - our own interpreter
    if done.returncode:
        raise EvaluationError(
            f"`decant {' '.join(arguments)}` ended with exit code {done.returncode}; its message stands above"
        )


def run_seed(
    recipe: str, seed: int, models: list[str], root: Path, num_samples: int
) -> list[dict[str, dict[str, object]]]:
    """Train the recipe's stages with one seed; return the report's `models` as the recipe evaluates and with sampled
    answers.
    """
    out = root / f"seed{seed}"
    sets = ["--set", f"seed={seed}", "--set", f"output_dir={out}", "--set", f"evaluate.models=[{', '.join(models)}]"]
    decant("train", recipe, *sets)
    num_tasks = len(load_recipe(Path(recipe)).evaluate.tasks)
    fields = {"temperature": 1.0, "samples": num_samples}
    sampled = [f"evaluate.tasks.{task}.{name}={value}" for task in range(num_tasks) for name, value in fields.items()]
    reports = []
    for more in ([], [word for setting in sampled for word in ("--set", setting)]):
        decant("eval", recipe, *sets, *more)
        decant("report", str(out))
        reports.append(json.loads((out / "report.json").read_text())["models"])
    return reports


def figures_of(model: dict[str, object]) -> dict[str, float]:
    """Pick the figures of one model out of a report: tasks, their mean, distance to the teacher."""
    tasks: dict[str, dict[str, float]] = model["tasks"]  # type: ignore[assignment]
    heldout: dict[str, float] = model["heldout"]  # type: ignore[assignment]
    scores = {name: task["score"] for name, task in tasks.items()}
    return {
        **scores,
        "mean score": statistics.fmean(scores.values()),
        "held-out KL (nats)": heldout["kl_nats"],
        "top-1 agreement": heldout["top1_agreement"],
        "perplexity": heldout["perplexity"],
    }


def main(argv: list[str] | None = None) -> int:
    """Run every seed, print the table and write it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=["sft", "kd"])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--root", type=Path, default=Path("runs/quality"))
    options = parser.parse_args(argv)
    decant("teach", options.recipe)
    runs = [run_seed(options.recipe, seed, options.models, options.root, options.samples) for seed in options.seeds]
    texts = []
    for which, how in enumerate(
        ["Answers as the recipe says.", f"{options.samples} answers per question, sampled at temperature 1."]
    ):
        per_model = {name: [figures_of(run[which][name]) for run in runs] for name in options.models}
        columns = list(per_model[options.models[0]][0])
        rows = [
            [name, *(interval([figures[column] for figures in per_model[name]]) for column in columns)]
            for name in options.models
        ]
        texts.append(f"{how}\n\n{table(['model', *columns], rows)}")
    text = "\n\n".join(texts)
    print(text)
    replace_section(
        "quality",
        f"{measured_by('make bench-quality')} Seeds {options.seeds}; mean ± 95 % interval (Student's t).\n\n{text}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
