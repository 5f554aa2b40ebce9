"""How strong each term's gradient is, at the states of a forward pass that all terms of the stage share.

GradNorm (Chen et al. 2018, 1711.02257) takes gradients by the weights of the last layer that its tasks share, for which
the states that leave the layer stand in here: their gradient is what each term asks of everything below, it needs no
gradient of a weight (so adapters, frozen and quantised layers are alike), and it lies in the graph that the step builds
anyway. Those states are

- the last hidden states [S, H], which the head reads, where all terms read them: losses of the head, `contrastive`, and
  `hidden` on `final` alone;
- otherwise the output [1, B, H] of the lowest student layer that any term reads: the layer itself for `hidden`, the one
  below for `attention`, whose queries and keys come from the layer's input (the embeddings, below layer 1).

Norms at different states could not be compared: what a term asks of the last states changes its length on the way down.
Nothing of the step changes: every gradient is by autograd on its own, retaining the graph, and no weight's is touched.
Cost, on steps that measure: one pass of the fused operator per loss of the head, without the head's gradient; and per
loss one backward pass from what it reads to the shared states, without gradients of weights. With gradient
checkpointing each recomputes the blocks that it passes through.

Shape letters: S positions, H hidden width, B tokens of the packs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from student_train.losses import LossTerm
from student_train.operator.fused_loss import FusedLoss
from student_train.operator.loss_terms import term_keys


def head_squares(
    hidden: Tensor,
    terms: Sequence[LossTerm],
    loss_of: Callable[[Tensor, Sequence[LossTerm]], FusedLoss],
    down: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> dict[str, Tensor]:
    """Return the squared gradient norm of each term of the head, its weight left out, by `term_keys`.

    Args:
        hidden: [S, H] states that the head reads.
        terms: of the head.
        loss_of: makes the loss of states and terms.
        down: turns the gradient by `hidden` into that by the shared states.
    """
    squares = {}
    for key, term in zip(term_keys(terms), terms, strict=True):
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(leaf, [replace(term, weight=1.0)]).loss, leaf)
        squares[key] = down(gradient).double().square().sum()
    return squares


def brought_down(gradient: Tensor, final: Tensor, shared: Tensor) -> Tensor:
    """Return the gradient by the states `shared` of what has the `gradient` [S, H] by the last hidden
    states `final`.
    """
    return gradient if shared is final else _gradient(final, shared, gradient.to(final.dtype))


def value_squares(values: Mapping[str, Tensor], shared: Tensor) -> dict[str, Tensor]:
    """Return the squared norm of each value's gradient by the states `shared`; 0 where it does not depend on them."""
    return {key: _gradient(value, shared).double().square().sum() for key, value in values.items()}


def _gradient(output: Tensor, shared: Tensor, by_output: Tensor | None = None) -> Tensor:
    with torch.autocast(shared.device.type, enabled=False):  # a backward pass takes the types that its forward pass had
        (gradient,) = torch.autograd.grad(output, shared, by_output, retain_graph=True, materialize_grads=True)
    return gradient
