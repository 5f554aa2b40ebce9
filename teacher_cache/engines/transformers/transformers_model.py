"""A causal language model of transformers, cut into body and head, so that logits are made for a few positions at a
time.

The head is applied here rather than by the model's forward: [positions, vocabulary] is never held, and its product can
be float32 where the weights are 16 bits. What some families do to logits afterwards (scale, soft cap) is read from the
config, and a probe at load compares with the model's own forward.

Shape letters: R rows of a batch, T tokens, P positions, H hidden width, V entries of the model's head.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import EngineError, reason_of
from shared.models.end_tokens import checked_ids
from shared.models.files import load_tokenizer
from shared.models.forward.attention_choice import faithful_attention
from shared.models.forward.body import find_body
from shared.models.forward.causality import PREFIX
from shared.models.forward.logit_transform import enlarged_input, logit_transform
from shared.models.forward.row_length import length_class_of, reset_rotations, rope_switches
from shared.models.gpus import unused_gpu
from shared.models.load_report import without_bars
from shared.models.no_numbers import NO_NUMBERS
from shared.models.weights.loading import load_causal_lm
from shared.recipe.recipe import Teacher
from teacher_cache.engines.transformers.batch_probes import (
    cache_is_whole,
    empty_cache,
    is_causal,
    padding_is_unseen,
    probe_tokens,
)

logger = logging.getLogger(__name__)

_LARGE_LOGITS = 50.0
"""Standard deviation of logits at which a soft cap of any model shows."""

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CausalModel:
    """Body and head of a loaded model, on a GPU where there is one."""

    def __init__(self, model: Any, tokenizer: Any, *, head_dtype: torch.dtype | None = None) -> None:
        """Take a loaded model.

        Args:
            model: a causal language model of transformers.
            tokenizer: its tokenizer.
            head_dtype: type of the head's product; None: the weights' own.

        Raises:
            EngineError: its logits are not those that body and head give.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.config = model.config.get_text_config()
        if getattr(self.config, "prefix_lm", False):
            raise EngineError(f"{type(model).__name__} {PREFIX}")
        head, body = model.get_output_embeddings(), find_body(model)
        if head is None or body is None:
            lack = "no output head" if head is None else "a body that transformers does not name"
            raise EngineError(f"{type(model).__name__} has {lack}; expected a causal language model")
        self.body: Any = body
        """What makes the states that the head reads."""
        self.head_dtype = head_dtype or head.weight.dtype
        with torch.no_grad():
            self._weight = head.weight.detach().to(self.head_dtype)
            bias = getattr(head, "bias", None)
            self._bias = None if bias is None else bias.detach().to(self.head_dtype)
        self.num_entries: int = self._weight.shape[0]
        self._logit_scale, self._logit_cap = logit_transform(self.config)
        self._switches = bool(rope_switches(self.config))
        self._continues: bool | None = None
        with torch.inference_mode():
            probe = probe_tokens(self, 8)
            ones = torch.ones_like(probe)
            self._require_numbers(probe)
            self.model.set_attn_implementation(faithful_attention(model, lambda: self.hidden(probe, ones)))
            self._check(probe)
            self.rotation_of = length_class_of(self.config)
            """Tokens of a sequence -> how it is rotated; keys and values of another rotation are of no use to it."""
            self._pads = padding_is_unseen(self)
            self.class_of = self.rotation_of if self._pads else lambda num_tokens: (num_tokens,)
            """Tokens of a row -> its class: rows of different classes must not share a batch."""

    @classmethod
    def load(cls, teacher: Teacher, model_dir: Path, *, dtype: str | None = None) -> CausalModel:
        """Load a teacher, its adapter folded into the weights.

        Args:
            teacher: what to load.
            model_dir: its files.
            dtype: overrides the recipe's, float64 among them.

        Raises:
            EngineError: a GPU would not be used, the files cannot be loaded, or weights or adapter are not whole.
        """
        wanted = dtype or teacher.dtype
        device = "cuda" if torch.cuda.is_available() else "cpu"
        problem = unused_gpu()
        if problem is not None:
            raise EngineError(f"the teacher would run on the CPU: {problem}")
        trust, dtype = teacher.trust_remote_code, DTYPES.get(wanted, "auto")
        try:
            with without_bars():
                tokenizer = load_tokenizer(model_dir, trust_remote_code=trust)
                model = load_causal_lm(
                    model_dir, what="the teacher", trust_remote_code=trust, adapter=teacher.adapter, dtype=dtype
                ).to(device)
        except EngineError:
            raise
        except Exception as error:  # the library raises whatever a broken file makes it raise
            raise EngineError(
                f"{model_dir}: transformers cannot load the teacher ({type(error).__name__}: {reason_of(error)})"
            ) from error
        narrow = model.dtype in (torch.bfloat16, torch.float16)
        return cls(model, tokenizer, head_dtype=torch.float32 if narrow and teacher.head_dtype == "float32" else None)

    def hidden(self, token_ids: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Return [R, T, H] last hidden states.

        Args:
            token_ids: [R, T] int64.
            mask: [R, cached + T] 1 for tokens, 0 for padding, on either side.
            cache: a transformers cache to read and extend; None: no cache.
        """
        if self._switches and (cache is None or cache.get_seq_length() == 0):
            reset_rotations(self.model)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -token_ids.shape[1] :]
        output = self.body(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def new_cache(self) -> Any | None:
        """Return an empty cache of a batch that will be continued, or None where this model cannot go on from one:
        each token then takes the whole row.
        """
        if self._continues is None:
            self._continues = cache_is_whole(self, pads=self._pads)
            if not self._continues:
                logger.warning(
                    "%s cannot go on from a cache of states in the transformers engine, so each token of an answer "
                    "runs its whole row, which is slow; teacher.engine vllm does not",
                    type(self.model).__name__,
                )
        return empty_cache(self) if self._continues else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [P, V] logits of [P, H] hidden states, in the head's type."""
        logits = torch.nn.functional.linear(hidden.to(self.head_dtype), self._weight, self._bias)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        if self._logit_cap is not None:
            logits = torch.tanh(logits / self._logit_cap) * self._logit_cap
        return logits

    def provenance(self) -> dict[str, str]:
        """Say what runs it: versions, device, type of the weights."""
        return {
            "engine": "transformers",
            "torch": metadata.version("torch"),
            "transformers": metadata.version("transformers"),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def declared_end_ids(self) -> tuple[int, ...]:
        """Return the end tokens of the model's generation config, or of its config where that has none."""
        for owner in (self.model.generation_config, self.config):
            found = checked_ids(getattr(owner, "eos_token_id", None), f"eos_token_id of {type(owner).__name__}")
            if found:
                return found
        return ()

    def _require_numbers(self, probe: torch.Tensor) -> None:
        """Run the model once.

        Raises:
            EngineError: it cannot run, as some quantised ones on a CPU, or computes no numbers.
        """
        try:
            hidden = self.hidden(probe, torch.ones_like(probe))
        except (RuntimeError, TypeError, ValueError, NotImplementedError, ImportError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            name, device = type(self.model).__name__, self.device.type
            raise EngineError(
                f"{name} cannot run on this machine's {device} ({reason_of(error, 200)}); "
                "set teacher.engine to vllm, or choose another dtype or copy of it"
            ) from error
        if not bool(hidden.isfinite().all()):
            raise EngineError(NO_NUMBERS)
        if hidden.shape[-1] == self._weight.shape[1] and bool(no_numbers(self.logits(hidden[0])).any()):
            raise EngineError(NO_NUMBERS)  # the head's own

    def _check(self, probe: torch.Tensor) -> None:
        """Compare with the model's own logits, as they are and where they are large enough for any cap to show.

        Raises:
            EngineError: they differ.
        """
        head, hidden = self.model.get_output_embeddings(), self.hidden(probe, torch.ones_like(probe))
        is_right = hidden.shape[-1] == self._weight.shape[1] and self._are_own(probe, hidden)
        if is_right:
            factor = _LARGE_LOGITS / max(float(self.logits(hidden).float().std()), 1e-30)
            with enlarged_input(head, factor) as calls:
                is_right = self._are_own(probe, hidden * factor) or not calls
        if not is_right:
            raise EngineError(
                f"{type(self.model).__name__} makes its logits in a way that the transformers engine does not "
                "know; use teacher.engine vllm"
            )
        if not is_causal(self):
            raise EngineError(
                f"{type(self.model).__name__} lets tokens see what comes after them, so what it says of the next one "
                "is no prediction; choose a causal language model as teacher"
            )

    def _are_own(self, probe: torch.Tensor, hidden: torch.Tensor) -> bool:
        """Say whether logits of `hidden` [1, T, H] are those that the model returns for the probe."""
        own = self.logits(hidden[0]).float()
        theirs = self.model(input_ids=probe, attention_mask=torch.ones_like(probe), use_cache=False).logits[0].float()
        bound = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.05
        bound *= max(1.0, float(theirs.std()))
        return own.shape == theirs.shape and bool((own - theirs).abs().max() <= bound)


def no_numbers(logits: torch.Tensor) -> torch.Tensor:
    """Return which logits no softmax can be made of: NaN, and infinity, as of a head that is too large for 16 bits."""
    return logits.isnan() | logits.isposinf()


def padded(
    rows: Sequence[Sequence[int] | NDArray[np.int32]], *, on_left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [R, T] int64 tokens of rows, filled up with 0 on the right or left, and [R, T] 1 where a row has them."""
    tokens = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, token_ids in enumerate(rows):
        own = slice(tokens.shape[1] - len(token_ids), None) if on_left else slice(len(token_ids))
        tokens[row, own] = torch.as_tensor(token_ids, dtype=torch.int64)
        mask[row, own] = 1
    return tokens, mask
