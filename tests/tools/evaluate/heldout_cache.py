"""A small cache scored by a tiny teacher with dense float64 maths, for tests of what reads a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.identity.weights_hash import tokenizer_hash, weights_hash
from shared.keys import group_key, row_key
from shared.parts.sequences import SequenceRow, make_row
from shared.payload.targets import SparseTargets
from tests.tiny_models import VOCAB_SIZE, training_text

K = 16


def dense_logprobs(model_dir: Path, token_ids: np.ndarray) -> np.ndarray:
    """Return [T, vocabulary] log-probabilities of one sequence, in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0, :, :VOCAB_SIZE]
    return torch.log_softmax(logits, dim=-1).numpy()


def build_cache(path: Path, teacher: Path, num_rows: int = 24, **recorded: str) -> Path:
    """Write a cache of `num_rows` rows in three sources, k = 16; `recorded` are fields of the layer's identity."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer_json = (teacher / "tokenizer.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()
    identity = SequencesIdentity(tokenizer_hash=tokenizer_hash(tokenizer_json), vocab_size=VOCAB_SIZE)
    writer = CacheWriter.create_or_open(path, identity, {"tokenizer.json": tokenizer_json})
    layer = LayerIdentity(
        teacher=str(teacher), weights_hash=weights_hash(teacher), tokenizer_hash=identity.tokenizer_hash,
        vocab_size=VOCAB_SIZE, mode="top", k=K, **{"dtype": "float32", **recorded},
    )  # fmt: skip
    rows = [
        _row(tokenizer, text, ("math", "code", "aiops")[number % 3])
        for number, text in enumerate(training_text()[:num_rows])
    ]
    writer.write_sequences("part-00000000-000000", rows, {})
    scored = LayerWriter.create_or_open(writer, None, layer, {})
    scored.write("part-00000000-000000", [row.key for row in rows], [_targets(model, row) for row in rows], {})
    return path


def _row(tokenizer, text: str, source: str) -> SequenceRow:
    ids = tokenizer(text)["input_ids"]
    third = len(ids) // 3
    group = group_key(text)
    return make_row(
        row_key=row_key(group, None, 0, text), group_key=group, source=source, prompt=text[:20], response=text[20:],
        reference=None,
        token_ids=ids, spans=[(third, third + 3), (2 * third, len(ids))], finish_reason="given",
    )  # fmt: skip


def _targets(model, row: SequenceRow) -> SparseTargets:
    with torch.no_grad():
        logits = model(torch.from_numpy(row.token_ids.astype(np.int64))[None]).logits[0, :, :VOCAB_SIZE]
    logprobs = torch.log_softmax(logits, dim=-1)[torch.from_numpy(row.predictor_index().astype(np.int64))]
    top, ids = logprobs.topk(K, dim=-1)
    tail = torch.log1p(-top.exp().sum(-1))
    labels = logprobs.gather(1, torch.from_numpy(row.labels().astype(np.int64))[:, None])[:, 0]
    return SparseTargets(
        counts=np.full(len(labels), K, np.int32), ids=ids.numpy().astype(np.int32).ravel(),
        logprobs=top.numpy().astype(np.float32).ravel(),
        label_logprobs=labels.numpy().astype(np.float32), tail_logmass=tail.numpy().astype(np.float32)[:, None],
    )  # fmt: skip
