"""Megatron-LM's tar shards: `cpC_dpD__I.tar` with `_meta.json` and an `ITERATION.pt.zst` per step.

A step holds for each microbatch log-probabilities [L, B, K] of the full softmax, the lower 16 bits of the ids and their
17th. Sequences come in the order in which training read them: step by step, within a step microbatch by microbatch, the
data-parallel ranks in turn. The token ids are not in the shards, so the user gives them in that order, L + 1 (or L) to
a sequence; row s is about token s + 1. The tail is 1 minus the sum. A `.pt` file is a pickle: only its numbers are read
(`weights_only=True`), from a frame whose size is looked at first.
"""

from __future__ import annotations

import io
import itertools
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import CacheError, DamagedError, NamingError, first_line
from shared.parts.cache_files import list_folder, open_regular, parse_json
from shared.schema import MAX_ENTRIES_PER_ROW, MAX_FRAME_FREE_BYTES, MAX_FRAME_RATIO, MAX_K
from tools.cache.foreign.foreign_row import ForeignRow
from tools.cache.foreign.parquet_rows import IDS, parquet_files, parquet_rows

_SHARD = re.compile(r"cp(?P<cp>\d{1,4})_dp(?P<dp>\d{1,6})__(?P<last>\d{1,15})\.tar")
_STEP = re.compile(r"(?P<step>\d{1,15})\.pt\.zst")
_META = "_meta.json"
_MOST_META_BYTES = 2**20
_MOST_STEP_BYTES = 2**31
_MASKED = -999.0
"""Entries cut by a nucleus hold -1000."""


class MegatronReader:
    """Reads a directory of shards beside the token ids that the user gives."""

    form = "Megatron-LM"
    labels = "head"

    def __init__(self, path: Path, token_ids: Path) -> None:
        """Look at the names and settings of the shards; `token_ids` is Parquet with a column `input_ids`, a sequence a
        row, in the order of training.

        Raises:
            CacheError: no shards, or those of a training with context parallelism.
            DamagedError: settings that cannot be read.
        """
        found = [match for name in list_folder(path) if (match := _SHARD.fullmatch(name))]
        if not found:
            raise NamingError(f"{path} holds no shards; expected files such as cp0_dp0__100.tar")
        if any(int(match["cp"]) for match in found):
            raise CacheError(
                f"{path} has shards of context-parallel ranks above 0, which hold parts of sequences; not read"
            )
        ranks = sorted({int(match["dp"]) for match in found})
        if ranks != list(range(len(ranks))):
            raise CacheError(f"{path} lacks shards of a data-parallel rank: it has those of {ranks}")
        self._shards = [
            [path / m[0] for m in sorted(found, key=lambda m: int(m["last"])) if int(m["dp"]) == rank] for rank in ranks
        ]
        self._token_ids = parquet_files(token_ids)
        saver = self._meta(self._shards[0][0]).get("saver")
        self.tail = "derived"
        self.k = saver["k"] if isinstance(saver, dict) and type(saver.get("k")) is int else 0
        if not 1 <= self.k <= MAX_K:
            raise DamagedError(f"{self._shards[0][0]}: {_META} says k {self.k}; expected a count")
        self.vocab_size: int | None = None
        self.notes: dict[str, object] = {"data-parallel ranks": len(ranks), "saver": saver}

    def rows(self) -> Iterator[ForeignRow]:
        """Yield every sequence; see `ForeignReader`."""
        texts = parquet_rows(self._token_ids, {"input_ids": IDS})
        for place, ids, logprobs in self._sequences():
            where, lists, i = next(texts, ("", {}, 0))
            if not where:
                raise DamagedError(f"{self._token_ids[-1]} ends before the shards do: {place} has no token ids")
            token_ids = np.asarray(lists["input_ids"].values(i)).astype(np.int64)
            if not len(ids) <= len(token_ids) <= len(ids) + 1:
                raise DamagedError(f"{where} has {len(token_ids)} tokens where {place} has {len(ids)} rows of targets")
            kept = len(token_ids) - 1
            yield ForeignRow(where, token_ids, np.arange(1, len(token_ids)), ids[:kept], logprobs[:kept])
        if next(texts, None) is not None:
            raise DamagedError(f"{self._token_ids[-1]} has more sequences than the shards; are shards missing?")

    def _sequences(self) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.float64]]]:
        """Yield (place, ids [L, K], log-probabilities [L, K]) in the order of training."""
        for group in itertools.zip_longest(*(_steps(shards) for shards in self._shards)):
            if None in group:
                raise DamagedError(
                    f"{self._shards[0][0].parent} has more steps of one data-parallel rank than another's"
                )
            places, numbers, payloads = zip(*group, strict=True)
            if len(set(numbers)) > 1:
                raise DamagedError(f"{places[0]} stands beside step {numbers[1]} of another rank; a shard is missing")
            batches = [_microbatches(place, payload) for place, payload in zip(places, payloads, strict=True)]
            if len({len(each) for each in batches}) > 1:
                raise DamagedError(f"{places[0]} has another number of microbatches than the step of another rank")
            for ranks in zip(*batches, strict=True):
                for place, tensors in zip(places, ranks, strict=True):
                    values, ids = _arrays(place, self.k, *tensors)
                    for sequence in range(values.shape[1]):
                        yield f"{place} sequence {sequence}", ids[:, sequence], values[:, sequence]

    def _meta(self, shard: Path) -> dict[str, Any]:
        for name, data in _members(shard):
            if name == _META:
                return parse_json(data, f"{shard}: {_META}")
        raise DamagedError(f"{shard} has no {_META}; it is no shard, or was altered")


