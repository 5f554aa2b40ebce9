"""The schedule of a stage over its steps: which loss terms with which weights, from which sources, evaluated when.

What of it depends on the training so far (shares, balanced weights) is small, and every checkpoint stores it as JSON,
whose numbers come back to the last bit; the rest is a pure function of the step. Cost: nothing beside the evaluations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.atomic import write_atomic
from shared.errors import TrainingError
from shared.recipe.recipe import Stage
from shared.text import strict_json
from student_train.batch.stage_terms import terms_at
from student_train.evaluate.evaluation_run import EvaluationRun
from student_train.losses import LossTerm
from student_train.operator.loss_terms import term_keys
from student_train.order.evaluation_sampling import EvaluationSampling
from student_train.order.schedules import RunSteps
from student_train.train.balance import Balancer, balancer_of

STATE_FILE = "course.json"


@dataclass(eq=False)
class StageSchedule:
    """What the trainer asks at every step."""

    stage: Stage
    num_steps: int
    run: RunSteps | None = None
    evaluation: EvaluationRun | None = None
    sampling: EvaluationSampling | None = None

    def __post_init__(self) -> None:
        """Prepare the balance of the losses."""
        self._keys = term_keys(terms_at(self.stage, 0, self.num_steps, self.run))
        self._balancer: Balancer | None = balancer_of(self.stage.balance, self._keys)

    def terms_at(self, step: int) -> list[LossTerm]:
        """Return the loss terms of an optimizer step, counted from 0, with the weights that they have now."""
        terms = terms_at(self.stage, step, self.num_steps, self.run)
        if self._balancer is None:
            return terms
        factors = self._balancer.factors
        return [replace(term, weight=term.weight * factors[key]) for key, term in zip(self._keys, terms, strict=True)]

    def wants_gradient_norms(self, step: int) -> bool:
        """Return whether gradient norms are to be measured at an optimizer step, counted from 0."""
        return self._balancer is not None and self._balancer.wants_gradient_norms(step)

    def observe(self, values: Mapping[str, float], gradient_norms: Mapping[str, float] | None) -> dict[str, Any]:
        """Take the values of a step that has been made; return what is worth logging."""
        return {} if self._balancer is None else self._balancer.observe(values, gradient_norms)

    def follow(self, figures: Mapping[str, Any]) -> dict[str, float] | None:
        """Move the shares after an evaluation; return the new ones where they moved."""
        return None if self.sampling is None else self.sampling.follow(figures["step"], figures)

    def save(self, checkpoint: Path) -> None:
        """Store what depends on the training so far, where anything does."""
        state: dict[str, Any] = {}
        if self.sampling is not None:
            state["shares"] = self.sampling.history
        if self._balancer is not None:
            state["balance"] = self._balancer.state()
        if state:
            write_atomic(checkpoint / STATE_FILE, json.dumps(state, indent=1).encode(), what="course")

    def restore(self, checkpoint: Path) -> None:
        """Take up what a checkpoint stores.

        Raises:
            TrainingError: it stores nothing, or that of another stage.
        """
        if self.sampling is None and self._balancer is None:
            return
        path = checkpoint / STATE_FILE
        try:
            state = strict_json.loads(path.read_text())
            if self.sampling is not None:
                self.sampling.restore(state["shares"])
            if self._balancer is not None:
                self._balancer.restore(state["balance"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(
                f"{path} does not hold the shares or weights of the stage so far ({type(error).__name__}); remove "
                f"{checkpoint} to go on from the checkpoint before it"
            ) from None
