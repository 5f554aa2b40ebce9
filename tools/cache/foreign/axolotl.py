"""Axolotl's KD columns: `target_token_ids`, `target_logprobs`, `target_mask` beside `input_ids` and `labels`.

Values are log-probabilities at a temperature T and, as the peer prepares them, divided by their sum over the k entries,
so what lies outside is unknown; T is undone by the user's word for it (p_1 is proportional to p_T^T within the head).
Whether row i is about token i or token i + 1 differs between its releases (its loss once shifted rows and no longer
does), so it is measured: the alignment under which the labels are found among the entries is taken, where that is
clear.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.errors import CacheError, DamagedError
from tools.cache.foreign.foreign_row import ForeignRow
from tools.cache.foreign.parquet_rows import (
    ENTRY_FLAGS,
    ENTRY_IDS,
    ENTRY_NUMBERS,
    IDS,
    parquet_columns,
    parquet_files,
    parquet_rows,
    ragged,
    widest,
)

COLUMNS = {
    "input_ids": IDS,
    "target_token_ids": ENTRY_IDS,
    "target_logprobs": ENTRY_NUMBERS,
    "target_mask": ENTRY_FLAGS,
}
_ROWS_MEASURED = 64
_CLEAR_LEAD = 0.1


class AxolotlReader:
    """Reads a directory of Parquet files with Axolotl's KD columns, or one file."""

    form = "Axolotl"
    labels = "head"
    vocab_size: int | None = None

    def __init__(self, path: Path, temperature: float, shift: int | None) -> None:
        """Look at the columns, and at the alignment where it is not given.

        Args:
            path: a directory of Parquet files, or one.
            temperature: that the values were stored at (`kd_temperature`).
            shift: row i is about token i + shift (0 or 1); None: measured.

        Raises:
            CacheError: a column is missing, or the alignment is not clear.
        """
        self.tail = "unknown"
        self._files = parquet_files(path)
        there = parquet_columns(self._files)
        missing = [name for name in COLUMNS if name not in there]
        if missing:
            raise CacheError(f"{path} has no column {missing[0]}; Axolotl's KD sets have {', '.join(COLUMNS)}")
        self._columns = {**COLUMNS, **({"labels": IDS} if "labels" in there else {})}
        self._temperature = temperature
        self.k = widest(self._files, "target_token_ids")
        self._shift = self._measured_shift(path) if shift is None else shift
        self.notes: dict[str, object] = {
            "rows are about token": f"i + {self._shift}",
            "temperature undone": temperature,
        }

    def rows(self) -> Iterator[ForeignRow]:
        """Yield every document; see `ForeignReader`."""
        return self._rows(self._shift)

    def _rows(self, shift: int) -> Iterator[ForeignRow]:
        for where, lists, i in parquet_rows(self._files, self._columns):
            token_ids = np.asarray(lists["input_ids"].values(i)).astype(np.int64)
            ids, logprobs = ragged(lists["target_token_ids"], lists["target_logprobs"], i, where)
            _, mask = ragged(lists["target_token_ids"], lists["target_mask"], i, where)
            if len(ids) > len(token_ids):
                raise DamagedError(f"{where} has {len(token_ids)} tokens and {len(ids)} rows of targets")
            logprobs = np.where(mask > 0, logprobs, -np.inf)
            predicted = np.arange(len(ids)) + shift
            kept = (predicted >= 1) & (predicted < len(token_ids)) & (mask > 0).any(axis=1)
            if "labels" in self._columns:
                labels = np.asarray(lists["labels"].values(i))
                if len(labels) != len(token_ids):
                    raise DamagedError(f"{where} has {len(token_ids)} tokens and {len(labels)} labels")
                kept &= labels[np.minimum(predicted, len(labels) - 1)] != -100
            yield ForeignRow(where, token_ids, predicted[kept], ids[kept], self._at_one(logprobs[kept]))

    def _at_one(self, logprobs: np.ndarray) -> np.ndarray:
        """Return log-probabilities at temperature 1, of a sum of 1 where the temperature was another."""
        if self._temperature == 1.0 or not logprobs.size:
            return logprobs
        scaled = logprobs * self._temperature
        top = scaled.max(axis=1, keepdims=True, initial=-np.inf)
        found: np.ndarray = scaled - top - np.log(np.exp(scaled - top).sum(axis=1, keepdims=True))
        return found

    def _measured_shift(self, path: Path) -> int:
        """Return the alignment under which more labels are among the entries."""
        shares = []
        for shift in (0, 1):
            found = total = 0
            for _, row in zip(range(_ROWS_MEASURED), self._rows(shift), strict=False):
                there = (row.ids == row.token_ids[row.predicted][:, None]) & (row.logprobs > -np.inf)
                found, total = found + int(there.any(axis=1).sum()), total + len(row.predicted)
            shares.append(found / max(total, 1))
        if abs(shares[0] - shares[1]) < _CLEAR_LEAD:
            raise CacheError(
                f"{path}: whether row i of the targets is about token i or token i + 1 is not clear ({shares[0]:.0%} "
                f"and {shares[1]:.0%} of the tokens are among its entries); say --shift 0 or --shift 1"
            )
        return int(shares[1] > shares[0])
