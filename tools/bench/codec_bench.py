"""What the codec costs: bytes per position, KL error, positions per second and core.

Two teachers bound what real ones need: random ids (shared by nobody's model, the worst case) and n-grams of real text.
The KL error is sum over head and tail of p log(p / p decoded), exact in float64. Speed is CPU time of one thread, rows
of 512 positions, best of five.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shared.payload.codec import Codec
from shared.payload.ragged import segment_sum
from shared.payload.targets import SparseTargets
from tools.bench import ngram_teacher, synthetic_teacher

ROW_POSITIONS = 512
STEPS = {"1/8": 1 / 8, "1/16": 1 / 16, "1/32": 1 / 32}


def run(positions: int = 8192, ngram_rows: int = 40) -> dict[str, Any]:
    """Measure all of it.

    Args:
        positions: synthetic positions.
        ngram_rows: rows of real text for the n-gram teacher; left out where its data is absent.

    Returns:
        synthetic.step_*: figures at k = 64; ngram.*: bytes per position and KL error of several captures.
    """
    rows = [
        synthetic_teacher.make_targets(ROW_POSITIONS, 64, seed) for seed in range(max(1, positions // ROW_POSITIONS))
    ]
    result: dict[str, Any] = {
        "synthetic": {f"step_{name}": figures(rows, step, synthetic_teacher.VOCAB_SIZE) for name, step in STEPS.items()}
    }
    if ngram_teacher.has_data():
        result["ngram"] = ngram_figures(ngram_rows)
    return result


def ngram_figures(num_rows: int) -> dict[str, Any]:
    """Measure captures of real text: top 64 at three steps, with an end at 99.9 % of the mass, top 8, and top 8 with 4
    draws.
    """
    teacher, test = ngram_teacher.make_teacher(num_rows)

    def capture(k: int, draws: int = 0, mass: float = 1.0) -> list[SparseTargets]:
        rng = np.random.default_rng(0)
        return [ngram_teacher.targets_of_row(teacher, row, k, draws, rng, mass) for row in test if len(row) > 2]

    top64 = capture(64)
    result = {f"top64_step_{name}": figures(top64, step, ngram_teacher.VOCAB_SIZE) for name, step in STEPS.items()}
    others = {"top64_mass_0.999": capture(64, mass=0.999), "top8": capture(8), "top8_sample4": capture(8, 4)}
    for name, rows in others.items():
        draws = 4 if rows[0].draws else 0
        result[name] = figures(rows, 1 / 16, ngram_teacher.VOCAB_SIZE, draws)
    return result


def figures(rows: Sequence[SparseTargets], step: float, vocab_size: int, draws: int = 0) -> dict[str, float]:
    """Encode and decode rows; return their figures."""
    codec = Codec(step, rows[0].temperatures, draws, vocab_size)
    blobs = [codec.encode(row) for row in rows]
    decoded = [codec.decode(blob, row.num_positions) for blob, row in zip(blobs, rows, strict=True)]
    positions = sum(row.num_positions for row in rows)
    kl = np.concatenate([kl_error_nats(row, after) for row, after in zip(rows, decoded, strict=True)])
    encode_seconds = best_cpu_seconds(lambda: [codec.encode(row) for row in rows])
    decode_seconds = best_cpu_seconds(
        lambda: [codec.decode(blob, row.num_positions) for blob, row in zip(blobs, rows, strict=True)]
    )
    return {
        "bytes_per_position": sum(map(len, blobs)) / positions,
        "mean_support": sum(len(row.ids) for row in rows) / positions,
        "kl_error_nats": float(kl.mean()),
        "kl_error_nats_p99": float(np.quantile(kl, 0.99)),
        "encode_positions_per_second": positions / encode_seconds,
        "decode_positions_per_second": positions / decode_seconds,
    }


def kl_error_nats(before: SparseTargets, after: SparseTargets) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return [S] KL divergence in nats from the exact to the decoded distribution over head entries and tail bucket."""
    p, q = before.logprobs.astype(np.float64), after.logprobs.astype(np.float64)
    unit = before.temperatures.index(1.0)
    p_tail, q_tail = (t.tail_logmass[:, unit].astype(np.float64) for t in (before, after))
    with np.errstate(invalid="ignore"):
        tail = np.where(np.isneginf(p_tail), 0.0, np.exp(p_tail) * (p_tail - q_tail))
    error: np.ndarray[Any, np.dtype[np.float64]] = segment_sum(np.exp(p) * (p - q), before.counts) + tail
    return error


def best_cpu_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the least CPU time in seconds that `work` took."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
