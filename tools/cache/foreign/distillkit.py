"""DistillKit's Parquet: raw entries, compressed log-probabilities, and the older form with polynomials of logits.

Row s of a sample is the teacher's distribution after token s, so it predicts token s + 1. Compressed, a position is
bytes: `exact_k` values as they are, coefficients of a fitted curve over the rank, then per residual bin a scale and
packed integers; with delta encoding the numbers are differences to the entry before. Ids are packed in ceil(log2 d)
bits. Log-probabilities are of the full softmax at temperature 1, without a tail: it is 1 minus their sum. Documents of
packed samples are told apart by `attention_mask` (1, 1, 2, 2, 2), by `position_ids` that start again, or by a token
that the user names; else a sample stays whole.

Decoding is in float64, with the curve's terms rounded to their type as the writer had them.
Cost: a few microseconds per position.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import CacheError, DamagedError, first_line
from shared.parts.cache_files import read_bounded
from shared.parts.records import checked_model
from shared.schema import MAX_K, MAX_VOCAB_SIZE
from tools.cache.foreign.bit_packing import NUMBER_BYTES, numbers, packed_bytes, rounded, unpack, unpack_words
from tools.cache.foreign.foreign_row import ForeignRow, check_entries, pieces_of
from tools.cache.foreign.parquet_rows import (
    ENTRY_IDS,
    ENTRY_NUMBERS,
    IDS,
    grid,
    parquet_columns,
    parquet_files,
    parquet_rows,
    ragged,
    widest,
)
from tools.cache.parquet_columns import Lists

SETTINGS_FILE = "compression_config.yaml"
_MOST_SETTINGS_BYTES = 2**20
_MOST_BINS = 4096
Number = Literal["float16", "bfloat16", "float32", "float64"]
_STRICT = ConfigDict(extra="forbid")


class ResidualBin(BaseModel):
    """A run of ranks whose residuals share a scale."""

    model_config = _STRICT

    scale_dtype: Number
    element_bits: int = Field(ge=1, le=63)
    num_elements: int = Field(ge=1, le=MAX_K)


class Compression(BaseModel):
    """How log-probabilities were compressed: `compression_config.yaml`."""

    model_config = _STRICT

    d: int = Field(ge=2, le=MAX_VOCAB_SIZE)
    k: int = Field(ge=1, le=MAX_K)
    exact_k: int = Field(ge=0, le=MAX_K)
    exact_dtype: Number = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = Field(None, max_length=64)
    term_dtype: Number = "float32"
    residual_bins: list[ResidualBin] = Field(max_length=_MOST_BINS)
    delta_encoding: bool = True
    error_diffusion: bool = False
    """How it was rounded; read alike."""
    normalize_t: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Compression:
        if self.exact_k > self.k or sum(b.num_elements for b in self.residual_bins) > self.k - self.exact_k:
            raise ValueError("exact_k and the residual bins hold more entries than k")
        if any(isinstance(term, int) and not 0 <= term <= 64 for term in self.polynomial_terms or ()):
            raise ValueError("a power of polynomial_terms lies outside 0 to 64")
        return self

    @property
    def position_bytes(self) -> int:
        """Bytes of one position's log-probabilities."""
        exact = self.exact_k * NUMBER_BYTES[self.exact_dtype]
        terms = len(self.polynomial_terms or ()) * NUMBER_BYTES[self.term_dtype]
        return (
            exact
            + terms
            + sum(
                NUMBER_BYTES[b.scale_dtype] + packed_bytes(b.element_bits, b.num_elements) for b in self.residual_bins
            )
        )


class OlderCompression(BaseModel):
    """How logits were compressed before: `legacy_logit_compression`."""

    model_config = _STRICT

    k: int = Field(ge=1, le=MAX_K)
    exact_k: int = Field(ge=0, le=MAX_K)
    polynomial_degree: int = Field(ge=0, le=32)
    vocab_size: int = Field(ge=2, le=MAX_VOCAB_SIZE)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: Number = "float32"


