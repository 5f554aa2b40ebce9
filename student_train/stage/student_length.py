"""How long a row a student can read: its positions bound a stage's rows where rows are longer than that.

Cost: reading the student's config.
"""

from __future__ import annotations

from shared.errors import ModelError, TrainingError
from shared.models.files import load_config
from shared.models.forward.row_length import known_positions
from shared.recipe.recipe import Stage, Student
from student_train.order.order import length_limit


def student_positions(student: Student) -> int | None:
    """Return how many positions a student knows, or None where its config sets no bound or cannot be read."""
    trusts = student.trust_remote_code
    try:
        config = load_config(student.model, what="the student", revision=student.revision, trust_remote_code=trusts)
    except ModelError:  # loading the student says so again, with its weights
        return None
    return known_positions(config.get_text_config())


def within_positions(stage: Stage, student: Student, longest_row: int) -> Stage:
    """Return a stage whose `max_length` is at most what the student knows, where the longest row is above that.

    Rows that are trained on whole anyway change nothing, so that their plan stays as it was.

    Raises:
        TrainingError: the stage refuses rows that are too long.
    """
    longest_row = min(longest_row, length_limit(stage.trainer.pack_tokens, stage.max_length))
    positions = student_positions(student)
    if positions is None or longest_row <= positions:
        return stage
    if stage.too_long == "refuse":
        raise TrainingError(
            f"the student '{student.model}' knows {positions} positions and stage '{stage.name}' has rows of up to "
            f"{longest_row} tokens; set too_long to cut or drop, or choose a student with more positions"
        )
    return stage.model_copy(update={"max_length": positions})
