"""Has the training diverged? Judged from the norm of the gradient before clipping, against what it was in the steps
before.

A norm that is not finite stops the training at once. A norm above `factor` times the median of the last 64 norms is
suspicious, and the 5th suspicious step in a row stops it. Clipping hides an explosion from the weights for a while,
never from this norm. Suspicious norms do not enter the median. While a step is suspicious no checkpoint is written, so
that the newest one is from before. With fp16, where the loss scale is found by overflowing, 20 norms in a row that are
not finite stop it.
Cost: a median of 64 numbers per step.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path

from shared.atomic import write_atomic
from shared.errors import TrainingError
from shared.text import strict_json

STATE_FILE = "gradient_watch.json"
WINDOW = 64
"""Norms that the median is taken of."""
PATIENCE = 5
"""Suspicious steps in a row that stop the training."""
PATIENCE_FP16 = 20
"""Overflows in a row that stop a training with a loss scale."""


class DivergedError(TrainingError):
    """The training has diverged; the sentence says at which step and what is kept."""


class GradientWatch:
    """Follows the norms of one stage's gradients."""

    def __init__(self, factor: float | None, *, scales_loss: bool = False) -> None:
        """Watch norms; `factor` None looks only for what is not finite, `scales_loss` expects
        overflows now and then.
        """
        self._factor = factor
        self._scales_loss = scales_loss
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self.num_suspicious = 0
        """Suspicious steps in a row, up to now."""

    @property
    def median(self) -> float | None:
        """Median of the last norms; None before the first."""
        return statistics.median(self._norms) if self._norms else None

    def save(self, checkpoint: Path) -> None:
        """Store what the judgement of the next steps depends on."""
        state = {"norms": list(self._norms), "num_suspicious": self.num_suspicious}
        write_atomic(checkpoint / STATE_FILE, json.dumps(state).encode(), what="gradient_watch")

    def restore(self, checkpoint: Path) -> bool:
        """Take up what a checkpoint stores; False where it was written before checkpoints stored it.

        Raises:
            TrainingError: it stores something else.
        """
        path = checkpoint / STATE_FILE
        if not path.is_file():
            return False
        try:
            state = strict_json.loads(path.read_text(encoding="utf-8"))
            self._norms.extend(float(norm) for norm in state["norms"])
            self.num_suspicious = int(state["num_suspicious"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{path} does not hold the gradients' norms so far ({type(error).__name__}); remove {checkpoint} to go "
                "on from the checkpoint before it"
            ) from None
        return True

    def see(self, norm: float) -> str | None:
        """Take the norm of one step; return why the training has diverged, or None."""
        median = self.median
        if not math.isfinite(norm):
            self.num_suspicious += 1
            patience = PATIENCE_FP16 if self._scales_loss else 1
            return f"the gradient's norm is {norm}" if self.num_suspicious >= patience else None
        if self._factor is None or median is None or norm <= self._factor * median:
            self.num_suspicious = 0
            if norm > 0:
                self._norms.append(norm)
            return None
        self.num_suspicious += 1
        if self.num_suspicious < PATIENCE:
            return None
        return (
            f"the gradient's norm is {norm:.3g}, in the {self.num_suspicious}th step in a row above {self._factor:g} "
            f"times the median of the steps before, {median:.3g} (trainer.max_grad_norm_factor)"
        )
