"""Do rows of a pack stay apart at true depth, in the types that students are kept in, and is that seen?

Random students of full size in bfloat16 and in NF4; `separate_rows` chooses the way and raises where there is none.
Cost: building 0.6 and 8 billion weights on the GPU.
"""

from __future__ import annotations

from typing import Any

from tools.gpu.measuring import device, is_installed, seconds

STUDENTS = {"bfloat16_28_layers": ("0.6B", "none"), "nf4_36_layers": ("8B", "qlora")}
LONGEST = 2048


def measure(*, dry_run: bool) -> dict[str, Any]:
    """Return the way that was chosen for each student, and how long that took."""
    from shared.recipe.recipe import Student
    from student_train.student.row_separation import separate_rows
    from tools.gpu.gpu_memory import qwen3, random_student

    figures: dict[str, Any] = {}
    for name, (size, adapter) in STUDENTS.items():
        if adapter == "qlora" and not is_installed("bitsandbytes"):
            figures[name] = "skipped: bitsandbytes is not installed"
            continue
        student = Student.model_validate({"model": "made-up", "dtype": "bfloat16", "adapter": adapter})
        model = random_student(qwen3("tiny" if dry_run else size), student, device())

        def separate(model: Any = model, name: str = name) -> None:
            figures[name] = separate_rows(model, 1000, longest=64 if dry_run else LONGEST)

        figures[f"seconds_{name}"] = seconds(separate)
        del model
    return figures
