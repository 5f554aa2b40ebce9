"""Dense distributions of a model at a cached row's supervised positions, a few at a time, by transformers.

Cost: one forward pass per row and at most `CHUNK_ENTRIES` numbers of logits at once.
Shape letters: T tokens of a row, S supervised positions, C positions of a chunk, V entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from shared.errors import IdentityError, UsageError
from shared.identity.identity import LayerIdentity
from shared.identity.weights_hash import weights_hash
from shared.parts.sequences import SequenceRow
from shared.recipe.sections.teacher import TransformersTeacher
from teacher_cache.engines.columns.sparse_columns import predicting_rows
from teacher_cache.engines.transformers.transformers_model import CausalModel, padded
from teacher_cache.teacher.model_files import resolve_model

CHUNK_ENTRIES = 2**22
Chunk = tuple[slice, torch.Tensor]
"""Which of a row's positions, and their log-probabilities [C, V] in float64 on the CPU"""


def open_recorded_teacher(
    identity: LayerIdentity, model: str | None, adapter: str | None, *, trust_remote_code: bool = False
) -> CausalModel:
    """Load the teacher that a layer records, in the types that it records; it lies in `model`, None: where it lay.

    Raises:
        UsageError: an adapter is missing, or one too many.
        IdentityError: these are other weights, or transformers cannot run the teacher as it was run.
        EngineError: it cannot be loaded.
    """
    if identity.quantization is not None:
        raise IdentityError(
            f"the teacher was quantised with {identity.quantization} when it was captured, which transformers does "
            "not do; audit a layer of the unquantised teacher"
        )
    if identity.adapter and not adapter:
        raise UsageError("the layer's teacher had an adapter; name it with --recipe or --adapter DIR")
    if adapter and not identity.adapter:
        raise UsageError(
            f"the layer's teacher had no adapter, and --adapter or the recipe names {adapter}; leave it out"
        )
    files = resolve_model(model or identity.teacher, None if model else identity.revision)
    for name, directory, recorded in (
        ("teacher", files.directory, identity.weights_hash),
        ("adapter", Path(adapter or ""), identity.adapter),
    ):
        if recorded is not None and (found := weights_hash(directory)) != recorded:
            raise IdentityError(
                f"{directory} has weights {found} and the layer was captured with {recorded}; "
                f"name the right {name} with --{name} DIR"
            )
    settings = {"dtype": identity.dtype, "head_dtype": identity.head_dtype, "adapter": adapter}
    teacher = TransformersTeacher.model_validate(
        {"model": str(files.directory), "engine": "transformers", "trust_remote_code": trust_remote_code, **settings}
    )
    return CausalModel.load(teacher, files.directory)


def chunk_positions(*models: CausalModel) -> int:
    """Return how many positions of any of these models are worked on at once."""
    return max(1, CHUNK_ENTRIES // max(model.num_entries for model in models))


def dense_logprobs(
    model: CausalModel,
    row: SequenceRow,
    *,
    beside: Sequence[SequenceRow] = (),
    vocab_size: int | None = None,
    step: int | None = None,
) -> Iterator[Chunk]:
    """Yield a row's log-probabilities [C, V] chunk by chunk.

    Args:
        model: body and head.
        row: whose supervised positions.
        beside: other rows in the same batch, padded with it to the longest: the same maths in other rounding.
        vocab_size: entries that count (a softmax over these alone); None: all that the head has.
        step: positions of a chunk; None: as many as keep logits within `CHUNK_ENTRIES`.
    """
    tokens, mask = padded([one.token_ids for one in (row, *beside)])
    with torch.inference_mode():
        hidden = model.hidden(tokens.to(model.device), mask.to(model.device))[0]
        rows = torch.from_numpy(predicting_rows(row.spans)).to(model.device)
    step = step or chunk_positions(model)
    for start in range(0, len(rows), step):
        where = slice(start, min(start + step, len(rows)))
        with (
            torch.inference_mode()
        ):  # left before each yield: a generator that waits would keep its caller in that mode
            logits: Any = model.logits(hidden[rows[where]])[:, :vocab_size]
            logprobs = logits.double().log_softmax(-1).cpu()
        yield where, logprobs
