"""Small caches for training tests: text rows scored by a tiny model, written through the real writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from shared.cache.layout import read_header
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.identity.weights_hash import tokenizer_hash
from shared.keys import group_key, row_key
from shared.parts.sequences import SequenceRow, make_row
from shared.payload.targets import Draws, SparseTargets

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def make_cache(
    path: Path,
    teacher_dir: Path,
    *,
    num_rows: int = 48,
    sources: tuple[str, ...] = ("math", "ops"),
    temperatures: tuple[float, ...] = (1.0, 2.0),
    k: int = 16,
    num_draws: int = 0,
    first: int = 0,
    tokenizer_bytes: bytes | None = None,
    layer: bool = True,
    num_parts: int = 2,
) -> Path:
    """Write `num_rows` short rows of `sources` in turn, in parts, with top-k targets (and draws) of a teacher."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    files = {
        file.name: file.read_bytes()
        for file in teacher_dir.iterdir()
        if "token" in file.name or "template" in file.name
    }
    files["tokenizer.json"] = tokenizer_bytes or files["tokenizer.json"]
    identity = SequencesIdentity(tokenizer_hash=tokenizer_hash(files["tokenizer.json"]), vocab_size=len(tokenizer))
    writer = CacheWriter.create_or_open(path, identity, files)
    rows = [_row(tokenizer, sources[i % len(sources)], first + i) for i in range(num_rows)]
    size = num_rows // num_parts
    parts = [rows[start : start + size] for start in range(0, size * num_parts, size)]
    for number, part in enumerate(parts):
        writer.write_sequences(f"part-0123abcd-{number:06d}", part, {}, [])
    if layer:
        wanted = LayerIdentity(
            teacher=str(teacher_dir),
            weights_hash="tiny",
            tokenizer_hash=identity.tokenizer_hash,
            vocab_size=model.config.vocab_size,
            mode="top+sample" if num_draws else "top",
            k=k,
            draws=num_draws,
            temperatures=temperatures,
        )
        scored = LayerWriter.create_or_open(writer, None, wanted, {})
        for number, part in enumerate(parts):
            targets = [teacher_targets(model, row, k, temperatures, num_draws) for row in part]
            scored.write(f"part-0123abcd-{number:06d}", [row.key for row in part], targets, {})
    return path


def add_layer(path: Path, teacher_dir: Path, name: str, *, temperatures=(1.0, 2.0), k: int = 16) -> str:
    """Score the rows of a cache with another teacher into a layer of that name; return its full name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    header = read_header(path)
    writer = CacheWriter(path, header.identity)
    wanted = LayerIdentity(
        teacher=str(teacher_dir),
        weights_hash=name,
        tokenizer_hash=header.identity.tokenizer_hash,
        vocab_size=model.config.vocab_size,
        mode="top",
        k=k,
        temperatures=temperatures,
    )
    layer = LayerWriter.create_or_open(writer, name, wanted, {})
    for record in layer.missing():
        rows = layer.cache.read_sequences(record)
        targets = [teacher_targets(model, row, k, temperatures) for row in rows]
        layer.write(record.stem, [row.key for row in rows], targets, {})
    return layer.name


def _row(tokenizer, source: str, number: int) -> SequenceRow:
    prompt = f"{source}: what follows {NUMBERS[number % 8]} and {number}?"
    answer = f"After {number} comes {number + 1}" + f", then {number + 2}" * (number % 5) + "."
    prompt_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    group = group_key(prompt)
    return make_row(
        row_key=row_key(group, None, 0, answer),
        group_key=group,
        source=source,
        prompt=prompt,
        response=answer,
        reference=None,
        token_ids=[*prompt_ids, *answer_ids],
        spans=[(len(prompt_ids), len(prompt_ids) + len(answer_ids))],
        finish_reason="given",
    )


@torch.no_grad()
def teacher_targets(
    model, row: SequenceRow, k: int, temperatures: tuple[float, ...], num_draws: int = 0
) -> SparseTargets:
    logits = (
        model(input_ids=torch.from_numpy(row.token_ids.astype(np.int64))[None])
        .logits[0, row.predictor_index()]
        .double()
    )
    logprobs = logits.log_softmax(-1)
    top, ids = logprobs.topk(k, dim=-1)
    outside = torch.ones_like(logprobs, dtype=torch.bool).scatter_(1, ids, False)
    tails, draws = [], []
    for temperature in temperatures:
        at_t = (logits / temperature).log_softmax(-1).masked_fill(~outside, -torch.inf)
        tails.append(at_t.logsumexp(-1))
        if num_draws:
            drawn = torch.multinomial(
                at_t.exp(), num_draws, replacement=True, generator=torch.Generator().manual_seed(len(row.token_ids))
            )
            unique = [np.unique(line, return_counts=True) for line in drawn.numpy()]
            draws.append(
                Draws(
                    np.array([len(ids) for ids, _ in unique], np.int32),
                    np.concatenate([ids for ids, _ in unique]).astype(np.int32),
                    np.concatenate([counts for _, counts in unique]).astype(np.int32),
                )
            )
    return SparseTargets(
        counts=np.full(len(logits), k, np.int32),
        ids=ids.numpy().astype(np.int32).ravel(),
        logprobs=top.numpy().astype(np.float32).ravel(),
        label_logprobs=logprobs.gather(1, torch.from_numpy(row.labels().astype(np.int64))[:, None])[:, 0]
        .numpy()
        .astype(np.float32),
        tail_logmass=torch.stack(tails, dim=1).numpy().astype(np.float32),
        temperatures=temperatures,
        draws=tuple(draws),
    )
