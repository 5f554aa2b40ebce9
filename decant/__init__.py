"""The Python interface: caches, batches and losses for a notebook or another trainer, and the phases as functions.

    cache = decant.open_cache("runs/demo/cache")
    data = decant.TorchDataset(cache, pack_tokens=2048)
    loss = decant.sparse_loss(hidden, head, batch, [decant.forward_kl()])

`import decant` loads nothing heavy: each name is imported when it is first used, and with it numpy and pyarrow for
caches, torch for datasets and losses, an engine for `teach`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decant.losses import (
        cross_entropy,
        decoupled_kl,
        forward_kl,
        head_kl,
        jsd,
        reverse_kl,
        skew_forward_kl,
        skew_reverse_kl,
        sparse_loss,
        sparse_loss_from_logits,
        tail_weighted_kl,
    )
    from decant.phases import evaluate, report, teach, train
    from decant.reading import Cache, Row, open_cache
    from decant.torch_dataset import TorchDataset
    from shared.errors import DecantError
    from shared.recipe.file import load_recipe

_HOMES = {
    "decant.reading": ("Cache", "Row", "open_cache"),
    "decant.torch_dataset": ("TorchDataset",),
    "decant.phases": ("evaluate", "report", "teach", "train"),
    "shared.errors": ("DecantError",),
    "shared.recipe.file": ("load_recipe",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
"""Names that are no loss: those are of `decant.losses`."""

__all__ = [
    "Cache",
    "DecantError",
    "Row",
    "TorchDataset",
    "cross_entropy",
    "decoupled_kl",
    "evaluate",
    "forward_kl",
    "head_kl",
    "jsd",
    "load_recipe",
    "open_cache",
    "report",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "sparse_loss",
    "sparse_loss_from_logits",
    "tail_weighted_kl",
    "teach",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'decant' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF.get(name, "decant.losses")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
