"""Which teacher's hidden states, of which layers, kept how: the identity of one hidden layer of a cache.

Layers count from 1 for the output of the first block; `FINAL` stands for the state after the last norm, which the head
reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shared.errors import DamagedError
from shared.identity.identity import Identity, Size
from shared.payload.hidden_codec import HIDDEN_CODEC_NAME, HiddenCodec
from shared.schema import MAX_HIDDEN_LAYERS, MAX_HIDDEN_WIDTH, MAX_STRONGEST_KEYS

FINAL = -1
"""Number of the state after the last norm."""
PROJECTION_NAME = "gaussian-philox-1"
"""How projection matrices are drawn (shared/payload/projection.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenIdentity(Identity):
    """Which teacher, which layers, kept how."""

    what: ClassVar[str] = "hidden layer"

    teacher: str
    """Path or hub id as the recipe named it."""
    weights_hash: str
    tokenizer_hash: str
    num_layers: Size
    """Blocks of the teacher."""
    width: Size
    """Hidden width of the teacher."""
    layers: tuple[int, ...]
    """Teacher layers whose states are kept, ascending, FINAL last; none where only others are kept."""
    projection: Size | None = None
    """Width after the random projection; None keeps the teacher's own."""
    projection_seed: int = 0
    """Seed of the projection; 0 without one."""
    projection_kind: str = ""
    """How its matrix is drawn; empty without one."""
    pooled: str = "none"
    """none | mean | last: of the final state over the supervised positions."""
    attention_layers: tuple[int, ...] = ()
    """Teacher layers whose attention is kept, ascending."""
    strongest: Size = 0
    """Keys kept per query; 0 without attention."""
    codec: str = HIDDEN_CODEC_NAME
    dtype: str = "bfloat16"
    revision: str | None = None
    adapter: str | None = None
    """Hash of the adapter's weights."""

    @property
    def stored_width(self) -> int:
        """D, the width of a stored vector."""
        return self.width if self.projection is None else self.projection

    @property
    def name(self) -> str:
        """Short default name, such as layers3-p256-mean-attention2."""
        parts = [f"layers{len(self.layers)}"] if self.layers else []
        parts += [f"p{self.projection}"] if self.projection is not None else []
        parts += [self.pooled] if self.pooled != "none" else []
        parts += [f"attention{len(self.attention_layers)}"] if self.attention_layers else []
        return "-".join(parts)

    def make_codec(self) -> HiddenCodec:
        """Return the codec of the layer's blobs.

        Raises:
            DamagedError: another codec, or settings out of range.
        """
        if self.codec != HIDDEN_CODEC_NAME:
            raise DamagedError(
                f"the layer's codec is {self.codec!r} and this version of Decant knows {HIDDEN_CODEC_NAME!r}"
            )
        fits = (
            0 < self.stored_width <= MAX_HIDDEN_WIDTH
            and max(len(self.layers), len(self.attention_layers)) <= MAX_HIDDEN_LAYERS
            and 0 <= self.strongest <= MAX_STRONGEST_KEYS
            and self.pooled in ("none", "mean", "last")
            and bool(self.layers or self.attention_layers or self.pooled != "none")
            and all(layer == FINAL or 1 <= layer <= self.num_layers for layer in self.layers)
            and all(1 <= layer <= self.num_layers for layer in self.attention_layers)
        )
        if not fits:
            raise DamagedError(
                "the hidden layer's identity is impossible: a width, layer or number of keys is out of range"
            )
        return HiddenCodec(
            len(self.layers), self.stored_width, self.pooled != "none", len(self.attention_layers), self.strongest
        )
