"""Fetch the parts of a cache behind a URL before the packs that need them are read.

Each part has a first pack of the epoch that needs it; once a pack is read, the parts that are first needed next are
asked for, as many as a window has, in threads. What is fetched too late or not at all is fetched when it is read, which
is also where a failure is said. The threads belong to one process and end with it.
Cost: one pass over the epoch's rows; at most two windows of parts on disk.

Shape letters: R rows of the caches, N parts that an epoch needs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from shared.errors import DecantError
from student_train.order.stage_plan import StagePlan

NUM_THREADS = 4


class PartPrefetch:
    """Asks for parts ahead of the packs of one plan."""

    def __init__(
        self, plan: StagePlan, part_numbers: NDArray[np.int32], num_ahead: int, fetch: Callable[[int], None]
    ) -> None:
        """Keep `num_ahead` parts coming, beyond those that have been needed.

        Args:
            plan: the packs, in order.
            part_numbers: [R] number of the part that each row lies in.
            num_ahead: how many.
            fetch: brings a part to this machine, by its number.
        """
        self._plan, self._part_numbers, self._num_ahead, self._fetch = plan, part_numbers, num_ahead, fetch
        self._needs: dict[int, tuple[NDArray[np.int64], NDArray[np.int32]]] = {}
        self._asked: set[tuple[int, int]] = set()
        self._queue: SimpleQueue[int] = SimpleQueue()
        self.pid = os.getpid()
        for _ in range(NUM_THREADS):
            threading.Thread(target=self._work, daemon=True, name="part-prefetch").start()

    def reached(self, index: int) -> None:
        """Ask for the parts that come after the stage's pack `index`."""
        epoch, pack = self._plan.place_of(index)
        packs, parts = self._of_epoch(epoch)
        begun = int(np.searchsorted(packs, pack, side="right"))
        wanted = [(epoch, part) for part in parts[: begun + self._num_ahead].tolist()]
        missing = begun + self._num_ahead - len(parts)
        if missing > 0 and epoch + 1 < len(self._plan.epochs):
            wanted += [(epoch + 1, part) for part in self._of_epoch(epoch + 1)[1][:missing].tolist()]
        for asked in wanted:
            if asked not in self._asked:
                self._asked.add(asked)
                self._queue.put(asked[1])

    def _of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return [N] packs and [N] parts that they are the first to need, in the order of the packs."""
        if epoch not in self._needs:
            planned = self._plan.epochs[epoch]
            parts, first = np.unique(self._part_numbers[planned.rows], return_index=True)
            packs = np.searchsorted(planned.offsets, first, side="right") - 1
            order = np.argsort(packs, kind="stable")
            self._needs = {kept: self._needs[kept] for kept in self._needs if kept >= epoch - 1}
            self._needs[epoch] = (packs[order], parts[order].astype(np.int32))
        return self._needs[epoch]

    def _work(self) -> None:
        while True:
            with contextlib.suppress(DecantError):  # said by the read that needs it
                self._fetch(self._queue.get())
