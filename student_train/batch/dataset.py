"""The packs of a stage as arrays, read from one or several caches.

Map-style: item i is the stage's i-th pack, whoever asks and whenever, so a resumed run starts at its position and reads
nothing before it. Several caches follow one another as one list of rows; sources of the same name are one source. Cost:
one row's decode per row of the pack (microseconds); memory independent of the caches' size beyond 24 bytes per row and
4 per row and epoch.

Shape letters: R rows of all caches, B tokens of a pack, S its supervised positions, N its head entries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cache.cache import Cache, Row
from shared.cache.rows_left_out import rows_left_out
from shared.errors import CacheError, IdentityError, TrainingError
from shared.keys import is_heldout
from shared.parts.sequences import SequenceRow
from shared.payload.narrowing import LayerView
from shared.payload.targets import SparseTargets
from shared.places import origin_of
from shared.recipe.recipe import Recipe
from shared.remote.part_store import bound_bytes
from student_train.batch.hidden_batch import HiddenReading
from student_train.batch.part_prefetch import PartPrefetch
from student_train.batch.row_targets import as_trained
from student_train.batch.target_batch import pack_targets
from student_train.batch.teacher_layers import TeacherLayer, pack_layers
from student_train.order.stage_plan import StagePlan

Share = TypeVar("Share")

PARTS_AHEAD = 8
"""Parts that are fetched before they are needed, where a cache is read from a URL."""


class CacheList:
    """Several caches as one list of rows."""

    def __init__(self, caches: Sequence[Cache], recipe: Recipe | None = None) -> None:
        """Join opened caches; of their rows those count that a recipe's `answers` chooses, or all where it is None.

        Raises:
            IdentityError: their tokenizers differ.
        """
        assert caches
        self.caches = tuple(caches)
        self.path = caches[0].path
        self.tokenizer_hash = caches[0].sequences_identity.tokenizer_hash
        self.vocab_size = caches[0].sequences_identity.vocab_size
        for cache in caches[1:]:
            other = cache.sequences_identity.tokenizer_hash
            if other != self.tokenizer_hash:
                raise IdentityError(
                    f"{self.path} has tokenizer {self.tokenizer_hash} and {cache.path} has {other}; "
                    "train on caches of one tokenizer, or build one of them again"
                )
        self.layers: tuple[TeacherLayer, ...] = ()
        """Teachers, where a stage has several; its caches are then opened without a layer of their own."""
        self._ends = np.cumsum([len(cache) for cache in caches])
        self.repeats, self.other_answers, self.all_are_other = rows_left_out(self.caches, recipe)

    @classmethod
    def open(
        cls,
        paths: Sequence[Path],
        layers: Sequence[str | LayerView | None] | None,
        *,
        with_targets: bool = True,
        hidden: Sequence[str | bool] | None = None,
        recipe: Recipe | None = None,
    ) -> CacheList:
        """Open caches, each with the layer named for it, its only one where none is named, or without targets, and with
        a hidden layer where one is named; `recipe` chooses the rows that count.

        Raises:
            CacheError: one cannot be opened, or has no such layer.
        """
        hidden = [False] * len(paths) if hidden is None else hidden
        if with_targets:
            named = [None] * len(paths) if layers is None else layers
            caches = [
                Cache.open(path, layer, hidden=name) for path, layer, name in zip(paths, named, hidden, strict=True)
            ]
            for cache in caches:
                if cache.layer is None:
                    raise CacheError(
                        f"{cache.path} has no targets layer, and the stage's losses need the teacher's; "
                        "score it with 'decant teach', or train with cross_entropy alone"
                    )
        else:
            # labels need no layer; the rows are the same, so stages with and without one compare
            caches = [Cache.open_sequences(path, hidden=name) for path, name in zip(paths, hidden, strict=True)]
        return cls(caches, recipe)

    def __len__(self) -> int:
        """R, the number of rows."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        """Return one row."""
        which, place = self._place(index)
        return self.caches[which][place]

    def sequence(self, index: int) -> SequenceRow:
        """Return one row without its targets."""
        which, place = self._place(index)
        return self.caches[which].sequence(place)

    def _place(self, index: int) -> tuple[int, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return which, index - (int(self._ends[which - 1]) if which else 0)

    def taught(self, indices: Sequence[int], rows: Sequence[Row]) -> dict[str, dict[int, SparseTargets]]:
        """Return per teacher the targets of those of a pack's rows that it teaches, by their place in the pack."""
        found: dict[str, dict[int, SparseTargets]] = {layer.key: {} for layer in self.layers}
        for number, (index, row) in enumerate(zip(indices, rows, strict=True)):
            which, place = self._place(index)
            for layer in self.layers:
                if layer.teaches(int(self.sources[index])):
                    found[layer.key][number] = layer.caches[which].targets_of(place, row)
        return found

    @property
    def untaught_codes(self) -> list[int]:
        """Sources that none of several teachers teaches; none where there is one teacher or no teacher."""
        codes = range(len(self.source_names)) if self.layers else ()
        return [code for code in codes if not any(layer.teaches(code) for layer in self.layers)]

    @property
    def untaught(self) -> NDArray[np.bool_]:
        """[R] rows of those sources."""
        return np.isin(self.sources, self.untaught_codes)

    @property
    def cache_id(self) -> str:
        """Identity of what is read: the caches' own, in order, then those of several teachers."""
        of_layers = [f"{layer.key}:{cache.cache_id}" for layer in self.layers for cache in layer.caches]
        return "+".join([*(cache.cache_id for cache in self.caches), *of_layers])

    @cached_property
    def num_tokens(self) -> NDArray[np.int32]:
        """[R] tokens per row."""
        return np.concatenate([cache.num_tokens for cache in self.caches])

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """Names of all sources, sorted."""
        return tuple(sorted({name for cache in self.caches for name in cache.source_names}))

    @cached_property
    def sources(self) -> NDArray[np.int32]:
        """[R] index into `source_names` per row."""
        codes = {name: code for code, name in enumerate(self.source_names)}
        parts = [
            np.array([codes[name] for name in cache.source_names], np.int32)[cache.sources] for cache in self.caches
        ]
        return np.concatenate(parts)

    @cached_property
    def part_numbers(self) -> NDArray[np.int32]:
        """[R] number of the part that each row lies in, over all caches."""
        ranges = [found for cache in self.caches for found in cache.jobs_of_rows()]
        return np.repeat(np.arange(len(ranges), dtype=np.int32), [end - start for _, start, end in ranges])

    @property
    def is_remote(self) -> bool:
        """Tell whether a cache is read from a URL."""
        return any(origin_of(cache.path) is not None for cache in self.caches)

    def fetch_part(self, number: int) -> None:
        """Bring a part to this machine, by its number over all caches; nothing where it is here."""
        for cache, place in self._part(number):
            cache.fetch_part(place)

    @cached_property
    def bytes_to_keep(self) -> NDArray[np.int64]:
        """[N] bytes of this machine's store that each part over all caches takes, with all that is read of it."""
        sizes = []
        for number in range(sum(cache.num_parts for cache in self.caches)):
            files = {path: size for cache, at in self._part(number) for path, size in cache.bytes_to_keep(at).items()}
            sizes.append(sum(files.values()))
        return np.array(sizes, np.int64)

    def _part(self, number: int) -> Iterator[tuple[Cache, int]]:
        """Yield each cache that a part over all caches is read through, and its number there."""
        for which, cache in enumerate(self.caches):
            if number < cache.num_parts:
                yield from ((one, number) for one in (cache, *(layer.caches[which] for layer in self.layers)))
                return
            number -= cache.num_parts

    @property
    def left_out(self) -> NDArray[np.bool_]:
        """[R] rows that are neither trained on nor measured."""
        return self.repeats | self.other_answers

    def training_rows(self, heldout_fraction: float) -> NDArray[np.int32]:
        """Return indices of rows that are neither held out (by group: no prompt is on both sides) nor left out."""
        keys = (key for cache in self.caches for key in np.asarray(cache.group_keys).tolist())
        held = np.fromiter((is_heldout(key, heldout_fraction) for key in keys), bool, len(self))
        return np.flatnonzero(~(held | self.left_out)).astype(np.int32)

    def mixture_codes(self, mixture: Mapping[str, Share] | None) -> dict[int, Share] | None:
        """Return a mixture by source code.

        Raises:
            TrainingError: a source is in none of the caches.
        """
        if mixture is None:
            return None
        unknown = sorted(set(mixture) - set(self.source_names))
        if unknown:
            raise TrainingError(
                f"the mixture names source '{unknown[0]}', which no cache has (they have "
                f"{', '.join(self.source_names)}); correct"
            )
        return {self.source_names.index(name): share for name, share in mixture.items()}


