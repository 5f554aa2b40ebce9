"""Fetch the parts of a cache behind a URL before the packs that need them are read.

Each part has a first pack of the epoch that needs it; once a pack is read, the parts that are first needed next are
asked for, in threads: a few of them, and no more than this machine keeps beside those that are being read, since they
would drive each other out. What is fetched too late or not at all is fetched when it is read, which is also where a
failure is said. The threads belong to one process and end with it.
Cost: one pass over the epoch's rows.

Shape letters: R rows of the caches, N parts that an epoch needs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.errors import DecantError
from student_train.order.stage_plan import StagePlan

NUM_THREADS = 4


class _Needs(NamedTuple):
    """Parts that an epoch needs, in the order of the packs that are the first to need them."""

    first: NDArray[np.int64]
    """[N] first pack that needs each."""
    last: NDArray[np.int64]
    """[N] last pack that needs each."""
    parts: NDArray[np.int32]
    """[N]"""


class PartPrefetch:
    """Asks for parts ahead of the packs of one plan."""

    def __init__(
        self,
        plan: StagePlan,
        part_numbers: NDArray[np.int32],
        num_ahead: int,
        fetch: Callable[[int], None],
        part_bytes: NDArray[np.int64],
        bound_bytes: int,
    ) -> None:
        """Keep `num_ahead` parts coming, beyond those that have been needed.

        Args:
            plan: the packs, in order.
            part_numbers: [R] number of the part that each row lies in.
            num_ahead: how many.
            fetch: brings a part to this machine, by its number.
            part_bytes: size of every part.
            bound_bytes: what this machine keeps.
        """
        self._plan, self._part_numbers, self._num_ahead, self._fetch = plan, part_numbers, num_ahead, fetch
        self._part_bytes, self._bound_bytes = part_bytes, bound_bytes
        self._needs: dict[int, _Needs] = {}
        self._asked: set[tuple[int, int]] = set()
        self._queue: SimpleQueue[int] = SimpleQueue()
        self.pid = os.getpid()
        for _ in range(NUM_THREADS):
            threading.Thread(target=self._work, daemon=True, name="part-prefetch").start()

    def reached(self, index: int) -> None:
        """Ask for the parts that come after the stage's pack `index`, and for those that are being read."""
        epoch, pack = self._plan.place_of(index)
        needs = self._of_epoch(epoch)
        begun = int(np.searchsorted(needs.first, pack, side="right"))
        read = needs.parts[:begun][needs.last[:begun] >= pack]
        coming = [(epoch, part) for part in needs.parts[begun : begun + self._num_ahead].tolist()]
        missing = self._num_ahead - len(coming)
        if missing and epoch + 1 < len(self._plan.epochs):
            coming += [(epoch + 1, part) for part in self._of_epoch(epoch + 1).parts[:missing].tolist()]
        held = self._part_bytes[read].sum() + np.cumsum([self._part_bytes[part] for _, part in coming])
        fitting = coming[: int(np.searchsorted(held, self._bound_bytes, side="right"))]
        for asked in [*((epoch, part) for part in read.tolist()), *fitting]:
            if asked not in self._asked:
                self._asked.add(asked)
                self._queue.put(asked[1])

    def _of_epoch(self, epoch: int) -> _Needs:
        """Return what the packs of an epoch need, in their order."""
        if epoch not in self._needs:
            planned = self._plan.epochs[epoch]
            parts, first, of_rows = np.unique(self._part_numbers[planned.rows], return_index=True, return_inverse=True)
            last = np.zeros(len(parts), np.int64)
            np.maximum.at(last, of_rows, np.arange(len(of_rows)))
            packs = [np.searchsorted(planned.offsets, rows, side="right") - 1 for rows in (first, last)]
            order = np.argsort(packs[0], kind="stable")
            self._needs = {kept: self._needs[kept] for kept in self._needs if kept >= epoch - 1}
            self._needs[epoch] = _Needs(packs[0][order], packs[1][order], parts[order].astype(np.int32))
        return self._needs[epoch]

    def _work(self) -> None:
        while True:
            with contextlib.suppress(DecantError):  # said by the read that needs it
                self._fetch(self._queue.get())
