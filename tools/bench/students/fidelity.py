"""`python -m tools.bench.students.fidelity --seeds 3`: on cached targets against a live teacher.

The demo's student learns 0.9 forward KL + 0.1 cross-entropy from the demo's teacher, in equal steps over the same rows
in the same order from the same seeds; only where the teacher's distribution comes from differs. Live: the teacher is in
memory and the divergence is taken over its full vocabulary, in plain PyTorch and autograd. Cached: a layer of the
cache, captured by the same weights in float32. Judged by the held-out KL over the full vocabulary to the live teacher,
in float64, mean over seeds. Cost: one training per capture and seed; finished ones are reused.

Shape letters: S supervised positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from shared.cache.cache import Cache
from shared.errors import EvaluationError, UsageError
from shared.models.weights.loading import load_causal_lm
from shared.recipe.file import load_recipe
from shared.recipe.recipe import Recipe
from student_train.evaluate.heldout_rows import heldout_rows
from student_train.stage.stage_run import run_stage
from student_train.student.forward_patch import Objective, patch_forward
from student_train.student.row_separation import separate_rows
from student_train.student.student_head import StudentHead, body_of, head_of, run_body
from tools.bench.benchmarks_page import called, measured_by, replace_section, table
from tools.bench.students.seeds import decant

LIVE = "live, full vocabulary"
CAPTURES: dict[str, dict[str, Any]] = {
    "top 64": {"mode": "top", "k": 64, "mass": 1.0},
    "top 64, mass 0.999": {"mode": "top", "k": 64, "mass": 0.999},
    "12 draws": {"mode": "sample", "draws": 12},
    "top 8 + 4 draws": {"mode": "top+sample", "k": 8, "draws": 4, "mass": 1.0},
}
"""What is captured, by the name in the table."""
TEACHER = ("teacher.engine=transformers", "teacher.dtype=float32")
"""The cached targets come from exactly what the live teacher computes."""


def overrides(options: argparse.Namespace, capture: str | None, seed: int = 0) -> list[str]:
    """Return what is set over the recipe for one capture and seed; None for the live teacher."""
    name = (capture or LIVE).replace(" ", "-").replace(",", "")
    sets = [
        *TEACHER,
        f"cache={options.root / 'cache'}",
        f"seed={seed}",
        f"output_dir={options.root / name / f'seed{seed}'}",
    ]
    settings = CAPTURES[capture or next(iter(CAPTURES))]
    sets += [f"capture={json.dumps(settings)}"]
    return sets if options.steps is None else [*sets, f"stages.kd.trainer.max_steps={options.steps}"]


def patch_live(model: Any, objective: Objective, teacher: Any) -> None:
    """Make `model` return the dense loss of a batch against a live teacher, over the whole vocabulary."""
    body, student_head = body_of(model), objective.head
    teacher_head = head_of(teacher, student_head.vocab_size)

    def forward(self: Any, input_ids: Tensor, position_ids: Tensor, labels: Tensor, **kwargs: Any) -> CausalLMOutput:
        """Return the loss against the live teacher in the place of the cached one."""
        index = kwargs["predictor_index"]
        with torch.no_grad():
            p = logprobs(body_of(teacher), teacher_head, input_ids, position_ids, index)
        q = logprobs(body, student_head, input_ids, position_ids, index)
        num_positions = kwargs.get("num_items_in_batch", labels.numel())
        values = {
            "forward_kl": (p.exp() * (p - q)).sum() / num_positions,
            "cross_entropy": -q.gather(1, labels[:, None]).sum() / num_positions,
        }
        loss = torch.stack([term.weight * values[term.name] for term in objective.terms]).sum()
        objective.record(loss, values)
        return CausalLMOutput(loss=loss)

    model.forward = MethodType(forward, model)


def logprobs(body: Any, head: StudentHead, input_ids: Tensor, position_ids: Tensor, index: Tensor) -> Tensor:
    """Return natural logs [S, V] of the full softmax at the positions that predict."""
    return head.logits(run_body(body, input_ids, position_ids)[0].index_select(0, index)).log_softmax(-1)


def dense_kl(teacher: Any, student: Any, cache: Cache, fraction: float) -> float:
    """Return the held-out KL in nats per position, over the full vocabulary, in float64; each row alone."""
    total, positions = 0.0, 0
    heads = [head_of(model, cache.sequences_identity.vocab_size) for model in (teacher, student)]
    for _, number in heldout_rows([cache], fraction, None):
        row = cache[number]
        ids = torch.from_numpy(row.token_ids.astype("int64"))[None]
        order, index = torch.arange(ids.shape[1])[None], torch.from_numpy(row.predictor_index().astype("int64"))
        with torch.no_grad():
            hidden = [run_body(body_of(model), ids, order)[0].index_select(0, index) for model in (teacher, student)]
            p, q = (head.logits(states).double().log_softmax(-1) for head, states in zip(heads, hidden, strict=True))
        total += float((p.exp() * (p - q)).sum())
        positions += len(index)
    if not positions:
        raise EvaluationError(f"{cache.path} has no held-out rows at heldout.fraction {fraction:g}; raise it")
    return total / positions


def load(directory: Path | str) -> Any:
    """Load a model in float32, to be asked and not trained."""
    return load_causal_lm(directory, what="the model", trust_remote_code=False, dtype=torch.float32).eval()


def train(recipe: Recipe, teacher: Any | None) -> Path:
    """Train the recipe's stage `kd`, live where a teacher is given; return its model's directory."""
    patch = patch_forward if teacher is None else partial(patch_live, teacher=teacher)
    return run_stage(recipe, recipe.stage("kd"), patch)


def summary(kl: Mapping[str, Sequence[float]], sizes: Mapping[str, float]) -> str:
    """Return the table."""
    live = statistics.fmean(kl[LIVE])
    rows = []
    for name, values in kl.items():
        mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        size = f"{sizes[name]:.1f}" if name in sizes else "-"
        rows.append([name, size, f"{mean:.5f}", f"{spread:.5f}", f"{100 * (mean / live - 1):+.2f} %"])
    return table(
        ["targets", "bytes per position", "held-out KL (nats)", "standard deviation over seeds", "over live"], rows
    )


def main(argv: list[str] | None = None) -> int:
    """Train every capture from every seed, print the table and write it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/demo/cache"), help="whose answers are used, as `decant teach` built it"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps; left out: the recipe's")
    parser.add_argument("--captures", nargs="+", default=list(CAPTURES), choices=list(CAPTURES))
    parser.add_argument("--root", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--no-page", action="store_true", help="print only, leave docs/benchmarks.md as it is")
    options = parser.parse_args(argv)
    if not (options.cache / "cache.json").is_file():
        raise UsageError(
            f"there is no cache in {options.cache}; build it with `decant teach {options.recipe}`, or name it with "
            "--cache"
        )
    if not (options.root / "cache").exists():
        shutil.copytree(options.cache, options.root / "cache")
    sizes: dict[str, float] = {}
    for name in options.captures:
        sets = overrides(options, name)
        decant("teach", str(options.recipe), *(word for setting in sets for word in ("--set", setting)))
        recipe = load_recipe(options.recipe, sets)
        sizes[name] = _bytes_per_position(recipe)
    recipe = load_recipe(options.recipe, overrides(options, None))
    assert recipe.teacher is not None
    teacher = load(recipe.teacher.model)
    cache = Cache.open_sequences(recipe.cache[0])
    separate_rows(teacher, cache.sequences_identity.vocab_size)
    kl: dict[str, list[float]] = {name: [] for name in (LIVE, *options.captures)}
    for seed in range(options.seeds):
        for name, values in kl.items():
            live = name == LIVE
            student = load(
                train(
                    load_recipe(options.recipe, overrides(options, None if live else name, seed)),
                    teacher if live else None,
                )
            )
            values.append(dense_kl(teacher, student, cache, recipe.heldout.fraction))
            print(f"seed {seed}, {name}: {values[-1]:.5f} nats", file=sys.stderr, flush=True)
    text = summary(kl, sizes)
    print(text)
    if not options.no_page:
        command = called("tools.bench.students.fidelity", argv)
        replace_section("fidelity", f"## Cached targets against a live teacher\n\n{measured_by(command)}\n\n{text}")
    return 0


def _bytes_per_position(recipe: Recipe) -> float:
    """Return what the targets of a recipe's capture take."""
    from shared.cache.layer_choice import layer_of_capture

    return float(Cache.open(recipe.cache[0], layer_of_capture(recipe)).stats()["bytes_per_position"])


if __name__ == "__main__":
    sys.exit(main())
