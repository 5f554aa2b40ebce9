"""Head-averaged attention of chosen layers, recomputed from the queries and keys that the model itself attends with.

The model keeps its fast attention: the function that transformers looks up by name is wrapped once, and for a watched
layer the wrapper also computes softmax(q k) for the queries that are wanted, a few at a time. Positions, norms, scales,
windows, soft caps and sinks are thus the model's own; a probe against its eager attention refuses a model that adds
anything else.
Cost: for a watched layer, S x T scores per head, in chunks; nothing for the others.

Shape letters: R rows of a batch, T tokens of the longest, A heads, G key-value heads, D head width, S wanted queries of
a row, C of them in a chunk, M strongest keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.errors import EngineError
from shared.models.forward.layer_taps import find_blocks, tap_attention, wrap_attention
from teacher_cache.engines.transformers.transformers_model import CausalModel

_SCORES_AT_ONCE = 2**25


class AttentionWatch:
    """Sees the attention of some layers of one model."""

    def __init__(self, model: CausalModel, layers: tuple[int, ...], strongest: int) -> None:
        """Watch the attention of `layers`, counted from 1.

        Raises:
            EngineError: the model's attention cannot be watched, or is not what its queries and keys say.
        """
        self.strongest = strongest
        self.queries: list[Tensor] = []
        """[S] int64 wanted queries of each row of the current batch."""
        self.found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        """Layer -> for each row [S, M] distances to the strongest keys and their masses, on the CPU."""
        self._whole = False
        self._layers = layers
        self._model = model
        for layer in layers:
            tap_attention(blocks_of(model)[layer - 1], self, layer)
        name = model.model.config._attn_implementation
        if not wrap_attention(name):
            raise EngineError(f"attention '{name}' cannot be watched; leave out `capture.hidden.attention`")
        self._check()

    def see(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
        """Keep what the wanted queries attend to; `query` [R, A, T, D], `key` [R, G, T, D]."""
        rows = []
        for row, wanted in enumerate(self.queries):
            step = max(1, _SCORES_AT_ONCE // (query.shape[1] * query.shape[2]))
            chunks = [
                self._strongest(
                    head_average(query[row], key[row], part, None if mask is None else mask[row], options), part
                )
                for part in wanted.to(query.device).split(step)
            ]
            width = self.strongest
            distances = (
                torch.cat([chunk[0] for chunk in chunks]) if chunks else torch.zeros((0, width), dtype=torch.int64)
            )
            masses = torch.cat([chunk[1] for chunk in chunks]) if chunks else torch.zeros((0, width))
            rows.append((distances, masses))
        self.found[layer] = rows

    def _strongest(self, averaged: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return [C, M] distances and masses of the strongest keys of [C, T] masses; absent keys have mass 0."""
        if self._whole:
            return queries[:, None].cpu() - torch.arange(averaged.shape[1])[None], averaged.cpu()
        kept = min(self.strongest, averaged.shape[1])
        masses, keys = averaged.topk(kept, dim=-1)
        masses = masses.masked_fill(keys > queries[:, None], 0.0)
        absent = (0, self.strongest - kept)
        distances = (queries[:, None] - keys).clamp_min(0)
        return torch.nn.functional.pad(distances, absent).cpu(), torch.nn.functional.pad(masses, absent).cpu()

    def _check(self) -> None:
        """Compare with the model's own eager attention on a probe.

        Raises:
            EngineError: it differs, or nothing was seen.
        """
        model = self._model
        probe = (torch.arange(1, 17, device=model.device)[None] * 89) % min(len(model.tokenizer), model.num_entries)
        self.queries, self._whole = [torch.arange(probe.shape[1])], True
        name = type(model.model).__name__
        before = model.model.config._attn_implementation
        with torch.inference_mode():
            model.hidden(probe, torch.ones_like(probe))
            seen, self.found, self._whole = self.found, {}, False
            if set(seen) != set(self._layers):
                raise EngineError(
                    f"the attention of {name} does not pass through transformers' attention functions, so it cannot be "
                    "captured; leave out `capture.hidden.attention`"
                )
            model.model.set_attn_implementation("eager")
            try:
                output = model.body(input_ids=probe, use_cache=False, output_attentions=True)
            finally:
                model.model.set_attn_implementation(before)
        self.queries = []
        for layer in self._layers:
            expected = output.attentions[layer - 1][0].float().mean(0).cpu()
            got = seen[layer][0][1]
            bound = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.02
            if expected.shape != got.shape or not torch.allclose(got, expected, rtol=0, atol=bound):
                raise EngineError(
                    f"the attention of layer {layer} of {name} is not the softmax of its queries and keys, so it "
                    "cannot be captured; leave out `capture.hidden.attention`, or this layer"
                )


def head_average(query: Tensor, key: Tensor, wanted: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Return [C, T] float32 attention of queries `wanted`, averaged over heads.

    Args:
        query: [A, T, D] with positions applied.
        key: [G, T, D] likewise; each serves A / G heads.
        wanted: [C] int64 which queries.
        mask: [1 or A, T, T] of what is seen (bool) or added to the scores; None where everything up to the query is.
        options: what the model gives its attention function: scaling, sliding_window, softcap, s_aux.
    """
    num_heads, num_tokens, width = query.shape
    chosen = query[:, wanted].float().view(key.shape[0], -1, len(wanted), width)
    scaling = options.get("scaling")
    scores = torch.einsum("gpcd,gtd->gpct", chosen, key.float()) * (width**-0.5 if scaling is None else scaling)
    scores = scores.reshape(num_heads, len(wanted), num_tokens)
    softcap = options.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        distance = wanted[:, None] - torch.arange(num_tokens, device=wanted.device)
        window = options.get("sliding_window") or num_tokens
        scores = scores.masked_fill(~((distance >= 0) & (distance < window)), -torch.inf)
    else:
        part = mask[:, wanted, :num_tokens]
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
    sinks = options.get("s_aux")
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, len(wanted), 1)], dim=-1)
    return scores.softmax(-1)[..., :num_tokens].mean(0)


def blocks_of(model: CausalModel) -> torch.nn.ModuleList:
    """Return the model's blocks, first to last.

    Raises:
        EngineError: it has no list of as many blocks as its config says.
    """
    blocks = find_blocks(model.model)
    if blocks is None:
        raise EngineError(
            f"{type(model.model).__name__} has no list of as many blocks as its config says, so its hidden states "
            "cannot be captured; leave out `capture.hidden`"
        )
    return blocks
