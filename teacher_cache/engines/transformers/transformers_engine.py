"""The reference teacher: plain transformers, exact and slow; the oracle that other engines are held against.

Requests of one unit are collected, ordered by length and cut into batches of at most `teacher.batch_tokens` padded
tokens; a batch never crosses a unit, so a continued build computes the same bytes. Answers depend on their own seed
only (up to the rounding of batched matrix products). Scoring runs the body once per batch and the head over a few
positions at a time, with log-softmax in float32 (float64 for the oracle), so memory stays bounded at any vocabulary.
Cost: one forward pass per batch and generated token, or per batch of scored sequences.

Columns of the model's head beyond the tokenizer's vocabulary are padding: they are never captured or generated, and the
tiny probability they hold stays in the tail, as it does in vLLM.

Shape letters: R rows of a batch, T tokens of the longest, P positions of a chunk, V entries of the model's head, W
columns.
"""

from __future__ import annotations

import platform
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.errors import EngineError
from shared.models.forward.row_length import known_positions
from shared.models.no_numbers import NO_NUMBERS
from shared.recipe.recipe import Capture, Generate, Teacher
from shared.tokens.tokenizer_file import num_ids
from teacher_cache.engines.answer_ends import AnswerEnds
from teacher_cache.engines.columns.column_layout import ColumnLayout, required
from teacher_cache.engines.columns.draw_keys import prefix_keys_of, salted
from teacher_cache.engines.columns.sparse_columns import predicting_rows, targets_from_plugin
from teacher_cache.engines.columns.tail_columns import chunk_rows, extend_columns
from teacher_cache.engines.protocol import Generated, GenerateRequest, Scored, ScoreRequest, require_scorable, room_of
from teacher_cache.engines.transformers.length_batches import length_batches
from teacher_cache.engines.transformers.transformers_model import CausalModel, no_numbers, padded
from teacher_cache.engines.transformers.transformers_sampling import next_tokens


