"""What one of several processes holds of a student's weights and gradients: all of them, or its shard and what
`fully_shard` gathers (train/sharding.py).

Without shards (data parallel) torch keeps its buckets, a second copy of all gradients. With shards the root group
(embeddings, last norm, head) is whole from the forward pass to the end of the backward pass, where its gradients are
whole twice: made, and laid out for the reduction. Of the layers, the forward pass keeps the gathering buffer of the
last one until the loss is there; the backward pass has one layer whole and gathers the next into a buffer, so two, and
with them one layer's gradients as made and those of the layer before laid out. All layers count as equally large; rows
that pad a shard are not counted. What autocast casts of gathered weights is whole (memory.py counts it).
Cost: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Bytes of a student and how processes share it."""

    num_processes: int
    is_sharded: bool
    num_layers: int
    weights: int
    root_weights: int
    """Of them, those of the root group."""
    gradients: int
    root_gradients: int

    def share(self, size: int) -> int:
        """Return a process's bytes of something that is sharded where weights are."""
        return -(-size // self.num_processes) if self.is_sharded else size

    @property
    def buckets(self) -> int:
        """Bytes of the second copy of gradients that data parallelism reduces."""
        return self.gradients if self.num_processes > 1 and not self.is_sharded else 0

    @property
    def layer_gradients(self) -> int:
        """Bytes of the gradients of one gathered layer; 0 without shards."""
        return (self.gradients - self.root_gradients) // self.num_layers if self.is_sharded else 0

    def weights_with(self, num_layers: int, *, root: bool = True) -> int:
        """Return bytes of weights while so many layers, and the root group where `root`, are gathered."""
        if not self.is_sharded:
            return self.weights
        layer = (self.weights - self.root_weights) // self.num_layers
        return self.share(self.weights) + num_layers * layer + (self.root_weights if root else 0)

    def reduced(self, carried: int) -> int:
        """Return bytes of gradients when every layer's are reduced and the root group's are not, of which `carried`
        were there before.
        """
        if not self.is_sharded:
            return self.gradients - self.root_gradients + self.buckets
        of_root = self.share(self.root_gradients) if carried else 0
        return self.share(self.gradients - self.root_gradients) + of_root
