"""Endless training batches of fresh examples: one padded block per domain, cross-entropy on the answers only.

Causal attention with padding on the right needs no mask: no real token ever looks at a pad. Cost: tokenisation, about 1
% of a training step.
Legend: B rows of a domain, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from tools.demo.domains import DOMAINS, stream
from tools.demo.example import Example
from tools.demo.tokenizer import END, chat_prompt

IGNORED = -100


def encode(tokenizer: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 ids [B, T] padded on the right and labels [B, T], -100 outside the answers; the end token is a
    label.
    """
    prompts = tokenizer([chat_prompt(item.prompt) for item in examples], add_special_tokens=False).input_ids
    answers = tokenizer([item.answer + END for item in examples], add_special_tokens=False).input_ids
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels = torch.full((len(examples), width), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def batches(
    tokenizer: Any, seed: int, rows: dict[str, int], unsure: bool = False
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Yield one list of (ids, labels) per step without end, a block for each domain with `rows[domain]` fresh
    examples.
    """
    sources = {domain: stream(domain, seed, unsure) for domain in DOMAINS}
    while True:
        yield [encode(tokenizer, list(islice(sources[domain], rows[domain]))) for domain in DOMAINS if rows[domain]]
