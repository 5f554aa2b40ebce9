"""README.md of an exported student: where it comes from, what it minimised, and the figures that its run measured.

Only what the run's files say is written; what they do not say is named as missing, never made up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shared.places import named
from shared.recipe.recipe import Loss, Recipe, Stage
from shared.recipe.schedule import Schedule
from tools.cache.dataset_card import plain
from tools.export.base_licence import base_facts
from tools.export.card_use import ChatUsage, use_lines
from tools.report.tables import model_header, model_rows


def model_card(
    recipe: Recipe,
    stage: Stage,
    report: Mapping[str, Any],
    caches: list[dict[str, Any]],
    weights: str,
    usage: ChatUsage | None = None,
    dtype: str | None = None,
) -> str:
    """Return the card of one stage's model.

    Args:
        recipe: of the run.
        stage: whose model it is.
        report: figures of the run, as in report.json.
        caches: identity of each cache: `path`, `cache_id`, `licence`, `answers`, and the layer's fields.
        weights: hash of the trained weights.
        usage: template and end tokens; None where nothing is known.
        dtype: what the weights were converted to; None: nothing else than they were trained in.
    """
    usage = usage or ChatUsage(None, (), None)
    base = base_facts(recipe.student.model, recipe.student.revision) if recipe.student else {}
    assert recipe.student is not None
    lines = [
        *_front_matter(recipe, caches, base),
        f"# {plain(recipe.name)}: {plain(stage.name)}",
        "",
        f"`{plain(recipe.student.model)}`, distilled with Decant from a cache of a teacher's next-token distributions.",
        "",
        "## Where it comes from",
        "",
        *_origin(recipe, stage, caches, weights, base),
        *([f"- stored in {dtype}, converted from what was trained"] if dtype else []),
        "",
        "## Stages",
        "",
        *(line for each in _lineage(recipe, stage) for line in _stage_lines(each, report)),
        "",
        "## Figures",
        "",
        *_figures(report, stage),
        "",
        "## Licence",
        "",
        *_licence(recipe, caches, base),
        "",
        "## Use",
        "",
        *use_lines(usage, recipe.generate),
    ]
    return "\n".join(lines)


def _front_matter(recipe: Recipe, caches: list[dict[str, Any]], base: Mapping[str, str]) -> list[str]:
    assert recipe.student is not None
    licences = {str(cache["licence"]) for cache in caches if cache.get("licence")}
    licences |= {base["licence"]} if "licence" in base and " " not in base["licence"] else set()
    fields = {
        "base_model": recipe.student.model,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "decant"],
    }
    if len(licences) == 1:
        fields["license"] = licences.pop()
    return ["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---", ""]


def _origin(
    recipe: Recipe, stage: Stage, caches: list[dict[str, Any]], weights: str, base: Mapping[str, str]
) -> list[str]:
    assert recipe.student is not None
    student = recipe.student
    init = "fresh weights of its config" if student.init == "random" else "its own weights"
    origin = f" (which its files say comes from `{plain(base['origin'])}`)" if "origin" in base else ""
    revision = f" at revision `{plain(student.revision)}`" if student.revision else ""
    lines = [f"- student: `{plain(student.model)}`{revision}{origin}, {init}, trained as {_trained_as(recipe)}"]
    for cache in caches:
        teacher = cache.get("teacher") or (recipe.teacher.model if recipe.teacher else "unknown")
        capture = (
            f"mode {cache.get('mode')}, k {cache.get('k')}, temperatures {cache.get('temperatures')}"
            if "mode" in cache
            else ""
        )
        lines.append(
            f"- cache: `{cache.get('cache_id')}`; teacher: `{plain(str(teacher))}`"
            + (f"; {capture}" if capture else "")
        )
    read = {cache["path"] for cache in caches}
    unread = [named(path) for path in recipe.cache if str(path) not in read]
    if unread:
        lines.append(f"- cache: could not be read when this card was written; the recipe names {', '.join(unread)}")
    lines.append(
        f"- weights: `{weights}`; stage `{plain(stage.name)}` of run `{plain(recipe.name)}`, seed {recipe.seed}"
    )
    return lines


def _trained_as(recipe: Recipe) -> str:
    assert recipe.student is not None
    adapter, dtype = recipe.student.adapter, recipe.student.dtype
    if adapter.trains_all_weights:
        return f"all weights in {dtype}"
    bits = "4-bit weights (NF4)" if adapter.holds_4_bits else f"{dtype} weights"
    return f"low-rank additions (rank {adapter.r}, alpha {adapter.alpha:g}) over {bits}, merged here"


def _lineage(recipe: Recipe, stage: Stage) -> list[Stage]:
    """Return the stages that led to one, the first first."""
    names = [each.name for each in recipe.stages]
    chain = [stage]
    while (start := chain[0].init_from) != "base":
        if start == "previous":
            start = names[names.index(chain[0].name) - 1]
        if start not in names:
            break
        chain.insert(0, recipe.stages[names.index(start)])
    return chain


def _stage_lines(stage: Stage, report: Mapping[str, Any]) -> list[str]:
    losses = " + ".join(_loss(loss) for loss in stage.losses)
    trainer = stage.trainer
    packs = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    figures = report.get("stages", {}).get(stage.name, {})
    steps = figures.get("steps_done") or figures.get("steps") or trainer.max_steps
    done = f"{steps} steps" if steps else f"{trainer.num_train_epochs:g} epochs"
    rate = (
        f"learning rate {trainer.learning_rate:g} ({trainer.lr_scheduler_type}), {packs} packs of "
        f"{trainer.pack_tokens} tokens"
    )
    return [f"- `{plain(stage.name)}` from `{plain(stage.init_from)}`: {losses}; {done}, {rate}"]


def _loss(loss: Loss) -> str:
    temperature = "" if set(loss.temperature.extremes()) == {1.0} else f" at T {_schedule(loss.temperature)}"
    return f"{_schedule(loss.weight)} x {loss.name}{temperature}"


def _schedule(schedule: Schedule) -> str:
    low, high = min(schedule.extremes()), max(schedule.extremes())
    return f"{low:g}" if low == high else f"{low:g} to {high:g} ({schedule.kind})"


def _figures(report: Mapping[str, Any], stage: Stage) -> list[str]:
    """Return the comparison that the run made, or say that it made none."""
    if stage.name not in report.get("models", {}):
        return ["This model was not evaluated in its run (`decant eval`)."]
    header, rows = model_header(report), model_rows(report)
    table = [f"| {' | '.join(map(plain, header))} |", f"|---{'|---:' * (len(header) - 1)}|"]
    return [*table, *(f"| {' | '.join(map(plain, row))} |" for row in rows)]


def _licence(recipe: Recipe, caches: list[dict[str, Any]], base: Mapping[str, str]) -> list[str]:
    lines = [
        f"- answers of cache `{cache.get('cache_id')}`: licence {plain(str(cache.get('licence') or 'not stated'))}, "
        f"written by {plain(str(cache.get('answers') or 'unknown'))}"
        for cache in caches
    ]
    assert recipe.student is not None
    said = ", ".join(base[name] for name in ("licence", "licence_name", "licence_link") if name in base)
    lines.append(f"- base model `{plain(recipe.student.model)}`: licence {plain(said or 'not stated in its files')}")
    lines.append("- the licence of the teacher applies too; check all of them before you publish")
    return lines
