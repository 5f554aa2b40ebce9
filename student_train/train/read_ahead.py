"""Packs read before they are asked for, in a thread, while the step before is computed.

Reading is a pure function of the pack's number, so that reading ahead changes nothing but the time: no random state, no
position. The next numbers follow from the order in which a process gets its batches; a number that was not expected is
read at once. Workers of the data loader (`dataloader_num_workers`) do the same in processes of their own and need no
thread.
Cost: `NUM_AHEAD` packs in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

NUM_AHEAD = 3
"""Packs that are read ahead; the data loader itself holds one batch more."""


class ReadAhead(torch.utils.data.Dataset):  # type: ignore[misc]
    """A dataset whose next items are being read already."""

    def __init__(self, dataset: Any, batch_size: int, num_processes: int) -> None:
        """Read ahead in `dataset` for one of `num_processes` processes that take batches of `batch_size` in turn."""
        self.dataset = dataset
        self._batch_size, self._num_processes = batch_size, num_processes
        self._pending: dict[int, Future[Any]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")

    def __len__(self) -> int:
        """Items of the dataset."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return one item, and begin to read those that come after it."""
        expected = self._pending.pop(index, None)
        following = list(self._following(index))
        for number in following:
            if number not in self._pending:
                self._pending[number] = self._thread.submit(self.dataset.__getitem__, number)
        for number in [number for number in self._pending if number not in following]:
            self._pending.pop(number).cancel()
        return self.dataset[index] if expected is None else expected.result()

    def _following(self, index: int) -> Iterator[int]:
        for _ in range(NUM_AHEAD):
            index += 1
            if index % self._batch_size == 0:
                index += (self._num_processes - 1) * self._batch_size
            if index >= len(self.dataset):
                return
            yield index

    def close(self) -> None:
        """Stop reading."""
        self._thread.shutdown(wait=True, cancel_futures=True)
