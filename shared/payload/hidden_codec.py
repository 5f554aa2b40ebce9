"""A row's hidden states as bytes and back, without loss: byte planes in one zstandard frame.

Order: scales [L, S] as float32 in four planes; integers [L, S, D]; the pooled scale and its D integers; per attention
layer counts [S] and then distances and mass codes [N]. Integers are stored plus 128. Layout byte by byte:
docs/format.md. Cost: one pass and zstandard's.

Shape letters: S positions, L hidden layers, D width, A attention layers, m most kept keys, N kept keys of one attention
layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.payload.frame import PlaneReader, compress_planes, decompress_frame, split_planes
from shared.payload.hidden import MASS_UNIT, Attention, HiddenStates, Vectors
from shared.payload.ragged import segment_sum
from shared.schema import MAX_HIDDEN_BYTES_PER_ROW, MAX_TOKENS_PER_ROW

HIDDEN_CODEC_NAME = "int8-1"
"""Name of this codec in a hidden layer's identity."""
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
"""127 times it is a float32."""


@dataclass(frozen=True, slots=True)
class HiddenCodec:
    """Encoder and decoder for one hidden layer; safe to share between threads, cheap to pickle."""

    num_layers: int
    """L."""
    width: int
    """D."""
    has_pooled: bool = False
    num_attention_layers: int = 0
    """A."""
    strongest: int = 0
    """m: no query keeps more keys."""

    def encode(self, hidden: HiddenStates) -> bytes:
        """Return the blob of one row.

        Raises:
            ValueError: the arrays contradict each other or the codec: a programming error of the caller, or a row too
                large.
        """
        states, num_positions = hidden.states, hidden.num_positions
        self._check(hidden)
        try:
            self.max_content_bytes(num_positions)
        except DamagedError as error:
            raise ValueError(str(error)) from None
        planes = [*_float_planes(states.scales), _shifted(states.values)]
        if hidden.pooled is not None:
            planes += [*_float_planes(hidden.pooled.scales), _shifted(hidden.pooled.values)]
        for attention in hidden.attention:
            problem = self._attention_problem(attention)
            if problem:
                raise ValueError(problem)
            planes += [*split_planes(attention.counts, 2), *split_planes(attention.distances, 3)]
            planes += split_planes(attention.mass_codes, 2)
        return compress_planes(planes)

    def decode(self, blob: bytes | memoryview, num_positions: int) -> HiddenStates:
        """Return one row's hidden states.

        Raises:
            DamagedError: the blob is not a frame of this codec with `num_positions` positions.
        """
        reader = PlaneReader(decompress_frame(blob, self.max_content_bytes(num_positions)))
        states = self._take_vectors(reader, (self.num_layers, num_positions))
        pooled = self._take_vectors(reader, ()) if self.has_pooled else None
        attention = tuple(self._take_attention(reader, num_positions) for _ in range(self.num_attention_layers))
        reader.finish()
        return HiddenStates(states, pooled, attention)

    def max_content_bytes(self, num_positions: int) -> int:
        """Return the most bytes that a row takes before compression.

        Raises:
            DamagedError: more positions or bytes than a row may have.
        """
        if not 0 <= num_positions <= MAX_TOKENS_PER_ROW:
            raise DamagedError(
                f"a row claims {num_positions} positions where at most {MAX_TOKENS_PER_ROW} are possible"
            )
        vectors = (self.num_layers * num_positions + self.has_pooled) * (self.width + 4)
        total = vectors + self.num_attention_layers * num_positions * (2 + 5 * self.strongest)
        if total > MAX_HIDDEN_BYTES_PER_ROW:
            raise DamagedError(
                f"a row of {num_positions} positions takes up to {total:,} bytes of hidden states where at most "
                f"{MAX_HIDDEN_BYTES_PER_ROW:,} are possible; capture fewer layers, a projection, or shorter rows"
            )
        return total

    def _check(self, hidden: HiddenStates) -> None:
        """Refuse arrays that do not fit each other or this codec."""
        states, num_positions = hidden.states, hidden.num_positions
        if states.values.shape != (self.num_layers, num_positions, self.width) or states.scales.ndim != 2:
            raise ValueError(f"states must be [{self.num_layers}, S, {self.width}], got {states.values.shape}")
        if (hidden.pooled is not None) != self.has_pooled or len(hidden.attention) != self.num_attention_layers:
            raise ValueError("the row has another pooled state or other attention layers than its codec")
        if hidden.pooled is not None and hidden.pooled.values.shape != (self.width,):
            raise ValueError(f"the pooled state must be [{self.width}], got {hidden.pooled.values.shape}")
        for vectors in (states, hidden.pooled):
            if vectors is not None and (vectors.values.dtype != np.int8 or _vectors_problem(vectors)):
                raise ValueError(_vectors_problem(vectors) or f"integers must be int8, got {vectors.values.dtype}")
        for attention in hidden.attention:
            fits = (
                attention.counts.shape == (num_positions,) and attention.distances.shape == attention.mass_codes.shape
            )
            if not fits or int(attention.counts.sum(dtype=np.int64)) != len(attention.distances):
                raise ValueError("the arrays of an attention layer do not fit each other")

    def _take_vectors(self, reader: PlaneReader, shape: tuple[int, ...]) -> Vectors:
        """Read scales and integers of vectors of that shape."""
        count = int(np.prod(shape, dtype=np.int64))
        scales = np.ascontiguousarray(reader.take_octets(4 * count).reshape(4, count).T).view("<f4").astype(np.float32)
        octets = np.bitwise_xor(reader.take_octets(count * self.width), np.uint8(0x80))
        vectors = Vectors(octets.view(np.int8).reshape(*shape, self.width), scales.reshape(shape))
        problem = _vectors_problem(vectors)
        if problem:
            raise DamagedError(problem)
        return vectors

    def _take_attention(self, reader: PlaneReader, num_positions: int) -> Attention:
        counts = reader.take(num_positions, 2)
        if num_positions and int(counts.max()) > self.strongest:
            raise DamagedError(f"a query claims {int(counts.max())} keys where at most {self.strongest} are kept")
        num_keys = int(counts.sum(dtype=np.int64))
        attention = Attention(counts, reader.take(num_keys, 3), reader.take(num_keys, 2))
        problem = self._attention_problem(attention)
        if problem:
            raise DamagedError(problem)
        return attention

    def _attention_problem(self, attention: Attention) -> str | None:
        if (
            len(attention.counts)
            and not 0 <= int(attention.counts.min()) <= int(attention.counts.max()) <= self.strongest
        ):
            return f"a query keeps {int(attention.counts.max())} keys where at most {self.strongest} are kept"
        if len(attention.mass_codes) == 0:
            return None
        if int(attention.mass_codes.min()) < 1 or int(attention.mass_codes.max()) > MASS_UNIT:
            return "the mass of a key lies outside (0, 1]"
        if not 0 <= int(attention.distances.min()) <= int(attention.distances.max()) < MAX_TOKENS_PER_ROW:
            return "a key lies after its query or before any row"
        if int(segment_sum(attention.mass_codes, attention.counts).max()) > MASS_UNIT:
            return "the masses of a query add up to more than 1"
        query = np.repeat(np.arange(len(attention.counts), dtype=np.int64), attention.counts)
        pairs = np.sort(query * MAX_TOKENS_PER_ROW + attention.distances)
        return "a query names a key twice" if bool((pairs[1:] == pairs[:-1]).any()) else None


def _float_planes(values: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
    """Return four planes of [n] float32, the low bytes first."""
    octets = np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8).reshape(-1, 4)
    return [np.ascontiguousarray(octets[:, i]) for i in range(4)]


def _shifted(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return integers plus 128, flat: near 0 they then share their high bits."""
    return np.bitwise_xor(np.ascontiguousarray(values).view(np.uint8), np.uint8(0x80)).reshape(-1)


def _vectors_problem(vectors: Vectors) -> str | None:
    if not bool(((vectors.scales >= 0) & (vectors.scales <= _LARGEST_SCALE)).all()):
        return "the scale of a hidden state is negative, not finite, or makes states that are not"
    return "an integer of a hidden state is -128" if vectors.values.size and int(vectors.values.min()) < -127 else None
