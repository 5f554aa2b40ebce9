"""Captures hidden states and attention of a teacher in transformers: one forward pass of the body per batch, no head.

Hooks on the chosen blocks keep the states of the positions that predict supervised tokens, project them where the
recipe says so, and hand them to the CPU; other layers cost nothing extra. Requests are batched as for scoring, so a
continued build computes the same bytes.
Cost: one prefill of every sequence; memory for one batch.

Shape letters: R rows of a batch, T tokens of the longest, S supervised positions of a row, L state layers, W teacher
width, D stored width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import EngineError
from shared.identity.hidden_identity import FINAL, HiddenIdentity
from shared.payload.hidden import Attention, HiddenStates, Vectors
from shared.payload.projection import projection_matrix
from shared.recipe.recipe import Teacher
from teacher_cache.engines.columns.sparse_columns import predicting_rows
from teacher_cache.engines.protocol import Captured, ScoreRequest
from teacher_cache.engines.transformers.attention_watch import AttentionWatch, blocks_of
from teacher_cache.engines.transformers.length_batches import length_batches
from teacher_cache.engines.transformers.transformers_model import CausalModel, padded


class HiddenEngine:
    """A teacher in transformers, in this process, that shows its layers."""

    def __init__(self, model: CausalModel, identity: HiddenIdentity, batch_tokens: int) -> None:
        """Take a loaded model.

        Raises:
            EngineError: it is not the model that the identity describes, or its layers cannot be watched.
        """
        blocks = blocks_of(model)
        if (len(blocks), model.config.hidden_size) != (identity.num_layers, identity.width):
            raise EngineError(
                f"the teacher has {len(blocks)} blocks of width {model.config.hidden_size} where its config.json says "
                f"{identity.num_layers} of {identity.width}; report this as a defect of the engine"
            )
        self._model: CausalModel | None = model
        self._identity = identity
        self._batch_tokens = batch_tokens
        self._rows: list[Tensor] = []
        self._states: dict[int, list[Tensor]] = {}
        self._matrix: Tensor | None = None
        if identity.projection is not None:
            matrix = projection_matrix(identity.width, identity.projection, identity.projection_seed)
            self._matrix = torch.from_numpy(matrix).to(model.device)
        self._watch = (
            AttentionWatch(model, identity.attention_layers, identity.strongest) if identity.attention_layers else None
        )
        for layer in identity.layers:
            if layer != FINAL:
                blocks[layer - 1].register_forward_hook(self._hook(layer))

    @classmethod
    def open(cls, teacher: Teacher, identity: HiddenIdentity, model_dir: Path) -> HiddenEngine:
        """Load a teacher as the recipe says.

        Raises:
            EngineError: the files cannot be loaded, or its layers cannot be watched.
        """
        return cls(CausalModel.load(teacher, model_dir), identity, teacher.batch_tokens)

    def _hook(self, layer: int) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            self._keep(layer, output[0] if isinstance(output, tuple | list) else output)

        return keep

    def _keep(self, layer: int, states: Tensor) -> None:
        """Keep the wanted rows of [R, T, W] states, projected.

        Raises:
            EngineError: the layer passes on more than one state of a token.
        """
        if states.ndim != 3:
            raise EngineError(
                f"layer {layer} of the teacher passes on several states of a token ({list(states.shape)}), of which a "
                "cache keeps one; capture the layer final alone"
            )
        self._states[layer] = [self._stored(states[row].index_select(0, rows)) for row, rows in enumerate(self._rows)]

    def _stored(self, states: Tensor) -> Tensor:
        """Return [S, D] float32 of [S, W] states."""
        wide = states.float()
        return wide if self._matrix is None else wide @ self._matrix

    def capture(self, requests: Iterable[ScoreRequest]) -> Iterator[Captured]:
        """Capture each request once, batch by batch.

        Raises:
            EngineError: a state is not finite, or the engine is closed.
        """
        for batch in length_batches(requests, 0, self._batch_tokens, self._loaded().class_of):
            with torch.inference_mode():
                captured = self._capture(batch, self._loaded())
            yield from captured

    def _loaded(self) -> CausalModel:
        if self._model is None:
            raise EngineError("the engine is closed; open another")
        return self._model

    def _capture(self, batch: Sequence[ScoreRequest], model: CausalModel) -> list[Captured]:
        tokens, mask = padded([request.token_ids for request in batch])
        device = model.device
        self._rows = [torch.from_numpy(predicting_rows(request.spans)).to(device) for request in batch]
        if self._watch is not None:
            self._watch.queries = self._rows
        final = model.hidden(tokens.to(device), mask.to(device))
        if FINAL in self._identity.layers:
            self._keep(FINAL, final)
        results = [self._row(row, request, final[row]) for row, request in enumerate(batch)]
        self._states = {}
        return results

    def _row(self, row: int, request: ScoreRequest, final: Tensor) -> Captured:
        """Return what one row keeps; `final` [T, W]."""
        identity, num_positions = self._identity, len(self._rows[row])
        shape = (len(identity.layers), num_positions, identity.stored_width)
        states = np.zeros(shape, np.float32)
        for i, layer in enumerate(identity.layers):
            states[i] = self._states[layer][row].cpu().numpy()
        pooled = None
        if identity.pooled != "none":
            pooled = np.zeros(identity.stored_width, np.float32)
            if num_positions:
                chosen = final.index_select(0, self._rows[row]).float()
                vector = chosen.mean(0) if identity.pooled == "mean" else chosen[-1]
                pooled = self._stored(vector[None])[0].cpu().numpy()
        try:
            attention = []
            for layer in identity.attention_layers:
                assert self._watch is not None
                distances, masses = self._watch.found[layer][row]
                attention.append(Attention.quantise(distances.numpy(), masses.numpy()))
            hidden = HiddenStates(
                Vectors.quantise(states), None if pooled is None else Vectors.quantise(pooled), tuple(attention)
            )
        except ValueError as error:
            raise EngineError(
                f"unit {request.unit}, request {request.tag}: {error}, so this teacher cannot be captured in "
                f"{identity.dtype}; set teacher.dtype to float32"
            ) from None
        return Captured(request.tag, hidden)

    def provenance(self) -> Mapping[str, Any]:
        """Say what ran."""
        return {**self._loaded().provenance(), "batch_tokens": self._batch_tokens}

    def close(self) -> None:
        """Release the model; safe to call twice."""
        self._model, self._watch = None, None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