class PackDataset(torch.utils.data.Dataset):  # type: ignore[misc]
    """A stage's packs in training order."""

    def __init__(
        self,
        caches: CacheList,
        plan: StagePlan,
        temperatures: Sequence[float] | None,
        hidden: HiddenReading | None = None,
        *,
        packs_per_pass: int = 1,
    ) -> None:
        """Read packs of `plan` from `caches`, with targets at `temperatures` (None for labels alone) and what `hidden`
        reads. Where processes train together, `packs_per_pass` of them pass forward at a time: what the plan lacks to
        whole passes are packs without a position, since a data loader would begin with the first packs again.
        """
        self.packs_per_pass = packs_per_pass
        self.hidden = hidden
        self.caches = caches
        self.plan = plan
        self.temperatures = temperatures
        self._ahead: PartPrefetch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the threads of this process out."""
        return self.__dict__ | {"_ahead": None}

    def __len__(self) -> int:
        """Packs of all epochs, and those without a position that fill the last pass of all processes."""
        return -(-self.plan.num_packs // self.packs_per_pass) * self.packs_per_pass

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return one pack.

        Keys: `input_ids` int64 [B]; `position_ids` int64 [B], from 0 in each row; `predictor_index` int64 [S], which
        hidden state predicts; `labels` int64 [S]; and what `pack_targets` returns, or `pack_layers` where there are
        several teachers, unless labels are all that is needed. Where a hidden layer is read, also what
        `HiddenReading.pack` returns.
        """
        if self.caches.is_remote:
            self._prefetch().reached(min(index, self.plan.num_packs - 1))
        caches, (places, limit) = self.caches, self._rows_of(index)
        rows = [caches[place] for place in places]
        taught = caches.taught(places, rows)
        return build_pack(rows, limit, self.temperatures, caches.vocab_size, self.hidden, taught)

    def _rows_of(self, index: int) -> tuple[list[int], int]:
        """Return the rows of a pack and their longest length: beyond the plan the first token of one, which no loss is
        of.
        """
        if index < self.plan.num_packs:
            return self.plan.rows_of(index).tolist(), self.plan.limit
        return self.plan.rows_of(self.plan.num_packs - 1)[:1].tolist(), 1

    def _prefetch(self) -> PartPrefetch:
        if self._ahead is None or self._ahead.pid != os.getpid():
            caches = self.caches
            self._ahead = PartPrefetch(
                self.plan, caches.part_numbers, PARTS_AHEAD, caches.fetch_part, caches.bytes_to_keep, bound_bytes()
            )
        return self._ahead

    def tokens_by_source(self, step: int) -> dict[str, int]:
        """Return how many tokens of each source optimizer step `step`, counted from 1, trains on, on all devices
        together.
        """
        plan, names = self.plan, self.caches.source_names
        packs = range((step - 1) * plan.packs_per_step, min(step * plan.packs_per_step, plan.num_packs))
        rows = np.concatenate([plan.rows_of(pack) for pack in packs])
        lengths = np.minimum(self.caches.num_tokens[rows], plan.limit)
        counts = np.bincount(self.caches.sources[rows], weights=lengths, minlength=len(names))
        return {name: int(count) for name, count in zip(names, counts, strict=True)}


