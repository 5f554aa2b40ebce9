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
from shared.models.forward.body import find_body
from shared.models.forward.evaluating import evaluating
from shared.models.forward.logit_transform import enlarged_input, logit_transform
from shared.models.forward.row_length import known_positions
from shared.models.forward.wide_weights import widest
from student_train.batch.target_batch import TargetBatch
from student_train.operator.position_scores import PositionScores, evaluate_positions
from student_train.student.row_attention import NAME as ROW_ATTENTION
from student_train.student.row_attention import layout_of
from student_train.student.rows_alone import are_rows_alone, run_rows_alone

PROBE_TOKENS = 12
"""Length of the probes: long enough for attention to matter, short enough for any model."""
_LARGE_LOGITS = 50.0
"""Standard deviation of logits at which a soft cap of any model shows."""


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

    def logits(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the plain logits [..., vocabulary] of hidden states [..., H], multiplied in `dtype` or the
        weight's; for probes.
        """
        dtype = dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        logits = nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias)[..., : self.vocab_size].float()
        logits *= self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def scores(self, hidden: Tensor, labels: Tensor, targets: TargetBatch) -> PositionScores:
        """Return the scores of positions; arguments and errors as for `evaluate_positions`."""
        return evaluate_positions(
            hidden,
            self.weight,
            labels,
            targets,
            head_bias=self.bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            vocab_size=self.vocab_size,
        )


def head_of(model: Any, vocab_size: int) -> StudentHead:
    """Return a causal language model's head, sliced to a tokenizer's vocabulary.

    Raises:
        TrainingError: it has none, fewer rows than the vocabulary, or an adapter on it.
    """
    module = model.get_output_embeddings()
    name = type(model).__name__
    if module is None or getattr(module, "weight", None) is None:
        raise TrainingError(
            f"{name} has no output layer to train a language model with; choose a causal language model as student"
        )
    refuse_adapted_head(module)
    rows = module.weight.shape[0]
    if rows < vocab_size:
        raise TrainingError(
            f"the student's output layer has {rows} rows where the cache's tokenizer has {vocab_size} tokens; "
            "choose a student whose vocabulary is at least as large"
        )
    config = model.config.get_text_config()
    scale, softcap = logit_transform(config)
    return StudentHead(module, vocab_size, scale, softcap)


def refuse_adapted_head(module: Any) -> None:
    """Refuse a layer that adds something of an adapter's to what its weight gives: losses read the weight alone.

    Raises:
        TrainingError: it does.
    """
    if any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__):
        raise TrainingError(
            "the output layer has an adapter on it, which a loss fused with the head would neither see nor train; "
            "leave it out of target_modules (modules_to_save trains it whole), or take sparse_loss_from_logits"
        )


def body_of(model: Any) -> nn.Module:
    """Return the part of a causal language model below its head.

    Raises:
        TrainingError: the model does not say which part that is.
    """
    body: nn.Module | None = find_body(model)
    if body is None:
        raise TrainingError(
            f"{type(model).__name__} does not say where its body ends and its head begins; choose another student"
        )
    return body


def run_body(body: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the hidden states [1, B, H] of a pack [1, B] whose rows are separated by `position_ids` alone.

    Attention keeps rows apart only without a mask and without a cache; with either they leak into each other in
    silence. A body that was set so (rows_alone.py) runs each length by itself.
    """
    if are_rows_alone(body):
        return run_rows_alone(body, input_ids, position_ids)
    layout = {"row_layout": layout_of(position_ids)} if body.config._attn_implementation == ROW_ATTENTION else {}
    output = body(input_ids=input_ids, attention_mask=None, position_ids=position_ids, use_cache=False, **layout)
    return output[0]


def check_head(model: Any, head: StudentHead) -> None:
    """Compare body and head with the model's own logits on a probe, as they are and where they are large enough for any
    cap to show.

    Raises:
        TrainingError: the model computes its logits in another way than its config declares.
    """
    probe = probe_tokens(model, head.vocab_size, seed=0)
    width, is_wide = widest(model)
    with evaluating(model), width:
        states = run_rows_alone(body_of(model), probe, torch.arange(probe.shape[1], device=probe.device)[None])
        if states.shape[-1] != head.weight.shape[1]:
            raise TrainingError(
                f"{type(model).__name__} has layers between its body, whose states are {states.shape[-1]} wide, and "
                f"its output layer, which reads {head.weight.shape[1]}, so a loss fused with its head would be wrong; "
                "choose another student"
            )
        distance = _head_distance(model, head, probe, states)
        factor = _LARGE_LOGITS / max(float(head.logits(states).std()), 1e-30)
        with enlarged_input(head.module, factor) as calls:
            large = _head_distance(model, head, probe, states * factor)
        distance = max(distance, large if calls else 0.0)  # not called: the model multiplies with its weight elsewhere
    if distance > (1e-3 if is_wide else 2e-2):
        raise TrainingError(
            f"{type(model).__name__} computes its logits in a way that its config does not declare (the probe differs "
            f"by {distance:.1%}), so a loss fused with its head would be wrong; choose another student"
        )


def _head_distance(model: Any, head: StudentHead, probe: Tensor, states: Tensor) -> float:
    """Return how far logits of `states` [1, B, H] by the head are from those that the model returns for the probe."""
    expected = model(input_ids=probe, use_cache=False).logits[..., : head.vocab_size]
    return relative_distance(head.logits(states, expected.dtype), expected)


def probe_tokens(model: Any, vocab_size: int, seed: int, num_tokens: int = PROBE_TOKENS) -> Tensor:
    """Return [1, num_tokens] token ids that depend on the seed alone; fewer where the model knows fewer positions.

    The token that fills up is not among them: its embedding may be 0, where a gradient may be none.
    """
    config = model.config.get_text_config()
    num_tokens, padding = min(num_tokens, known_positions(config) or num_tokens), getattr(config, "pad_token_id", None)
    ids = torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(seed))
    if padding is not None:
        ids[ids == padding] = (padding + 1) % vocab_size
    return ids.to(model.get_input_embeddings().weight.device)


def relative_distance(got: Tensor, expected: Tensor) -> float:
    """Return the mean absolute difference over the mean absolute deviation of what is expected."""
    expected = expected.float()
    spread = (expected - expected.mean(dim=-1, keepdim=True)).abs().mean()
    return float((got.float() - expected).abs().mean() / spread.clamp_min(1e-30))
