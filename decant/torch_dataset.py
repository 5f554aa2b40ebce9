"""Packs of a cache in the planned order, for any training loop in torch.

Rows are packed without attention between them: `position_ids` begin at 0 in each row, which transformers' sdpa and
flash attention separate when no mask is given. The order is a pure function of seed and epoch, so item i is the same
pack whoever asks and whenever: a loop that stops after pack n goes on with pack n. Cost: a row's decode per row.

Shape letters: B tokens of a batch, S its supervised positions.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from decant.reading import Cache
from shared.errors import TrainingError
from shared.recipe.base import Seed, first_problem
from shared.recipe.recipe import StageTrainer
from shared.recipe.sections.evaluation import Heldout
from student_train.batch.collate import collate
from student_train.batch.dataset import CacheList, PackDataset
from student_train.order.order import StageRows
from student_train.order.stage_plan import plan_stage


class TorchDataset(torch.utils.data.Dataset):  # type: ignore[misc]  # torch has no types here
    """A map-style dataset of packs; use `collate` as the loader's `collate_fn`.

    >>> import decant
    >>> data = decant.TorchDataset(decant.open_cache("data/golden/run-1/cache"), pack_tokens=128, seed=1)
    >>> batch = data.collate([data[0], data[1]])
    >>> batch["input_ids"].shape[0], bool((batch["labels"] == batch["shift_labels"]).all())
    (1, True)
    >>> bool((data[0]["input_ids"] == data[0]["input_ids"]).all()), len(data) > 2
    (True, True)
    """

    collate = staticmethod(collate)
    """Join packs into one batch: `input_ids`, `position_ids` int64 [1, B]; `predictor_index`, `labels` int64 [S]; the
    targets' arrays."""

    def __init__(
        self,
        cache: Cache,
        pack_tokens: int = 2048,
        *,
        seed: int = 0,
        epochs: int = 1,
        temperatures: Sequence[float] | None = None,
        mixture: Mapping[str, float] | None = None,
        heldout_fraction: float = 0.0,
    ) -> None:
        """Plan the packs of a cache or of a slice of one.

        Args:
            cache: as `decant.open_cache` returns it; a slice is packed alone.
            pack_tokens: tokens in one pack; longer rows lose their end.
            seed: of the order.
            epochs: passes over the rows.
            temperatures: of the targets; None for all that the layer holds, or for labels alone without a layer.
            mixture: share of each source in the tokens; None as they are.
            heldout_fraction: share of the prompts that is left out, the same rows as a recipe's `heldout.fraction`.

        Raises:
            TrainingError: nothing is left, a temperature was not captured, a source is unknown, or a number is no size.
        """
        if not isinstance(cache, Cache):
            raise TrainingError(f"expected a cache as decant.open_cache returns it, found {str(cache)[:60]!r}")
        caches = CacheList([cache.stored])
        captured = cache.temperatures
        wanted = tuple(captured if temperatures is None else temperatures)
        missing = [t for t in wanted if t not in captured]
        if missing:
            raise TrainingError(
                f"temperature {missing[0]:g} was not captured, only {', '.join(f'{t:g}' for t in captured)}"
            )
        trainer = _checked(pack_tokens=pack_tokens, num_train_epochs=epochs, fraction=heldout_fraction, seed=seed)
        eligible = np.intersect1d(caches.training_rows(heldout_fraction), np.asarray(cache.row_numbers))
        rows = StageRows(
            seed, caches.num_tokens, caches.sources, pack_tokens, eligible=eligible, source_names=caches.source_names
        )
        plan = plan_stage(trainer, rows, caches.mixture_codes(mixture))
        self._packs = PackDataset(caches, plan, wanted if captured else None)

    def __len__(self) -> int:
        """Packs of all epochs."""
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one pack's arrays; keys as `collate` describes, without the leading 1; IndexError beyond the last."""
        return self._packs[range(len(self))[operator.index(index)]]


class _Sizes(Heldout, StageTrainer):
    """What a recipe may say of them, too."""

    seed: Seed = 0


def _checked(**given: float) -> _Sizes:
    try:
        return _Sizes.model_validate(given)
    except ValidationError as error:
        name, problem = first_problem(error, given)
        names = {"num_train_epochs": "epochs", "fraction": "heldout_fraction"}
        raise TrainingError(f"{names.get(name, name)}: {problem}") from None
