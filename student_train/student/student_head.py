"""How a model turns its body's hidden states into logits: weight, bias, scale, soft cap, and which rows are tokens.

The fused loss reads the head's weight itself, so it must know everything that the model does after it. What the config
declares is honoured, and the result is compared with the model's own logits on a short probe before training: a model
with a twist of its own is refused instead of trained on wrong logits.

Shape letters: B tokens of a pack, V rows of the head, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import TrainingError
from student_train.student.row_attention import NAME as ROW_ATTENTION
from student_train.student.row_attention import layout_of

PROBE_TOKENS = 12
"""Length of the probes: long enough for attention to matter, short enough for any model."""


@dataclass(frozen=True, slots=True)
class StudentHead:
    """The output layer of a language model, read by reference so that training moves it."""

    module: nn.Module
    """The layer whose weight [V, H] is the head."""
    vocab_size: int
    """Rows that are tokens; a head padded beyond is sliced."""
    logit_scale: float = 1.0
    """What plain logits are multiplied by."""
    softcap: float | None = None
    """c in c tanh(logits / c), after the scale; None for none."""

    @property
    def weight(self) -> Tensor:
        """The whole weight [V, H], of which the first `vocab_size` rows count."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """The whole bias [V], or None."""
        return getattr(self.module, "bias", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the plain logits [..., vocabulary] of hidden states [..., H]; for probes."""
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)[
            ..., : self.vocab_size
        ].float()
        logits *= self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: Any, vocab_size: int) -> StudentHead:
    """Return a causal language model's head, sliced to a tokenizer's vocabulary.

    Raises:
        TrainingError: it has none, or fewer rows than the vocabulary.
    """
    module = model.get_output_embeddings()
    name = type(model).__name__
    if module is None or getattr(module, "weight", None) is None:
        raise TrainingError(
            f"{name} has no output layer to train a language model with; choose a causal language model as student"
        )
    rows = module.weight.shape[0]
    if rows < vocab_size:
        raise TrainingError(
            f"the student's output layer has {rows} rows where the cache's tokenizer has {vocab_size} tokens; "
            "choose a student whose vocabulary is at least as large"
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return StudentHead(module, vocab_size, scale, None if softcap is None else float(softcap))


def body_of(model: Any) -> nn.Module:
    """Return the part of a causal language model below its head.

    Raises:
        TrainingError: the model does not say which part that is.
    """
    body = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    if body is None or body is model:
        raise TrainingError(
            f"{type(model).__name__} does not say where its body ends and its head begins; choose another student"
        )
    return body


def run_body(body: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the hidden states [1, B, H] of a pack [1, B] whose rows are separated by `position_ids` alone.

    Attention keeps rows apart only without a mask and without a cache; with either they leak into each other in
    silence.
    """
    layout = {"row_layout": layout_of(position_ids)} if body.config._attn_implementation == ROW_ATTENTION else {}
    output = body(input_ids=input_ids, attention_mask=None, position_ids=position_ids, use_cache=False, **layout)
    return output[0]


def check_head(model: Any, head: StudentHead, *, tolerance: float = 2e-2) -> None:
    """Compare body and head with the model's own logits on a probe.

    Raises:
        TrainingError: the model computes its logits in another way than its config declares.
    """
    probe = probe_tokens(model, head.vocab_size, seed=0)
    positions = torch.arange(probe.shape[1], device=probe.device)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected = (
            model(input_ids=probe, position_ids=positions, use_cache=False).logits[..., : head.vocab_size].float()
        )
        got = head.logits(run_body(body_of(model), probe, positions))
    model.train(was_training)
    if relative_distance(got, expected) > tolerance:
        raise TrainingError(
            f"{type(model).__name__} computes its logits in a way that its config does not declare (the probe "
            "differs by "
            f"{relative_distance(got, expected):.1%}), so a loss fused with its head would be wrong; choose another "
            "student"
        )


def probe_tokens(model: Any, vocab_size: int, seed: int, num_tokens: int = PROBE_TOKENS) -> Tensor:
    """Return [1, num_tokens] token ids that depend on the seed alone."""
    ids = torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(model.get_input_embeddings().weight.device)


def relative_distance(got: Tensor, expected: Tensor) -> float:
    """Return the mean absolute difference over the mean absolute deviation of what is expected."""
    expected = expected.float()
    spread = (expected - expected.mean(dim=-1, keepdim=True)).abs().mean()
    return float((got.float() - expected).abs().mean() / spread.clamp_min(1e-30))