def build_pack(
    rows: Sequence[Row],
    limit: int,
    temperatures: Sequence[float] | None,
    vocab_size: int,
    reading: HiddenReading | None = None,
    taught: Mapping[str, Mapping[int, SparseTargets]] | None = None,
) -> dict[str, np.ndarray]:
    """Return one pack's arrays; a row above `limit` tokens loses its end, with the positions whose
    label falls there. Where there are several teachers, `taught` has the targets instead of the rows.
    """
    tokens, positions, predictors, labels, targets, hidden = [], [], [], [], [], []
    num_positions: list[int] = []
    start = 0
    for row in rows:
        ids = row.token_ids[:limit]
        index = row.predictor_index()
        index = index[index < len(ids) - 1]
        tokens.append(ids)
        positions.append(np.arange(len(ids), dtype=np.int64))
        predictors.append(index.astype(np.int64) + start)
        labels.append(ids[index + 1])
        num_positions.append(len(index))
        if temperatures is not None and not taught:
            assert row.targets is not None, "the cache was opened without a layer"
            targets.append(as_trained(row.targets, len(index), temperatures, vocab_size))
        if reading is not None:
            assert row.hidden is not None, "the cache was opened without a hidden layer"
            hidden.append((row.hidden, len(index)))
        start += len(ids)
    return {
        "input_ids": np.concatenate(tokens).astype(np.int64),
        "position_ids": np.concatenate(positions),
        "predictor_index": np.concatenate(predictors),
        "labels": np.concatenate(labels).astype(np.int64),
        **(pack_targets(targets) if targets else {}),
        **(pack_layers(taught, num_positions, temperatures, vocab_size) if taught and temperatures else {}),
        **(reading.pack(hidden) if reading is not None else {}),
    }
