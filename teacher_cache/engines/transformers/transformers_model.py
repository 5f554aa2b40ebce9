"""A causal language model of transformers, cut into body and head, so that logits are made for a few positions at a
time.

The head is applied here rather than by the model's forward: [positions, vocabulary] is never held, and its product can
be float32 where the weights are 16 bits. What some families do to logits afterwards (scale, soft cap) is read from the
config, and a probe at load compares with the model's own forward.

Shape letters: R rows of a batch, T tokens, P positions, H hidden width, V entries of the model's head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shared.errors import EngineError
from shared.models.end_tokens import checked_ids
from shared.models.files import load_tokenizer
from shared.models.loading import load_causal_lm
from shared.models.unused_gpu import unused_gpu
from shared.recipe.recipe import Teacher

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
        head = model.get_output_embeddings()
        if head is None:
            raise EngineError(f"{type(model).__name__} has no output head; expected a causal language model")
        self.head_dtype = head_dtype or head.weight.dtype
        with torch.no_grad():
            self._weight = head.weight.detach().to(self.head_dtype)
            bias = getattr(head, "bias", None)
            self._bias = None if bias is None else bias.detach().to(self.head_dtype)
        self.num_entries: int = self._weight.shape[0]
        self._check()

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
        from transformers.utils import logging

        wanted = dtype or teacher.dtype
        hide_progress = logging.is_progress_bar_enabled()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        problem = unused_gpu()
        if problem is not None:
            raise EngineError(f"the teacher would run on the CPU: {problem}")
        if hide_progress:
            logging.disable_progress_bar()
        try:
            trust = teacher.trust_remote_code
            tokenizer = load_tokenizer(model_dir, trust_remote_code=trust)
            dtype = DTYPES.get(wanted, "auto")
            model = load_causal_lm(
                model_dir, what="the teacher", trust_remote_code=trust, adapter=teacher.adapter, dtype=dtype
            ).to(device)
        except EngineError:
            raise
        except Exception as error:  # the library raises whatever a broken file makes it raise
            reason = " ".join(str(error).split())[:300]
            raise EngineError(
                f"{model_dir}: transformers cannot load the teacher ({type(error).__name__}: {reason})"
            ) from error
        finally:
            if hide_progress:
                logging.enable_progress_bar()
        narrow = model.dtype in (torch.bfloat16, torch.float16)
        return cls(model, tokenizer, head_dtype=torch.float32 if narrow and teacher.head_dtype == "float32" else None)

    def hidden(self, token_ids: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Return [R, T, H] last hidden states.

        Args:
            token_ids: [R, T] int64.
            mask: [R, cached + T] 1 for tokens, 0 for padding, on either side.
            cache: a transformers cache to read and extend; None: no cache.
        """
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -token_ids.shape[1] :]
        output = self.model.base_model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [P, V] logits of [P, H] hidden states, in the head's type."""
        logits = torch.nn.functional.linear(hidden.to(self.head_dtype), self._weight, self._bias)
        scale = getattr(self.config, "logit_scale", None)
        divisor = getattr(self.config, "logits_scaling", None)
        cap = getattr(self.config, "final_logit_softcapping", None)
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def declared_end_ids(self) -> tuple[int, ...]:
        """Return the end tokens of the model's generation config, or of its config where that has none."""
        for owner in (self.model.generation_config, self.config):
            found = checked_ids(getattr(owner, "eos_token_id", None), f"eos_token_id of {type(owner).__name__}")
            if found:
                return found
        return ()

    def _check(self) -> None:
        probe = (torch.arange(1, 9, device=self.device)[None] * 97) % min(len(self.tokenizer), self.num_entries)
        mask = torch.ones_like(probe)
        with torch.inference_mode():
            own = self.logits(self.hidden(probe, mask)[0]).float()
            theirs = self.model(input_ids=probe, attention_mask=mask, use_cache=False).logits[0].float()
        bound = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.05
        if own.shape != theirs.shape or not torch.allclose(
            own.log_softmax(-1), theirs.log_softmax(-1), rtol=bound, atol=bound
        ):
            raise EngineError(
                f"{type(self.model).__name__} makes its logits in a way that the transformers engine does not "
                "know; use teacher.engine vllm"
            )
