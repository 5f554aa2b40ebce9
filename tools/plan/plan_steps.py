"""How many steps each stage would make, and over how much.

Where every row is there the packs are counted, as training counts them. Until then steps that `num_train_epochs`
decides are those that full packs would need: packs are never quite full, so training makes some more.
Cost: the plan of the stage's epochs (about a microsecond per row and epoch).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cache.layout import sequences_dir
from shared.errors import DecantError
from shared.parts.records import list_records
from shared.recipe.recipe import Recipe, Stage
from tools.plan.plan_existing import caches_there

if TYPE_CHECKING:
    from student_train.order.stage_plan import StagePlan


def stage_figures(
    recipe: Recipe, stage: Stage, planned: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a stage's steps and tokens on one device; with rounds, `steps` are those of all, `own` their answers.

    `estimated` says that the steps are not those of counted packs; `tokens` are those of full packs, at most.
    """
    trainer, rounds = stage.trainer, stage.rounds.count if stage.rounds is not None else 1
    per_step = trainer.pack_tokens * trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    counted = _counted(recipe, stage, planned)
    trained = _expected_tokens(recipe, stage, planned) + (own["row_tokens"] / rounds if own is not None else 0)
    full = max(math.ceil(trainer.num_train_epochs * trained / per_step), 1)
    steps = counted.num_steps if counted is not None else trainer.max_steps or full
    epochs = counted.epoch_at(steps) if counted is not None else steps * per_step / trained if trained else None
    return {
        "rounds": rounds if stage.rounds is not None else None,
        "steps": steps * rounds,
        "estimated": counted is None and trainer.max_steps is None,
        "tokens_per_step": per_step,
        "tokens": steps * rounds * per_step,
        "epochs": round(epochs, 2) if epochs is not None and own is None else None,
    }


def _counted(recipe: Recipe, stage: Stage, planned: Mapping[str, Any]) -> StagePlan | None:
    """Return a stage's plan as training makes it; None where rows are to come or it cannot be made, as others say."""
    is_whole = len(caches_there(recipe)) == len(recipe.cache) and not planned.get("rows_to_do", 0)
    is_here = recipe.student is None or Path(recipe.student.model).is_dir()
    if stage.rounds is not None or not is_whole or not is_here:
        return None
    from student_train.stage.stage_order import plan_length

    try:
        return plan_length(recipe, stage)
    except DecantError:
        return None


def _expected_tokens(recipe: Recipe, stage: Stage, planned: Mapping[str, Any]) -> float:
    """Return about how many tokens of the recipe's caches one pass of a stage trains on."""
    tokens: Counter[str] = Counter()
    for name, source in planned["sources"].items():
        tokens[name] += source["prompt_tokens"] + source["answer_tokens"]["expected"]
    for path in caches_there(recipe):
        for record in list_records(sequences_dir(path)):
            tokens.update({name: figures["tokens"] for name, figures in record.stats["sources"].items()})
    drawn = sum(count for name, count in tokens.items() if stage.mixture is None or name in stage.mixture)
    return drawn * (1 - recipe.heldout.fraction)


def step_line(name: str, figures: Mapping[str, Any]) -> str:
    """Lay a stage's figures out for people."""
    about = "about " if figures["estimated"] else ""
    rounds = f" in {figures['rounds']:,} rounds" if figures["rounds"] is not None else ""
    epochs = f", about {figures['epochs']:g} passes over the rows" if figures["epochs"] else ""
    steps = f"{about}{figures['steps']:,} steps of {figures['tokens_per_step']:,} tokens{rounds}"
    return f"  train {name}: {steps}, at most {figures['tokens']:,} tokens{epochs}"