class DistillKitReader:
    """Reads a directory of DistillKit's Parquet files, or one file."""

    form = "DistillKit"
    labels = "head"

    def __init__(self, path: Path, settings: Path | None, split_at: Collection[int]) -> None:
        """Look at columns and settings.

        Args:
            path: a directory of Parquet files, or one.
            settings: its compression_config.yaml, or a recipe of DistillKit; None: the one beside the files.
            split_at: tokens that end a document.

        Raises:
            CacheError: no such files, or no settings where they are needed.
            DamagedError: settings that contradict themselves.
        """
        self.tail = "derived"
        self._files = parquet_files(path)
        self._split_at = np.array(sorted(split_at), np.int64)
        there = parquet_columns(self._files)
        self._kind = _kind_of(there, path)
        self._beside: list[str] = [name for name in ("labels", "attention_mask", "position_ids") if name in there]
        directory = path if path.is_dir() else path.parent
        self._settings = (
            None if self._kind == "raw" else _read_settings(settings or directory / SETTINGS_FILE, self._kind)
        )
        if isinstance(self._settings, OlderCompression):
            self.tail = "unknown"  # centred logits, right up to a constant
        self.k = widest(self._files, "token_ids") if self._settings is None else self._settings.k
        known = self._settings
        self.vocab_size = known.d if isinstance(known, Compression) else known.vocab_size if known else None
        boundaries = [name for name in self._beside if name != "labels"]
        self.notes: dict[str, object] = {
            "kind": self._kind,
            "split by": boundaries or ("tokens" if split_at else None),
            "settings": None if self._settings is None else self._settings.model_dump(mode="json"),
        }

    def rows(self) -> Iterator[ForeignRow]:
        """Yield every document; see `ForeignReader`."""
        columns = {"input_ids": IDS, **_COLUMNS[self._kind], **dict.fromkeys(self._beside, IDS)}
        for where, lists, i in parquet_rows(self._files, columns):
            yield from self._documents(where, lists, i)

    def _documents(self, where: str, lists: Mapping[str, Lists], i: int) -> Iterator[ForeignRow]:
        token_ids = np.asarray(lists["input_ids"].values(i)).astype(np.int64)
        ids, logprobs = self._entries(where, lists, i)
        num_rows = min(len(ids), max(len(token_ids) - 1, 0))  # the row after the last token has no token to predict
        if not len(token_ids) - 1 <= len(ids) <= len(token_ids):
            raise DamagedError(f"{where} has {len(token_ids)} tokens and distributions after {len(ids)} of them")
        row = ForeignRow(where, token_ids, np.arange(1, num_rows + 1), ids[:num_rows], logprobs[:num_rows])
        beside = {name: np.asarray(lists[name].values(i)) for name in self._beside}
        for name, values in beside.items():
            if len(values) < len(token_ids):
                raise DamagedError(f"{where} has {len(token_ids)} tokens and {len(values)} values in {name}")
        row = _without_padding(row, beside)
        starts = self._starts(row.token_ids, beside)
        if "labels" in beside:
            row = row.entries(beside["labels"][row.predicted] >= 0)
        yield from pieces_of(row, starts)

    def _entries(self, where: str, lists: Mapping[str, Lists], i: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return [R, K] ids and log-probabilities."""
        settings = self._settings
        if settings is None:
            return ragged(lists["token_ids"], lists["top_values"], i, where)
        if isinstance(settings, OlderCompression):
            return _older_entries(settings, where, lists, i)
        packed, values = (
            _octets(lists[name], i, where, name) for name in ("bytepacked_indices", "compressed_logprobs")
        )
        bits = index_bits(settings.d)
        wanted = (settings.position_bytes, packed_bytes(bits, settings.k))
        if (len(values) and (values.shape[1], packed.shape[1]) != wanted) or len(values) != len(packed):
            raise DamagedError(
                f"{where} has {values.shape} and {packed.shape} bytes of values and ids where its settings ask for "
                f"{wanted[0]} and {wanted[1]} a position; name the settings that it was captured with (--compression)"
            )
        if not len(values):
            return np.zeros((0, settings.k), np.int64), np.zeros((0, settings.k))
        check_entries(len(values), settings.k, where)
        return unpack(packed, bits, settings.k), decode(values, settings)

    def _starts(self, token_ids: NDArray[np.int64], beside: Mapping[str, np.ndarray]) -> NDArray[np.bool_]:
        """Return [T] where a document begins."""
        starts = np.zeros(len(token_ids), np.bool_)
        if "attention_mask" in beside:
            mask = beside["attention_mask"][: len(token_ids)]
            starts[1:] |= mask[1:] != mask[:-1]
        if "position_ids" in beside:
            places = beside["position_ids"][: len(token_ids)].astype(np.int64)
            starts[1:] |= places[1:] != places[:-1] + 1
        starts[1:] |= np.isin(token_ids[:-1], self._split_at)
        return starts


_COLUMNS = {
    "compressed": {"compressed_logprobs": ENTRY_IDS, "bytepacked_indices": ENTRY_IDS},
    "older": {"packed_indices": ENTRY_IDS, "exact_values": ENTRY_NUMBERS, "coeffs": ENTRY_NUMBERS},
    "raw": {"token_ids": ENTRY_IDS, "top_values": ENTRY_NUMBERS},
}


def _kind_of(columns: Collection[str], path: Path) -> str:
    for kind, names in _COLUMNS.items():
        if "input_ids" in columns and all(name in columns for name in names):
            return kind
    raise CacheError(
        f"{path} has the columns {', '.join(sorted(columns))[:200]}; expected input_ids with "
        + ", or ".join(" and ".join(names) for names in _COLUMNS.values())
    )


def _read_settings(path: Path, kind: str) -> Compression | OlderCompression:
    """Read settings, by themselves or within a recipe of DistillKit."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        raise CacheError(
            f"there is no {path}, which says how the values were compressed; name the file with --compression (a "
            "recipe of DistillKit that trains from them has it as teacher.logprob_compressor)"
        )
    try:
        document: Any = YAML(typ="safe", pure=True).load(read_bounded(path, _MOST_SETTINGS_BYTES))
    except (YAMLError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is no YAML ({first_line(error)})") from None
    name, model = (
        ("legacy_logit_compression", OlderCompression) if kind == "older" else ("logprob_compressor", Compression)
    )
    for key in ("teacher", name):
        if isinstance(document, dict) and isinstance(document.get(key), dict):
            document = document[key]
    if not isinstance(document, dict):
        raise DamagedError(f"{path} holds no settings; expected those of {name}")
    checked_model(model, document, path)
    return model.model_validate(document)


def index_bits(vocab_size: int) -> int:
    """Return the bits of one id: 17 for 128,256 entries."""
    return max(1, math.ceil(math.log2(vocab_size)))


def decode(values: NDArray[np.uint8], settings: Compression) -> NDArray[np.float64]:
    """Return [S, k] log-probabilities of [S, B] bytes."""
    at = 0

    def take(num_bytes: int) -> NDArray[np.uint8]:
        nonlocal at
        at += num_bytes
        return values[:, at - num_bytes : at]

    exact = numbers(take(settings.exact_k * NUMBER_BYTES[settings.exact_dtype]), settings.exact_dtype)
    rest = np.zeros((len(values), settings.k - settings.exact_k))
    terms = settings.polynomial_terms or []
    if terms:
        coefficients = numbers(take(len(terms) * NUMBER_BYTES[settings.term_dtype]), settings.term_dtype)
        rest += coefficients @ _curve(terms, rest.shape[1], settings).T
    first = 0
    for each in settings.residual_bins:
        scale = numbers(take(NUMBER_BYTES[each.scale_dtype]), each.scale_dtype)
        found = unpack(take(packed_bytes(each.element_bits, each.num_elements)), each.element_bits, each.num_elements)
        steps = 2.0 * found - 1.0 if each.element_bits == 1 else found - 2.0 ** (each.element_bits - 1)
        rest[:, first : first + each.num_elements] += steps * scale
        first += each.num_elements
    whole = np.concatenate([exact, rest], axis=1)
    return np.cumsum(whole, axis=1) if settings.delta_encoding else whole


def _curve(terms: list[int | Literal["sqrt", "exp"]], num_ranks: int, settings: Compression) -> NDArray[np.float64]:
    """Return [ranks, terms] the functions of the rank, rounded to the type that the writer computed in."""
    rank = np.linspace(0.0, 1.0, num_ranks) if settings.normalize_t else np.arange(num_ranks, dtype=np.float64)
    rank = rounded(rank, settings.term_dtype)
    with np.errstate(over="ignore"):
        columns = [np.sqrt(rank) if t == "sqrt" else np.exp(rank) if t == "exp" else rank**t for t in terms]
    return rounded(np.stack(columns, axis=1), settings.term_dtype)


def _octets(lists: Lists, i: int, where: str, name: str) -> NDArray[np.uint8]:
    """Return the inner lists of row i as bytes.

    Raises:
        DamagedError: a value is no byte, or the lists differ in length.
    """
    found = grid(lists, i, where, name)
    if found.size and not 0 <= int(found.min()) <= int(found.max()) <= 255:
        raise DamagedError(f"{where} has values from {found.min()} to {found.max()} in {name}; expected bytes")
    return found.astype(np.uint8)


def _older_entries(
    settings: OlderCompression, where: str, lists: Mapping[str, Lists], i: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return [R, K] ids and logits, which are right up to a constant."""
    words, exact, coefficients = (grid(lists[name], i, where, name) for name in _COLUMNS["older"])
    num_terms = settings.polynomial_degree + 1 + settings.with_sqrt_term if settings.exact_k < settings.k else 0
    bits = index_bits(settings.vocab_size)
    wanted = (-(-settings.k // (64 // bits)), settings.exact_k, num_terms)
    found = (words.shape[1], exact.shape[1], coefficients.shape[1])
    if (len(words) and found != wanted) or not len(words) == len(exact) == len(coefficients):
        raise DamagedError(
            f"{where} has {found} words, exact values and coefficients a position where its settings ask for {wanted}"
        )
    check_entries(len(words), settings.k, where)
    rank = np.arange(1, settings.k - settings.exact_k + 1, dtype=np.float64)
    sign = -1 if settings.invert_polynomial else 1
    columns = [rank ** (sign * power) for power in range(settings.polynomial_degree + 1)]
    columns += [np.sqrt(rank)] if settings.with_sqrt_term else []
    logits = exact.astype(np.float64)
    if num_terms:
        curve = coefficients.astype(np.float64) @ rounded(np.stack(columns), "float32")
        logits = np.concatenate([logits, curve], axis=1)
    logits = logits - logits.max(axis=1, keepdims=True, initial=-np.inf) if len(logits) else logits
    log_total = np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return unpack_words(words.astype(np.uint64), bits, settings.k), logits - log_total


def _without_padding(row: ForeignRow, beside: Mapping[str, np.ndarray]) -> ForeignRow:
    """Return a sample without the tokens at its end that no attention goes to."""
    if "attention_mask" not in beside:
        return row
    attended = np.flatnonzero(beside["attention_mask"][: len(row.token_ids)])
    num_tokens = int(attended[-1]) + 1 if len(attended) else 0
    return replace(row.entries(row.predicted < num_tokens), token_ids=row.token_ids[:num_tokens])
