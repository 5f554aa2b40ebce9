"""Tokens per second of a student that trains, its share of the card's peak, and a plain transformers loop beside it.

Counted are the operations that the model needs: 6 per weight and token where all weights are trained, 4 where additions
to frozen ones are; recomputed activations are extra work and count nothing. The plain loop has the same model, packs of
the same length without rows, plain logits in memory and cross-entropy: less than the student's loss asks for.
Cost: a few more steps.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from tools.gpu.measuring import device, median_seconds

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "A10": 125}
"""Dense bfloat16, with float32 accumulation, as published, by a part of the GPU's name."""


def speed(trainer: Any, recipe: Any) -> dict[str, Any]:
    """Return tokens per second, its share of the peak, and the same of a plain loop, of a stage that was trained."""
    import torch

    written = Path(trainer.args.output_dir) / "timing.jsonl"
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    stage, model = recipe.stages[0], trainer.model
    base = model if recipe.student.adapter.trains_all_weights else model.get_base_model()
    rate = statistics.median(line["tokens_per_second"] for line in lines[len(lines) // 2 :])
    figures: dict[str, Any] = {"tokens_per_second": rate, "share_of_peak": share_of_peak(base, recipe.student, rate)}
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)  # plain logits may need more than the card that is planned for
    figures["plain_tokens_per_second"] = _plain(trainer, base, stage)
    figures["over_plain"] = rate / figures["plain_tokens_per_second"]
    return figures


def share_of_peak(base: Any, student: Any, tokens_per_second: float) -> float | None:
    """Return model operations per second over the GPU's peak; None for a GPU whose peak is not known here."""
    import torch

    if device() == "cpu":
        return None
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    from student_train.fit.model_shape import shape_of

    per_weight = 6 if student.adapter.trains_all_weights else 4
    shape = shape_of(base.config)
    weights = shape.num_linear_parameters + shape.num_head_parameters
    return None if peak is None else per_weight * weights * tokens_per_second / (peak * 1e12)


def _plain(trainer: Any, base: Any, stage: Any) -> float:
    """Return tokens per second of the model's own forward, loss and the same optimizer."""
    import torch

    from student_train.student.forward_patch import restore_forward
    from student_train.student.row_attention import switch_attention

    restore_forward(base)
    switch_attention(base, "sdpa")
    tokens = stage.trainer.pack_tokens
    ids = torch.randint(0, base.config.vocab_size, (1, tokens), device=device())
    optimizer = trainer.optimizer

    def step() -> None:
        with torch.autocast(device(), torch.bfloat16, enabled=stage.trainer.bf16):
            loss = trainer.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return float(tokens / median_seconds(step, 3))
