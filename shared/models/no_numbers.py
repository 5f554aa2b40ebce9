"""What is said of a model that computes NaN, whoever finds it."""

from __future__ import annotations

NO_NUMBERS = (
    "the model computes NaN instead of numbers: its weights hold such, or are too large for 16 bits; set "
    "teacher.dtype to float32 (for a student student.dtype; bfloat16 holds large ones too), or load another copy of it"
)
