"""Capture dense distributions as the engines do: the same columns, cut, tails and draws, of given log-probabilities.

Shape letters: C positions of a chunk, V entries, K head entries, J temperatures, m draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shared.keys import row_salt
from shared.parts.sequences import SequenceRow
from shared.payload.targets import SparseTargets
from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.columns.draw_keys import prefix_keys_of, salted
from teacher_cache.engines.columns.sparse_columns import predicting_rows, targets_from_plugin
from teacher_cache.engines.columns.tail_columns import extend_columns

Columns = tuple[torch.Tensor, torch.Tensor]
"""ids int64 and values float64, both [C, 1 + layout.num_extra]"""


def capture_chunk(logprobs: torch.Tensor, row: SequenceRow, where: slice, layout: ColumnLayout) -> Columns:
    """Return the columns of [C, V] log-probabilities of some of a row's positions."""
    predicting = torch.from_numpy(predicting_rows(row.spans))[where]
    keys = salted(prefix_keys_of(row.token_ids)[predicting], row_salt(row.row_key))
    labels = torch.from_numpy(row.labels().astype(np.int64))[where]
    head_logprobs, head_ids = logprobs[:, : layout.vocab_size].topk(layout.num_head, dim=-1)
    own = logprobs.gather(1, labels[:, None])[:, 0]
    return extend_columns(logprobs, labels, own, head_ids, head_logprobs, keys, layout)


def join_columns(chunks: Sequence[Columns], layout: ColumnLayout) -> SparseTargets:
    """Return chunks of a row as its sparse targets."""
    ids = torch.cat([ids for ids, _ in chunks]).numpy().astype(np.int32)
    values = torch.cat([values for _, values in chunks]).numpy().astype(np.float32)
    return targets_from_plugin(ids, values, layout)
