"""What losses on a hidden layer of the cache add to a training step, in bytes: trained projections, the teacher's
values in the batch, and what autograd keeps of the student's states and attention.

Of a pair of state layers: the float32 copy of the student's states that a projection's gradient needs, and the
difference from the teacher's. Of a pair of attention layers: selected queries, with recomputed activations also the
queries and keys themselves, and the masses; scores are alive for one chunk. A row's pooled state is as small as the row
is long: its projection counts, its values do not.
Cost: a few multiplications.

Shape letters: H student width, D stored width, M stored keys of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.identity.hidden_identity import HiddenIdentity
from shared.recipe.sections.losses import Loss
from student_train.fit.model_shape import ModelShape
from student_train.layers.layer_losses import pairs_of
from student_train.losses import representations


@dataclass(frozen=True, slots=True)
class HiddenMemory:
    """Sizes of a stage's losses on one hidden layer."""

    projections: int
    """Trained float32 weights."""
    batch: int
    """Bytes per position of the teacher's values."""
    kept: int
    """Bytes per position that the losses keep for the backward pass."""
    kept_recomputed: int
    """Further bytes per position where activations are recomputed: what the layers would have kept anyway."""
    gradients: int
    """Bytes per position of gradients that wait until the backward pass reaches their layers."""
    working: int
    """Bytes per position of the loss that needs most besides."""
    has_scores: bool
    """Scores of attention are computed in chunks."""


def hidden_memory(
    losses: Sequence[Loss], identity: HiddenIdentity, shape: ModelShape, *, residual_bytes: int, attention_bytes: int
) -> HiddenMemory | None:
    """Return the sizes of a stage's losses on a hidden layer; None where it has none.

    Args:
        losses: the stage's.
        identity: of the hidden layer.
        shape: the student's.
        residual_bytes: of a number between the student's layers.
        attention_bytes: of a number in queries and keys.

    Raises:
        TrainingError: a loss needs what the layer does not keep, or what the student does not have.
    """
    by_name: dict[str, Any] = {loss.name: loss for loss in losses if loss.name in representations}
    if not by_name:
        return None
    wide, stored, most = shape.hidden_size, identity.stored_width, identity.strongest
    paired = pairs_of(losses, identity, shape.num_layers)
    layers = {"states": identity.layers, "attention": identity.attention_layers}
    per_layer = {"states": stored + 4, "attention": 8 * most}
    projections = kept = again = waiting = batch = 0
    working = [0]
    for name, loss in by_name.items():
        reads = representations[name].reads
        if reads == "pooled":
            projections += wide * stored
            working.append(8 * wide)
            continue
        pairs = len(paired[name])
        batch += len(layers[reads]) * per_layer[reads]
        if reads == "states":
            projections += pairs * wide * stored
            kept += pairs * (4 * wide + (4 if getattr(loss, "metric", "") == "mse" else 8) * stored)
            waiting += pairs * wide * residual_bytes
            working.append(8 * wide + 12 * stored)
        else:
            query, key = shape.query_size * attention_bytes, shape.key_size * attention_bytes
            kept += pairs * (query + 24 * most)
            again += pairs * (query + key)
            waiting += pairs * (query + key)
            working.append(query + key)
    has_scores = any(representations[name].reads == "attention" for name in by_name)
    return HiddenMemory(projections, batch, kept, again, waiting, max(working), has_scores)
