"""A finished run as it lies on disk, with figures that a test can recognise; no model, no training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np

from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.keys import group_key, row_key
from shared.parts.sequences import make_row
from shared.payload.targets import SparseTargets

RECIPE = """name: {name}
output_dir: {root}
teacher: {{model: {root}/teacher}}
cache: {root}/cache
student: {{model: {root}/student}}
stages:
  - {{name: sft, losses: [{{name: cross_entropy}}]}}
  - {{name: kd, losses: [{{name: forward_kl, weight: 0.9}}, {{name: cross_entropy, weight: 0.1}}]}}
evaluate:
  models: [teacher, base, sft, kd]
  tasks:
    - {{name: gsm8k, path: math.test.jsonl}}
    - {{name: humaneval, path: code.test.jsonl}}
    - {{name: keywords, path: aiops.test.jsonl}}
"""
SCORES = {"teacher": (0.92, 0.88, 0.97), "base": (0.05, 0.0, 0.21), "sft": (0.41, 0.52, 0.66), "kd": (0.55, 0.61, 0.74)}
KL = {"teacher": 0.0003, "base": 2.41, "sft": 0.33, "kd": 0.12}
DOMAINS = {"math": "gsm8k", "code": "humaneval", "aiops": "keywords"}
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> & \"quotes\" \x1b[31m ]]> `|` \u202e"


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_run(root: Path, name: str = "demo") -> Path:
    """Write a run that finished, and return its directory."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "recipe.yaml").write_text(RECIPE.format(name=name, root=root))
    write_json(root / "seconds.json", {"teach": 61.2, "train.sft": 70.0, "train.kd": 83.5, "evaluate": 95.1})
    for model, scores in SCORES.items():
        write_evaluation(root, model, dict(zip(DOMAINS, scores, strict=True)), KL[model])
    for stage in ("sft", "kd"):
        write_stage(root / "train" / stage, ["cross_entropy"] if stage == "sft" else ["forward_kl", "cross_entropy"])
    write_cache(root / "cache")
    return root


def write_evaluation(root: Path, model: str, scores: dict[str, float], kl: float) -> None:
    tasks = {
        domain: {"task": DOMAINS.get(domain, "gsm8k"), "metric": f"metric of {domain}", "score": score, "low": max(0,
        score - 0.08),
                 "high": min(1, score + 0.08), "num_questions": 100, "extra": {}, "samples": 1, "temperature": 0.0,
                 "truncated": 0.01, "mean_tokens": 41.5}
        for domain, score in scores.items()
    }  # fmt: skip
    bins = [
        {"low": 0.1 * i, "high": 0.1 * (i + 1), "positions": 500, "confidence": 0.1 * i + 0.06, "right": 0.09 * i}
        for i in range(10)
    ]
    part = {"kl_nats": 2 * kl, "top1_agreement": 0.515, "top1_in_teacher_top5": 0.737, "calibration_error": 0.0471,
            "positions": 1234, "perplexity": 4.0}  # fmt: skip
    heldout = {"kl_nats": kl, "kl_low": kl * 0.9, "kl_high": kl * 1.1, "top1_agreement": 1 / (1 + kl),
    "perplexity": 3 + kl,
               "teacher_perplexity": 3.0, "positions": 5000, "rows": 120, "rows_too_long": 0,
               "top1_in_teacher_top5": 0.876, "acceptance_rate": 0.9, "acceptance_rate_at_most": 0.95,
               "calibration_error": 0.0321, "calibration": bins,
               "agreement_by_teacher_confidence": bins, "by_source": {"math": part, "code": part}}  # fmt: skip
    heldout["partings"] = [
        {"kl_nats": 3.25, "source": "math", "before": "The answer is ", "token": HOSTILE, "after": " apples.\n",
         "teacher": [["12", 0.75], [HOSTILE, 0.125]], "student": [[" ", 0.5], ["13", 0.25]],
         "token_probability": {"teacher": 0.125, "student": 0.0005}},
        {"kl_nats": "not a number"},
    ]  # fmt: skip
    identity = {"engine": "transformers", "weights": model}
    result = {"identity": identity, "tasks": tasks, "heldout": heldout, "seconds": {"answer": 9.0}}
    write_json(root / "evaluate" / f"{model}.json", result)
    rng = random.Random(model)
    lines = []
    for domain, score in scores.items():
        for question in range(12):
            value = float(rng.random() < score)
            answer = (
                f"{model} thinks about {domain} {question}.\n"
                + "so it goes on and on, " * rng.randrange(1, 9)
                + "\n#### 7"
            )
            row = {"domain": domain, "question": question,
            "prompt": f"Question {question} of {domain}?\n" + "with some words " * 9,
                   "reference": "the reference", "answer": HOSTILE if question == 0 else answer, "score": value,
                   "reason": "" if value else "7 instead of 8", "tokens": 40 + question,
                   "truncated": False}  # fmt: skip
            lines.append(json.dumps(row))
    (root / "evaluate" / f"{model}.answers.jsonl").write_text("\n".join(lines) + "\n")


def write_stage(directory: Path, terms: list[str], steps: int = 400) -> None:
    rng = random.Random(len(terms))
    rows = []
    for step in range(1, steps + 1):
        values = {
            term: (3 + index) * math.exp(-step / 90) + 0.4 + 0.1 * rng.random() for index, term in enumerate(terms)
        }
        rows.append(
            {"step": step, "loss": sum(values.values()), "terms": values, "grad_norm": 1.0, "learning_rate": 1e-3}
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checks = {"all_steps_done": True, "losses_finite": True, "grad_norms_bounded": True, "model_saved": True}
    write_json(
        directory / "health.json", {"healthy": True, "checks": checks, "steps_done": steps, "steps_planned": steps}
    )


def write_cache(path: Path, num_rows: int = 30, *, scored: bool = True) -> None:
    identity = SequencesIdentity(tokenizer_hash="t" * 32, vocab_size=1000)
    writer = CacheWriter.create_or_open(path, identity, {})
    rng = np.random.default_rng(1)
    rows, targets = [], []
    for number in range(num_rows):
        ids = rng.integers(0, 1000, size=40)
        group = group_key(f"prompt {number}")
        rows.append(
            make_row(row_key=row_key(group, None, 0, "a"), group_key=group, source=list(DOMAINS)[number % 3],
            prompt="p",
                     response="a", reference=None, token_ids=ids, spans=[(10, 40)], finish_reason="given")
        )  # fmt: skip
        counts = rng.integers(1, 17, size=30).astype(np.int32)
        support, logprobs, tails = [], [], []
        for count in counts:
            masses = np.sort(rng.dirichlet(np.full(count + 1, 0.3)))[::-1].clip(1e-6)
            masses /= masses.sum()
            support.append(rng.permutation(1000)[:count])
            logprobs.append(np.log(masses[:-1]))
            tails.append(np.log(masses[-1]))
        targets.append(
            SparseTargets(counts, np.concatenate(support).astype(np.int32), np.concatenate(logprobs).astype(np.float32),
                          np.full(30, -2.0, np.float32), np.array(tails, np.float32)[:, None])
        )  # fmt: skip
    writer.write_sequences("part-00000000-000000", rows, {})
    if not scored:
        return
    layer = LayerIdentity(
        teacher="teacher", weights_hash="w", tokenizer_hash="t" * 32, vocab_size=1000, mode="top", k=16
    )
    LayerWriter.create_or_open(writer, None, layer, {}).write(
        "part-00000000-000000", [row.key for row in rows], targets, {}
    )
