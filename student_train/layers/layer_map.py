"""Which student layer learns from which stored teacher layer: as the recipe says, or at the same relative depth.

Cost: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.errors import TrainingError
from shared.identity.hidden_identity import FINAL
from shared.identity.hidden_layers import layer_name


@dataclass(frozen=True, slots=True)
class LayerPair:
    """One student layer and its teacher layer."""

    teacher: int
    """Teacher layer, counted from 1; FINAL for the state after the last norm."""
    student: int
    """Student layer, likewise."""
    column: int
    """Place of the teacher layer among the stored ones."""


def pair_layers(
    loss: str,
    stored: Sequence[int],
    num_teacher_layers: int,
    num_student_layers: int,
    given: Mapping[str, int | str] | None,
) -> tuple[LayerPair, ...]:
    """Return the pairs that a loss compares.

    Args:
        loss: its name, for messages.
        stored: teacher layers of the cache's hidden layer.
        num_teacher_layers: blocks of the teacher.
        num_student_layers: blocks of the student.
        given: teacher layer -> student layer as the recipe says; None takes every stored layer to the same relative
            depth.

    Raises:
        TrainingError: a teacher layer is not stored, or the student has no such layer.

    >>> [pair.student for pair in pair_layers("hidden", (8, 16, 24, -1), 24, 12, None)]
    [4, 8, 12, -1]
    """
    if given is None:
        depths = [FINAL if t == FINAL else max(1, round(t * num_student_layers / num_teacher_layers)) for t in stored]
        return tuple(LayerPair(t, s, column) for column, (t, s) in enumerate(zip(stored, depths, strict=True)))
    pairs = []
    for name, student in given.items():
        teacher = FINAL if name == "final" else int(name)
        if teacher not in stored:
            raise TrainingError(
                f"loss '{loss}' maps teacher layer {name}, which the hidden layer does not keep (it keeps "
                f"{', '.join(map(layer_name, stored))}); name one of these or capture it"
            )
        number = FINAL if student == "final" else int(student)
        if number > num_student_layers:
            raise TrainingError(
                f"loss '{loss}' maps to layer {number} of a student that has {num_student_layers}; name 1 to "
                f"{num_student_layers}"
            )
        pairs.append(LayerPair(teacher, number, list(stored).index(teacher)))
    return tuple(pairs)
