"""Quality samples: the same held-out prompts, answered by the student as it is now, beside the answer in the cache.

Answers are greedy, by the stock `generate` under the model's own forward and attention, one prompt at a time: nothing
is random, and the training's state is not touched. The prompt is everything before the row's last supervised span.
Cost: one short generation per sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch

from shared.models.end_tokens import checked_ids, end_token_ids
from shared.models.forward.attention_choice import faithful_attention
from shared.models.forward.evaluating import evaluating
from shared.models.forward.row_length import known_positions, reset_rotations
from student_train.evaluate.heldout_measure import HeldoutSet
from student_train.student.row_attention import switch_attention


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and the answer in the cache."""

    source: str
    prompt: str
    teacher: str
    """The cached answer."""
    prompt_ids: np.ndarray
    """[T] int32."""


def choose_samples(heldout: HeldoutSet, count: int, tokenizer: Any) -> list[Sample]:
    """Return the first `count` held-out prompts, from all sources in turn."""
    by_source = [[(name, row) for row in rows] for name, rows in heldout.rows.items()]
    in_turn = [place for place in chain.from_iterable(zip_longest(*by_source)) if place is not None]
    samples = []
    for name, index in in_turn[:count]:
        row = heldout.caches[index]
        start, end = (int(bound) for bound in row.spans[-1])
        answer = tokenizer.decode(row.token_ids[start:end].tolist(), skip_special_tokens=True)
        prompt = tokenizer.decode(row.token_ids[:start].tolist(), skip_special_tokens=False)
        samples.append(Sample(name, prompt, answer, row.token_ids[:start]))
    return samples


def student_answers(
    model: Any,
    base: Any,
    samples: Sequence[Sample],
    tokenizer: Any,
    trained_end_ids: Sequence[int],
    attention: str,
    max_tokens: int,
) -> list[str]:
    """Return the student's greedy answers, at most `max_tokens` tokens each.

    Args:
        model: the student with its adapter, where it has one.
        base: the language model below, whose forward is patched.
        samples: what to answer.
        tokenizer: the cache's.
        trained_end_ids: tokens that the cache's answers end with.
        attention: attention implementation that the recipe names.
        max_tokens: longest answer.
    """
    from transformers import GenerationConfig

    longest = known_positions(base.config.get_text_config()) or 2**31
    declared = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    ends = list(end_token_ids(tokenizer, checked_ids(declared, "eos_token_id of the student"), trained_end_ids))
    answers = []
    with _plain(model, base, attention):
        device = base.get_input_embeddings().weight.device
        for sample in samples:
            ids = torch.from_numpy(sample.prompt_ids.astype(np.int64))[None].to(device)
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=max(1, min(max_tokens, longest - ids.shape[1])),
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
                use_cache=True,
            )
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            answers.append(tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True))
    return answers


@contextmanager
def _plain(model: Any, base: Any, attention: str) -> Iterator[None]:
    """Give the model its own forward and attention, evaluating and not compiled; restore all of it, random state
    included.
    """
    training_attention = base.config._attn_implementation
    patched = {name: base.__dict__.pop(name) for name in ("forward", "_original_forward") if name in base.__dict__}
    compiled = [
        (module, module._compiled_call_impl) for module in base.modules() if module._compiled_call_impl is not None
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        with evaluating(model):
            switch_attention(base, attention)
            probe = torch.zeros(1, 2, dtype=torch.int64, device=base.get_input_embeddings().weight.device)
            switch_attention(base, faithful_attention(base, lambda: base(input_ids=probe, use_cache=False)))
            yield
    finally:
        switch_attention(base, training_attention)
        reset_rotations(base)
        for module, call in compiled:
            module._compiled_call_impl = call
        base.__dict__.update(patched)
