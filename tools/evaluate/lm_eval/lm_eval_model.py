"""The process that hands one model to lm-evaluation-harness. Started by `lm_eval_tasks`, never by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError, reason_of
from shared.models.end_tokens import checked_ids
from shared.models.weights.checkpoint import check_checkpoint
from tools.evaluate.lm_eval.lm_eval_tasks import fold
from tools.evaluate.models.model_process import serve

CPU_BATCH = 8


def _work(job: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    settings = {"pretrained": job["model"], "dtype": job["dtype"], "trust_remote_code": job["trust_remote_code"]}
    settings |= {"peft": job["adapter"]} if job["adapter"] else {}
    settings |= {"parallelize": True} if torch.cuda.device_count() > 1 else {}
    trust = job["trust_remote_code"]
    check_checkpoint(Path(job["model"]), what="the model", trust_remote_code=trust, adapter=job["adapter"])
    say(f"lm-eval: {', '.join(job['names'])}")
    on_gpu = torch.cuda.is_available()
    runs = {"batch_size": "auto" if on_gpu else CPU_BATCH, "device": "cuda" if on_gpu else "cpu"}
    try:
        manager = TaskManager(include_path=job["directories"] or None, include_defaults=job["needs_defaults"])
        model = get_model("hf").create_from_arg_obj(settings, runs)
        _stop_at(model.model, job["end_token_ids"])
        found = simple_evaluate(
            model=model,
            tasks=job["names"],
            task_manager=manager,
            batch_size=runs["batch_size"],
            log_samples=False,
        )
    except (
        Exception
    ) as error:  # unknown tasks, data out of reach, models that do not load: the harness raises what it likes
        reason = reason_of(error, 400)
        raise EvaluationError(f"lm-evaluation-harness cannot run {', '.join(job['names'])}: {reason}") from error
    tasks = fold(found["results"] if found else {})
    if not tasks:
        raise EvaluationError(f"lm-evaluation-harness returned no figure for {', '.join(job['names'])}")
    return tasks


def _stop_at(model: Any, end_token_ids: Sequence[int]) -> None:
    """Let the model's own `generate` end at these tokens too."""
    declared = checked_ids(model.generation_config.eos_token_id, "eos_token_id of the model")
    model.generation_config.eos_token_id = list(dict.fromkeys([*declared, *end_token_ids])) or None


if __name__ == "__main__":
    serve(_work)