class TransformersEngine:
    """A teacher in transformers, in this process."""

    def __init__(
        self,
        model: CausalModel,
        capture: Capture | None,
        *,
        max_model_len: int | None = None,
        batch_tokens: int = 4096,
        softmax_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take a loaded model.

        Args:
            model: body and head.
            capture: what `score` keeps; None where nothing will be scored.
            max_model_len: longest sequence in tokens; None: what the model knows.
            batch_tokens: padded tokens of a batch.
            softmax_dtype: type of logits and log-softmax when scoring.

        Raises:
            EngineError: the recipe asks for a longer sequence than the model knows.
        """
        self.tokenizer: Any = model.tokenizer
        self.vocab_size = num_ids(model.tokenizer)
        longest, known = getattr(model.config, "max_position_embeddings", None), known_positions(model.config)
        if max_model_len and known and max_model_len > known:
            raise EngineError(
                f"teacher.max_model_len is {max_model_len} but the model knows {longest} positions; lower it or "
                "leave it out"
            )
        self.max_model_len: int = max_model_len or longest or 2048
        self._model: CausalModel | None = model
        self._layout = None if capture is None else ColumnLayout.of(capture, self.vocab_size)
        self._batch_tokens = batch_tokens
        self._softmax_dtype = softmax_dtype

    @classmethod
    def open(cls, teacher: Teacher, capture: Capture | None, model_dir: Path) -> TransformersEngine:
        """Load a teacher as the recipe says.

        Raises:
            EngineError: the files cannot be loaded.
        """
        model = CausalModel.load(teacher, model_dir)
        return cls(model, capture, max_model_len=teacher.max_model_len, batch_tokens=teacher.batch_tokens)

    def generate(self, requests: Iterable[GenerateRequest], settings: Generate) -> Iterator[Generated]:
        """Answer each request once, batch by batch.

        Raises:
            EngineError: a prompt leaves no room for an answer, the model computes NaN, or the engine is closed.
        """
        model = self._loaded()
        ends = AnswerEnds.of(self.tokenizer, model.declared_end_ids(), settings)

        def class_of(num_tokens: int) -> Hashable:
            grown = min(num_tokens + settings.max_new_tokens, self.max_model_len)
            return model.class_of(num_tokens) if model.rotation_of(num_tokens) == model.rotation_of(grown) else None

        for batch in length_batches(requests, settings.max_new_tokens, self._batch_tokens, class_of):
            limits = [min(settings.max_new_tokens, room_of(request, self.max_model_len)) for request in batch]
            with torch.inference_mode():
                answered = self._answer(batch, limits, settings, ends)
            yield from answered

    def _answer(
        self, batch: Sequence[GenerateRequest], limits: Sequence[int], settings: Generate, ends: AnswerEnds
    ) -> list[Generated]:
        """Decode one batch, padded on the left, with a key-value cache that is made anew where the rotation changes.

        Answers have at most `limits` tokens. Whenever half of the rows have ended, the others go on alone.
        """
        model = self._loaded()
        padded_rows = padded([request.token_ids for request in batch], on_left=True)
        tokens, mask = (tensor.to(model.device) for tensor in padded_rows)
        seeds = torch.tensor([request.seed for request in batch], dtype=torch.int64)
        end_ids = [set(ends.with_template(request.end_token_ids)) for request in batch]
        answers: list[list[int]] = [[] for _ in batch]
        reasons: list[str | None] = [None] * len(batch)
        cache, rotation, whole = model.new_cache(), None, tokens
        going = list(range(len(batch)))
        for step in range(max(limits)):
            if rotation != model.rotation_of(whole.shape[1]):
                rotation, cache, tokens = model.rotation_of(whole.shape[1]), model.new_cache(), whole
            hidden = model.hidden(whole if cache is None else tokens, mask, cache)[:, -1]
            logits = model.logits(hidden)
            _require_numbers(logits, [reasons[row] is None for row in going])
            chosen = next_tokens(logits, seeds, step, settings, self.vocab_size)
            for row, token in zip(going, chosen.tolist(), strict=True):
                if reasons[row] is None:
                    answers[row].append(token)
                    reasons[row] = _reason(answers[row], end_ids[row], limits[row], ends)
            open_places = [place for place, row in enumerate(going) if reasons[row] is None]
            if not open_places:
                break
            tokens = chosen[:, None].to(model.device)
            if 2 * len(open_places) <= len(going) and _keeps_rows_apart(cache):
                going, seeds = [going[place] for place in open_places], seeds[open_places]
                tokens, whole, mask = tokens[open_places], whole[open_places], mask[open_places]
                if cache is not None:
                    cache.batch_select_indices(torch.tensor(open_places))
            whole = torch.cat([whole, tokens], 1)
            mask = torch.cat([mask, mask.new_ones((len(going), 1))], 1)
        return [ends.answer(r, a, reason or "length") for r, a, reason in zip(batch, answers, reasons, strict=True)]

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scored]:
        """Score each request once, batch by batch.

        Raises:
            EngineError: the engine was opened without a capture, a sequence is too long, or the engine is closed.
        """
        layout = required(self._layout)
        for batch in length_batches(requests, 0, self._batch_tokens, self._loaded().class_of):
            for request in batch:
                require_scorable(request, self.max_model_len)
            with torch.inference_mode():
                scored = self._score(batch, layout)
            yield from scored

    def _score(self, batch: Sequence[ScoreRequest], layout: ColumnLayout) -> list[Scored]:
        """Score one batch, padded on the right."""
        model = self._loaded()
        tokens, mask = padded([request.token_ids for request in batch])
        hidden = model.hidden(tokens.to(model.device), mask.to(model.device))
        results = []
        for row, request in enumerate(batch):
            rows = torch.from_numpy(predicting_rows(request.spans))
            ids, values = self._columns(hidden[row], tokens[row], rows, request.draw_salt, layout)
            results.append(Scored(request.tag, targets_from_plugin(ids, values, layout)))
        return results

    def _columns(
        self, hidden: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, draw_salt: int, layout: ColumnLayout
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and values [len(rows), W] of one sequence with [T, H] hidden states and [T] tokens."""
        model = self._loaded()
        keys = salted(prefix_keys_of(tokens.numpy())[rows], draw_salt).to(model.device)
        labels = tokens[rows + 1].to(model.device)
        rows = rows.to(model.device)
        all_ids = np.empty((len(rows), 1 + layout.num_extra), dtype=np.int32)
        all_values = np.empty(all_ids.shape, dtype=np.float32)
        step = chunk_rows(model.num_entries, model.device)
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            logprobs = model.logits(hidden[rows[chunk]]).to(self._softmax_dtype).log_softmax(-1)
            # Padded entries may tie into the top; asking for more keeps K real ones in reach. They are cut in
            # extend_columns.
            head_logprobs, head_ids = logprobs[:, : layout.vocab_size].topk(layout.num_head, dim=-1)
            label_logprobs = logprobs.gather(1, labels[chunk, None])[:, 0]
            ids, values = extend_columns(
                logprobs, labels[chunk], label_logprobs, head_ids, head_logprobs, keys[chunk], layout
            )
            all_ids[chunk], all_values[chunk] = ids.cpu().numpy(), values.float().cpu().numpy()
        return all_ids, all_values

    def _loaded(self) -> CausalModel:
        if self._model is None:
            raise EngineError("the engine is closed; open another")
        return self._model

    def provenance(self) -> Mapping[str, Any]:
        """Say what ran."""
        model = self._loaded()
        return {
            **model.provenance(),
            "python": platform.python_version(),
            "head_dtype": str(model.head_dtype).removeprefix("torch."),
            "quantization": None,
            "max_model_len": self.max_model_len,
            "batch_tokens": self._batch_tokens,
            "seeds_honoured": True,
            "capture_path": "none" if self._layout is None else "full width",
        }

    def close(self) -> None:
        """Release the model; safe to call twice."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _require_numbers(logits: torch.Tensor, is_open: Sequence[bool]) -> None:
    """Refuse [R, V] logits that are no numbers in a row whose answer goes on.

    Raises:
        EngineError: they are.
    """
    if bool((no_numbers(logits).any(1).cpu() & torch.tensor(is_open)).any()):
        raise EngineError(NO_NUMBERS)


def _keeps_rows_apart(cache: Any) -> bool:
    """Say whether rows can be taken out of a key-value cache: its layers hold keys and values of each, no states."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return cache is None or all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _reason(answer: list[int], end_ids: set[int], limit: int, ends: AnswerEnds) -> str | None:
    if answer[-1] in end_ids or (ends.texts and ends.cut(answer) is not None):
        return "stop"
    return "length" if len(answer) >= limit else None
