"""The fused loss beside the plain form of the same loss, and beside itself without the teacher.

Plain: logits of all positions, their log-softmax, gathers at the support, the tail as 1 - sum, and torch's own
    cross-entropy.
Both give the same loss, which is checked. Times are medians over pairs that alternate which comes first, since a shared
machine drifts; peak memory is each form's own, in a process of its own: what the process grew by while it made loss and
gradients.
Cost: about 2 minutes on 2 idle cores and 5 GB for the plain form.

Shape letters: S positions, H width, V vocabulary, K entries of the support.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from tools.bench.process_memory import memory_mib
from tools.own_process import own_command, own_environment

NUM_POSITIONS, WIDTH, VOCABULARY, K = 2048, 256, 151_936, 64
NUM_PAIRS = int(os.environ.get("DECANT_BENCH_PAIRS", "5"))
KD_WEIGHT, CE_WEIGHT = 0.9, 0.1


def make_inputs(*, frozen: bool) -> dict[str, Any]:
    """Return hidden states [S, H], a head [V, H], labels [S] and a made-up teacher: Zipf-like masses, 0.95 in the
    support.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_POSITIONS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(2.0 / WIDTH**0.5).requires_grad_(not frozen)
    stride = VOCABULARY // K  # one id in each of K equal ranges: spread over the vocabulary, none twice
    ids = torch.arange(K) * stride + torch.randint(0, stride, (NUM_POSITIONS, K), generator=generator)
    masses = torch.arange(1, K + 1, dtype=torch.float64) ** -1.5
    logprobs = (0.95 * masses / masses.sum()).log().float().expand(NUM_POSITIONS, K).contiguous()
    batch = {
        "support_counts": torch.full((NUM_POSITIONS,), K, dtype=torch.int32),
        "support_ids": ids.reshape(-1),
        "support_logprobs": logprobs.reshape(-1),
        "tail_logmass": torch.full((NUM_POSITIONS, 1), 0.05).log(),
        "temperatures": torch.ones(1, dtype=torch.float64),
    }
    return {
        "hidden": hidden,
        "weight": weight,
        "labels": ids[:, 0].clone(),
        "ids": ids,
        "logprobs": logprobs,
        "batch": batch,
    }


def plain_loss(inputs: dict[str, Any]) -> Any:
    """Return the loss by way of [S, V] logits."""
    import torch

    logits = inputs["hidden"] @ inputs["weight"].t()
    log_q = logits.log_softmax(-1).gather(1, inputs["ids"])
    log_p = inputs["logprobs"]
    tail_q = torch.log(-torch.expm1(log_q.logsumexp(-1)))
    tail_p = torch.log(-torch.expm1(log_p.logsumexp(-1)))
    kd = (log_p.exp() * (log_p - log_q)).sum(-1) + tail_p.exp() * (tail_p - tail_q)
    return KD_WEIGHT * kd.mean() + CE_WEIGHT * torch.nn.functional.cross_entropy(logits, inputs["labels"])


def fused_loss(inputs: dict[str, Any], *, with_teacher: bool = True) -> Any:
    """Return the same loss by the fused operator, or its cross-entropy alone."""
    from student_train.batch.target_batch import TargetBatch
    from student_train.losses import LossTerm
    from student_train.operator.fused_loss import fused_sparse_loss

    targets = TargetBatch.from_batch(inputs["batch"]) if with_teacher else None
    terms = [LossTerm("cross_entropy", CE_WEIGHT)] + [LossTerm("forward_kl", KD_WEIGHT)] * with_teacher
    return fused_sparse_loss(inputs["hidden"], inputs["weight"], inputs["labels"], targets, terms, NUM_POSITIONS).loss


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plain": plain_loss,
    "fused": fused_loss,
    "ce_alone": lambda inputs: fused_loss(inputs, with_teacher=False),
}


def step_seconds(form: str, inputs: dict[str, Any]) -> tuple[float, float, float]:
    """Make loss and gradients once; return seconds by the clock, seconds of processor time, and the loss."""
    inputs["hidden"].grad = inputs["weight"].grad = None
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = FORMS[form](inputs)
    loss.backward()
    return time.perf_counter() - start, time.process_time() - cpu_start, float(loss.detach())


def alternating_pairs(first: str, second: str, *, frozen: bool) -> dict[str, float]:
    """Return medians of `NUM_PAIRS` pairs: seconds of each form, first over second by clock.

    `cpu_ratio` is first over second by the least processor time of each, which a busy machine disturbs least.
    """
    inputs = make_inputs(frozen=frozen)
    for form in (first, second):
        step_seconds(form, inputs)
    rows = []
    for i in range(NUM_PAIRS):
        order = (first, second) if i % 2 == 0 else (second, first)
        measured = {form: step_seconds(form, inputs) for form in order}
        rows.append((*measured[first], *measured[second]))
    if "plain" in (first, second):
        a, b = rows[0][2], rows[0][5]
        assert abs(a - b) < 1e-4 * abs(b), f"the two forms disagree: {a} and {b}"
    return {
        "first_seconds": statistics.median(row[0] for row in rows),
        "second_seconds": statistics.median(row[3] for row in rows),
        "ratio": statistics.median(row[0] / row[3] for row in rows),
        "cpu_ratio": min(row[1] for row in rows) / min(row[4] for row in rows),
    }


def peak_mb(form: str) -> float:
    """Return the megabytes (10^6 bytes) by which this process grows while it makes loss and gradients once."""
    inputs = make_inputs(frozen=False)
    before = memory_mib("VmHWM")
    step_seconds(form, inputs)
    return (memory_mib("VmHWM") - before) * 2**20 / 1e6


def peak_mb_in_own_process(form: str) -> float:
    """Return `peak_mb` of a fresh process."""
    command = own_command("-m", "tools.bench.operator_bench", form)
    child = subprocess.run(  # noqa: S603 - our own interpreter
        command, env=own_environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    return float(child.stdout)


def run() -> dict[str, Any]:
    """Measure everything; seconds per loss with gradients, megabytes, ratios."""
    plain_peak, fused_peak = peak_mb_in_own_process("plain"), peak_mb_in_own_process("fused")
    forms = alternating_pairs("plain", "fused", frozen=False)
    trained = alternating_pairs("fused", "ce_alone", frozen=False)
    frozen = alternating_pairs("fused", "ce_alone", frozen=True)
    return {
        "positions": NUM_POSITIONS,
        "width": WIDTH,
        "vocabulary": VOCABULARY,
        "k": K,
        "plain_seconds": forms["first_seconds"],
        "fused_seconds": forms["second_seconds"],
        "plain_over_fused_seconds": forms["ratio"],
        "plain_peak_mb": plain_peak,
        "fused_peak_mb": fused_peak,
        "plain_over_fused_peak": plain_peak / fused_peak,
        "kd_over_ce_trained": trained["ratio"],
        "kd_over_ce_trained_cpu": trained["cpu_ratio"],
        "kd_over_ce_frozen": frozen["ratio"],
        "kd_over_ce_frozen_cpu": frozen["cpu_ratio"],
    }


if __name__ == "__main__":
    print(peak_mb(sys.argv[1]) if len(sys.argv) > 1 else json.dumps(run(), indent=2))
