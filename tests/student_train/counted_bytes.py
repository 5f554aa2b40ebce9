"""Bytes of live tensors while code runs, counted storage by storage: what a caching allocator would report, on any
device.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountedBytes(TorchDispatchMode):
    def __init__(self, model) -> None:
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        for tensor in [*model.parameters(), *model.buffers()]:
            self._add(tensor.data)

    def _add(self, tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result
