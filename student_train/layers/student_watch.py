"""Shows states and attention inputs of chosen student layers during a training forward pass.

States come from hooks on the blocks. Queries and keys come from the attention function that transformers looks up by
name, wrapped once per process: for a watched layer it keeps what the model attends with and goes on as before. Nothing
is computed here, so a block that is recomputed in the backward pass (gradient checkpointing) does the same operations
both times, and whatever wraps weights (adapters, several processes) stays in the path. Cost: memory for what is kept:
[B, H] per state, queries and keys per attention layer. The shared layer's output is in the graph anyway.

Shape letters: B tokens of the packs, H hidden width, A heads, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import TrainingError
from shared.models.forward.layer_taps import find_blocks, tap_attention, untap_attention, wrap_attention


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    """What one layer attends with."""

    query: Tensor
    """[A, B, D] with positions applied."""
    key: Tensor
    """[G, B, D] likewise."""
    scaling: float
    window: int | None
    """Keys that a query sees at most; None for all before it."""
    softcap: float | None


class StudentWatch:
    """Watches some layers of one student."""

    def __init__(
        self, base: Any, state_layers: Sequence[int], attention_layers: Sequence[int], shared_layer: int | None = None
    ) -> None:
        """Watch layers, counted from 1.

        Args:
            base: the causal language model below any adapter.
            state_layers: whose outputs are kept.
            attention_layers: whose queries and keys are kept.
            shared_layer: whose output is kept where gradients are measured, 0 for the input of the first; None for
                none.

        Raises:
            TrainingError: the student's blocks or its attention cannot be watched.
        """
        self.states: dict[int, Tensor] = {}
        """Layer -> [B, H] output of its block in the last watched pass."""
        self.attention: dict[int, AttentionInputs] = {}
        self.shared: Tensor | None = None
        """[1, B, H] output of the shared layer in the last pass that was watched for it: what the layers above go on
        with.
        """
        self._base = base
        self._attention_layers = tuple(attention_layers)
        self._is_on = self._shares = False
        blocks = find_blocks(base)
        if blocks is None:
            raise TrainingError(
                f"{type(base).__name__} has no list of as many blocks as its config says, so the losses 'hidden' and "
                "'attention' cannot see its layers; leave them out"
            )
        self._handles = self._share(blocks, shared_layer)
        self._handles += [
            blocks[layer - 1].register_forward_hook(self._state_hook(layer)) for layer in set(state_layers)
        ]
        self._tapped = [blocks[layer - 1] for layer in attention_layers]
        for block, layer in zip(self._tapped, attention_layers, strict=True):
            tap_attention(block, self, layer)

    @contextmanager
    def on(self, *, shares: bool = False) -> Iterator[None]:
        """Keep what passes in here, the shared layer's output where `shares`; what was kept is dropped by `clear`.

        Raises:
            TrainingError: a watched layer's attention was not seen.
        """
        name = self._base.config._attn_implementation
        if self._attention_layers and not wrap_attention(name):
            raise TrainingError(
                f"the loss 'attention' cannot see through student.attention '{name}'; set it to sdpa or "
                "flash_attention_2"
            )
        self._is_on, self._shares = True, shares
        try:
            yield
        finally:
            self._is_on = self._shares = False
        missing = [layer for layer in self._attention_layers if layer not in self.attention]
        if missing:
            raise TrainingError(
                f"the attention of student layer {missing[0]} does not pass through transformers' attention functions, "
                "so the loss 'attention' cannot see it; leave the loss out, or map it to other layers"
            )

    def clear(self) -> None:
        """Drop what was kept."""
        self.states, self.attention, self.shared = {}, {}, None

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        for block in self._tapped:
            untap_attention(block)

    def see(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
        """Keep queries [1, A, B, D] and keys [1, G, B, D] of a layer.

        Raises:
            TrainingError: the layer hides keys that its options do not name.
        """
        if not self._is_on:
            return
        if mask is not None and options.get("sliding_window") is None and not _shows_whole_rows(mask):
            raise TrainingError(
                f"student layer {layer} hides keys of a row by its mask alone, which the loss 'attention' does not "
                "know; leave the loss out, or map it to layers that see whole rows"
            )
        if options.get("s_aux") is not None:
            raise TrainingError(
                "the student's attention has sinks, which the loss 'attention' does not know; leave the loss out"
            )
        scaling = options.get("scaling")
        self.attention[layer] = AttentionInputs(
            query[0],
            key[0],
            query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            options.get("sliding_window"),
            options.get("softcap"),
        )

    def _share(self, blocks: nn.ModuleList, layer: int | None) -> list[Any]:
        """Return the hook that keeps the shared layer's output; it comes before others, which see the same tensor."""

        def keep(states: Tensor) -> None:
            if self._shares:
                # under frozen layers, as with adapters, nothing would have a gradient by them
                self.shared = states if states.requires_grad else states.requires_grad_()

        def keep_input(module: Any, inputs: Any, options: dict[str, Any]) -> None:
            keep(inputs[0] if inputs else options["hidden_states"])

        def keep_output(module: Any, inputs: Any, output: Any) -> None:
            keep(output[0] if isinstance(output, tuple | list) else output)

        if layer is None:
            return []
        if layer == 0:
            return [blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
        return [blocks[layer - 1].register_forward_hook(keep_output)]

    def _state_hook(self, layer: int) -> Callable[..., None]:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            """Keep the states that a layer passes on, while it is asked for."""
            if not self._is_on:
                return
            states = output[0] if isinstance(output, tuple | list) else output
            if states.ndim != 3:
                raise TrainingError(
                    f"student layer {layer} passes on several states of a token ({list(states.shape)}), of which the "
                    "loss 'hidden' would need one; leave the loss out, or map it to final"
                )
            self.states[layer] = states[0]

        return keep


def _shows_whole_rows(mask: Tensor) -> bool:
    """Say whether each query sees one key more than the one before, or begins a row; [1, 1, B, B] bool, or added to
    scores.
    """
    visible = (mask if mask.dtype == torch.bool else mask == 0)[0, 0].sum(-1)
    return bool(((visible[1:] == visible[:-1] + 1) | (visible[1:] == 1)).all())
