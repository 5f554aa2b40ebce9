"""The fused operator never holds [positions, vocabulary]."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

POSITIONS, WIDTH, VOCAB = 2048, 32, 60_000
SCRIPT = f"""
import resource, torch
import student_train.operator.head_chunks as head_chunks
from student_train.operator.fused_loss import fused_sparse_loss
from student_train.losses import LossTerm
from student_train.batch.target_batch import TargetBatch
torch.set_num_threads(1)
head_chunks.CHUNK_BYTES = 16 * 2**20
def run(positions):
    targets = TargetBatch.from_batch(dict(
        support_counts=torch.full((positions,), 8), support_ids=torch.arange(8).repeat(positions),
        support_logprobs=torch.full((positions * 8,), 0.1).log(), tail_logmass=torch.full((positions, 1), 0.2).log(),
        temperatures=torch.tensor([1.0])))
    hidden, weight = torch.randn(positions, {WIDTH}, requires_grad=True), torch.randn({VOCAB}, {WIDTH},
    requires_grad=True)
    terms = [LossTerm("forward_kl"), LossTerm("cross_entropy")]
    fused_sparse_loss(hidden, weight, torch.zeros(positions, dtype=torch.int64), targets, terms,
    positions).loss.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = run(64)
print(run({POSITIONS}) - small)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_positions_times_vocabulary():
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=True, timeout=300
    )
    assert int(child.stdout) < POSITIONS * VOCAB * 4 / 8
