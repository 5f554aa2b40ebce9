"""Rows of one memory-mapped part, taken straight from Arrow's buffers.

Arrow's own scalars cost microseconds each; here a row is a few slices of numpy views. Offsets come from disk, so
every slice is checked against its buffer before use, and the file's size before each row: a page beyond its end would
kill the process. Cost per row: a few microseconds and the bytes of the row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared.errors import DamagedError, first_line
from shared.keys import content_key
from shared.parts.jobs import key_column
from shared.parts.parts import check_whole, open_part
from shared.parts.records import PartRecord
from shared.parts.sequences import SequenceRow, spans_problem, token_ids_problem
from shared.schema import FINISH_REASONS, MAX_TEXT_BYTES_PER_ROW, MAX_TOKENS_PER_ROW, MAX_VOCAB_SIZE

_NO_OFFSETS = np.zeros(1, np.int64)
Content = TypeVar("Content")


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what Arrow and numpy say about impossible buffers into one sentence."""
    try:
        yield
    except (pa.ArrowException, ValueError, TypeError, IndexError, MemoryError, OSError) as error:
        raise DamagedError(f"{path} has impossible buffers ({first_line(error)}); it was altered") from None


class _Ragged:
    """A variable-length column: offsets and the buffer they cut."""

    def __init__(self, array: pa.Array | None, where: str, itemsize: int, most: int) -> None:
        self._where = where
        self._most = most
        self._itemsize = itemsize
        if array is None:
            self.offsets: NDArray[np.signedinteger[Any]] = _NO_OFFSETS
            self._data = memoryview(b"")
            return
        buffers = array.buffers()
        large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
        count = array.offset + len(array) + 1
        offsets = np.frombuffer(buffers[1], dtype=np.dtype("<i8" if large else "<i4"), count=count)
        self.offsets = offsets[array.offset :]
        data = buffers[-1]
        self._data = memoryview(b"" if data is None else data).cast("B")

    def slice(self, i: int) -> memoryview:
        """Return the bytes of row i."""
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        if not 0 <= start <= end <= len(self._data) // self._itemsize or end - start > self._most:
            raise DamagedError(
                f"{self._where}:{i} lies at [{start}, {end}) of {len(self._data) // self._itemsize} items"
            )
        return self._data[start * self._itemsize : end * self._itemsize]

    def text(self, i: int) -> str:
        """Return the text of row i."""
        try:
            return str(self.slice(i), "utf-8")
        except UnicodeDecodeError as error:
            raise DamagedError(f"{self._where}:{i} is not UTF-8 ({error.reason})") from None


