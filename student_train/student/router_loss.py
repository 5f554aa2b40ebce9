"""The balancing loss of a mixture of experts, where the student's config asks for it (`output_router_logits: true`).

Of each row by itself, as the model computes it (the Switch Transformer's, arXiv 2101.03961): over all layers and
tokens of a row, the number of experts times the sum over experts of (share of assignments) x (mean probability). Rows
weigh by their supervised positions, as their cross entropy does, so that the loss of a pack is the mean of what the
model's own forward gives each row alone. Cost: one softmax and top-k per layer over [B, E]; no loop over rows.

Shape letters: B tokens of a pack, R rows, E experts, k experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import TrainingError
from student_train.student.rows_alone import are_rows_alone
from student_train.student.student_head import body_of, probe_tokens

NAME = "router_balance"
"""What the value is called among the measured ones."""


@dataclass(slots=True, eq=False)
class RouterLoss:
    """Sees the router's logits of each forward pass of a student's body."""

    coefficient: float
    num_experts: int
    experts_per_token: int
    _logits: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: Any, vocab_size: int) -> RouterLoss | None:
        """Return the loss that a student's config asks for, watching its body; None where it asks for none.

        Raises:
            TrainingError: the student balances its experts in a way that is not known here, or its rows run alone.
        """
        if not getattr(model.config.get_text_config(), "output_router_logits", False):
            return None
        advice = "set output_router_logits to false in its config.json to train on the stage's losses alone"
        name = type(model).__name__
        if are_rows_alone(body_of(model)):
            raise TrainingError(
                f"{name} asks for its router's balancing loss and runs rows one length at a time; {advice}"
            )
        sizes = [getattr(model, key, None) for key in ("router_aux_loss_coef", "num_experts", "num_experts_per_tok")]
        known = [float(size) for size in sizes if size is not None]
        if len(known) < len(sizes):
            raise TrainingError(f"{name} asks for a balancing loss of its router that is not known here; {advice}")
        found = cls(known[0], int(known[1]), int(known[2]))
        handle = body_of(model).register_forward_hook(found._keep)
        probe = probe_tokens(model, vocab_size, seed=3)
        with torch.no_grad():
            expected = model(input_ids=probe, use_cache=False).aux_loss
        got = found.value(torch.arange(probe.shape[1], device=probe.device)[None], probe.new_zeros(1), 1.0)
        if expected is None or not torch.isclose(got, found.coefficient * expected.to(got), rtol=2e-2):
            handle.remove()
            raise TrainingError(f"{name} computes a balancing loss of its router that is not known here; {advice}")
        return found

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._logits = list(getattr(output, "router_logits", None) or ())

    def value(self, position_ids: Tensor, predictors: Tensor, num_positions: Tensor | float) -> Tensor:
        """Return the weighted loss of the last pass, per position of the global batch.

        Args:
            position_ids: [1, B], from 0 in each row.
            predictors: [S] index in the pack of each supervised position's state.
            num_positions: supervised positions of the global batch.
        """
        row_of = (position_ids[0] == 0).cumsum(0) - 1
        num_rows = int(row_of[-1]) + 1
        assigned = torch.zeros(num_rows, self.num_experts, device=row_of.device)
        probabilities, slots = torch.zeros_like(assigned), torch.zeros(num_rows, 1, device=row_of.device)
        for logits in self._logits:
            routing = logits.view(-1, self.num_experts).softmax(-1)
            chosen = torch.zeros_like(routing, dtype=torch.float32)
            chosen.scatter_(1, routing.topk(self.experts_per_token, dim=-1).indices, 1.0)
            assigned = assigned.index_add(0, row_of, chosen)
            probabilities = probabilities.index_add(0, row_of, routing.float())
            slots = slots.index_add(0, row_of, torch.ones_like(chosen[:, :1]))
        self._logits = []
        of_row = self.num_experts * (assigned / slots * (probabilities / slots)).sum(-1)
        return self.coefficient * of_row[row_of[predictors]].sum() / num_positions