class _Member(tarfile.TarInfo):
    """A member whose extended headers, which tarfile reads whole, are bounded."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in tarfile.REGULAR_TYPES and self.size > _MOST_META_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        found: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return found


def _members(shard: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the regular files of a tar that matter, their sizes bounded."""
    try:
        with open_regular(shard) as source, tarfile.open(fileobj=source, mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                known = member.name == _META or _STEP.fullmatch(member.name)
                if not member.isreg() or not known:
                    continue
                if member.size > (_MOST_META_BYTES if member.name == _META else _MOST_STEP_BYTES):
                    raise DamagedError(f"{shard}: {member.name} has {member.size:,} bytes; too many")
                opened = tar.extractfile(member)
                data = opened.read() if opened else b""
                if len(data) != member.size:
                    raise DamagedError(f"{shard}: {member.name} is cut")
                yield member.name, data
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DamagedError(f"{shard} is no tar ({first_line(error)})") from None


def _steps(shards: list[Path]) -> Iterator[tuple[str, int, bytes]]:
    """Yield (place, step, payload) of one rank in order."""
    last = -1
    for shard in shards:
        for name, data in _members(shard):
            if name == _META:
                continue
            step = int(name.split(".")[0])
            if step <= last:
                raise DamagedError(f"{shard}: step {step} comes after {last}; a shard is twice there, or was altered")
            last = step
            yield f"{shard} step {step}", step, data


def _microbatches(place: str, payload: bytes) -> list[tuple[Any, Any, Any]]:
    """Return the tensors [L, B, K] of each microbatch of a step: values, lower bits, 17th bit."""
    import torch
    import zstandard

    try:
        size = zstandard.frame_content_size(payload)
        most = min(_MOST_STEP_BYTES, MAX_FRAME_FREE_BYTES + MAX_FRAME_RATIO * len(payload))
        if not 0 < size <= most:
            raise DamagedError(f"{place} unpacks to {size:,} bytes; from 1 to {most:,} are read of {len(payload):,}")
        data = zstandard.ZstdDecompressor().decompress(payload, max_output_size=size)
        _refuse_packed_inside(data)
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        columns = [found[name] for name in ("values", "indices_low", "bit_17")]
        microbatches = list(zip(*columns, strict=True))
        for tensor in itertools.chain.from_iterable(microbatches):
            _check_tensor(tensor)
        return microbatches
    except DamagedError:
        raise
    except Exception as error:  # noqa: BLE001 - torch raises many kinds for what is no tensor file
        raise DamagedError(f"{place} is no step of saved log-probabilities ({first_line(error)})") from None


def _refuse_packed_inside(data: bytes) -> None:
    """Refuse a file of tensors whose members are compressed: they would unpack to any size; torch writes none."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
    if any(each.compress_type != zipfile.ZIP_STORED for each in members) or sum(m.file_size for m in members) > len(
        data
    ):
        raise ValueError("its members are compressed")


def _check_tensor(tensor: Any) -> None:
    """Refuse what is no plain tensor of numbers in memory, or one that repeats its numbers to look larger."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError("something else than tensors")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_complex() or tensor.is_quantized:
        raise ValueError(f"a tensor of {tensor.dtype} that is no plain one")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError("a tensor that is larger than its numbers")


def _arrays(place: str, k: int, values: Any, low: Any, high: Any) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if values.ndim != 3 or values.shape != low.shape or values.shape != high.shape:
        raise DamagedError(f"{place} has a microbatch of shapes {tuple(values.shape)} and {tuple(low.shape)}")
    if values.shape[2] > k:
        raise DamagedError(f"{place} has {values.shape[2]} entries a position where {_META} says k {k}; it was altered")
    if not values.is_floating_point() or low.is_floating_point() or high.is_floating_point():
        raise DamagedError(f"{place} has values of {values.dtype} and ids of {low.dtype} and {high.dtype}")
    if values.numel() > MAX_ENTRIES_PER_ROW:
        raise DamagedError(f"{place} has a microbatch of {values.numel():,} entries; too many")
    if bool((high.long() >> 1 != 0).any()) or bool((low.long() >> 16 != 0).any()):
        raise DamagedError(f"{place} has ids that are not 16 bits and a 17th; it was altered")
    logprobs = values.detach().double().numpy()
    ids = low.detach().long().numpy() | (high.detach().long().numpy() << 16)
    return np.where(logprobs <= _MASKED, -np.inf, logprobs), ids