class MappedSequences:
    """One mapped part of sequences/."""

    def __init__(self, directory: Path, record: PartRecord, verify: bool, vocab_size: int = MAX_VOCAB_SIZE) -> None:
        """Map a committed part.

        Args:
            directory: `sequences/`.
            record: the part's commit record.
            verify: compare the whole file with its checksum first, and see that no two rows have one row_key.
            vocab_size: of the cache; no row with another token id is given out.

        Raises:
            DamagedError: it is not what was committed.
        """
        self._table = open_part(directory, record, verify)
        self.path = directory / f"{record.stem}.arrow"
        self._num_bytes, self._vocab_size = record.bytes, vocab_size
        with _damage_named(self.path):
            self.keys = key_column(self._table, "key")
            self.row_keys = key_column(self._table, "row_key")
            self.group_keys = key_column(self._table, "group_key")
            self._texts = {
                name: _Ragged(self._chunk(name), f"{self.path}:{name}", 1, MAX_TEXT_BYTES_PER_ROW)
                for name in ("source", "prompt", "response", "finish_reason", "reference")
            }
            references = self._chunk("reference")
            self._has_reference = [] if references is None else references.is_valid().to_numpy(zero_copy_only=False)
            self._tokens = _Ragged(self._chunk("token_ids"), f"{self.path}:token_ids", 4, MAX_TOKENS_PER_ROW)
            self._spans = _Ragged(self._chunk("spans"), f"{self.path}:spans", 8, MAX_TOKENS_PER_ROW)
        if verify and len(np.unique(np.ascontiguousarray(self.row_keys).view("V16"))) < len(self):
            raise DamagedError(
                f"{self.path} has rows of one row_key; each row is kept once: restore the part from a copy"
            )

    def _chunk(self, name: str) -> pa.Array | None:
        return self._table.column(name).chunk(0) if self._table.num_rows else None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def num_tokens(self) -> NDArray[np.int32]:
        """Return [R] tokens per row from the offsets alone.

        Raises:
            DamagedError: the offsets do not ascend.
        """
        lengths = np.diff(self._tokens.offsets)
        if len(lengths) and (int(lengths.min()) < 0 or int(lengths.max()) > MAX_TOKENS_PER_ROW):
            raise DamagedError(
                f"{self.path} has rows of {int(lengths.min())} to {int(lengths.max())} tokens; it was altered"
            )
        return lengths.astype(np.int32)

    def sources(self) -> tuple[NDArray[np.int32], list[str]]:
        """Return [R] codes and the source names that they index.

        Raises:
            DamagedError: the column contradicts the format.
        """
        chunk = self._chunk("source")
        if chunk is None:
            return np.zeros(0, np.int32), []
        with _damage_named(self.path):
            chunk.validate(full=True)
            encoded = pc.dictionary_encode(chunk)
            if encoded.indices.null_count:
                raise DamagedError(f"{self.path} has rows without a source; it was altered")
            return encoded.indices.to_numpy().astype(np.int32), encoded.dictionary.to_pylist()

    def row(self, i: int) -> SequenceRow:
        """Return row i after comparing its content with its key.

        Raises:
            DamagedError: the row is not what was committed.
        """
        check_whole(self.path, self._num_bytes)
        token_ids = np.frombuffer(self._tokens.slice(i), dtype="<i4").astype(np.int32)
        spans = np.frombuffer(self._spans.slice(i), dtype="<i4").astype(np.int32).reshape(-1, 2)
        key = self.keys[i].tobytes()
        if content_key(token_ids, spans) != key:
            raise DamagedError(
                f"{self.path}:{i} has content that does not fit its key {key.hex()}; restore the part from a copy"
            )
        problem = spans_problem(spans, len(token_ids)) or token_ids_problem(token_ids, self._vocab_size)
        if problem:
            raise DamagedError(f"{self.path}:{i}: {problem}")
        texts = self._texts
        finish_reason = texts["finish_reason"].text(i)
        if finish_reason not in FINISH_REASONS:
            raise DamagedError(f"{self.path}:{i} has finish_reason {finish_reason!r}")
        return SequenceRow(
            key,
            self.row_keys[i].tobytes(),
            self.group_keys[i].tobytes(),
            texts["source"].text(i),
            texts["prompt"].text(i),
            texts["response"].text(i),
            texts["reference"].text(i) if self._has_reference[i] else None,
            token_ids,
            spans,
            finish_reason,
        )


class MappedBlobs:
    """One mapped part of a layer: a blob per row of the same part of sequences/."""

    def __init__(self, directory: Path, record: PartRecord, verify: bool) -> None:
        """Map a committed part; arguments and errors as for `MappedSequences`."""
        table = open_part(directory, record, verify)
        self.path = directory / f"{record.stem}.arrow"
        self._num_bytes = record.bytes
        with _damage_named(self.path):
            self.keys = key_column(table, "key")
            filled = table.num_rows > 0
            blob = table.column("blob").chunk(0) if filled else None
            self._blobs = _Ragged(blob, f"{self.path}:blob", 1, 2**40)
            self.num_positions = table.column("num_positions").to_numpy() if filled else np.zeros(0, np.int32)
            scored = filled and "teacher_nll_nats" in table.column_names
            self.teacher_nll_nats = table.column("teacher_nll_nats").to_numpy() if scored else np.zeros(0, np.float64)
            """[R] of a targets layer; else empty."""

    def __len__(self) -> int:
        return len(self.keys)

    def blob_bytes(self) -> int:
        """Return the bytes of all blobs together."""
        return int(self._blobs.offsets[-1]) - int(self._blobs.offsets[0])

    def blob(self, i: int, row: SequenceRow) -> memoryview:
        """Return the blob of row i after comparing key and positions with its sequence.

        Raises:
            DamagedError: it belongs to another sequence.
        """
        check_whole(self.path, self._num_bytes)
        key = self.keys[i].tobytes()
        if key != row.key:
            raise DamagedError(f"{self.path}:{i} scores content {key.hex()} where the sequence has {row.key.hex()}")
        if int(self.num_positions[i]) != row.num_positions:
            raise DamagedError(
                f"{self.path}:{i} has {int(self.num_positions[i])} positions where the sequence supervises "
                f"{row.num_positions}"
            )
        return self._blobs.slice(i)

    def content(self, i: int, row: SequenceRow, decode: Callable[[memoryview, int], Content]) -> Content:
        """Return what `decode` makes of the blob of row i, whose sequence is `row`, and of its number of positions.

        Raises:
            DamagedError: it is not of that row, or not what was committed.
        """
        try:
            return decode(self.blob(i, row), row.num_positions)
        except DamagedError as error:
            message = str(error)
            raise DamagedError(message if str(self.path) in message else f"{self.path}:{i}: {message}") from None
